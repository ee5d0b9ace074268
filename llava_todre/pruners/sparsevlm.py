"""SparseVLM (arXiv 2410.04417): words that match the image rate the patches, in three stages.

Symbols: N tokens now present, L tokens of the prompt, P patch tokens, T text tokens, R raters, M
    recycled tokens, C clusters, D width, H heads, E head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava_todre.errors import TodreError
from llava_todre.pruners.base import About, Keep, LayerView, option, top
from llava_todre.pruners.staged import StagedPruner
from llava_todre.selection import check_finite
from llava_todre.spans import TokenType

PUBLISHED_TOTAL = 192


@dataclass(frozen=True, kw_only=True)
class _RatedByText(StagedPruner):
    """What both versions share: the stages and the raters."""

    published_counts: ClassVar[tuple[int, ...]]
    """Tokens after each stage in the authors' table for 192 of 576."""

    prune_depths: tuple[float, ...] = option(
        (2 / 32, 6 / 32, 15 / 32),
        "Three ascending depths: tokens leave after the layers floor(depth * layers).",
        above=0,
        high=1,
    )

    def __post_init__(self) -> None:
        """Check the number and order of the depths."""
        super().__post_init__()
        depths = self.prune_depths
        if len(depths) != len(self.published_counts) or list(depths) != sorted(depths):
            raise TodreError(
                f"prune_depths must be {len(self.published_counts)} ascending numbers, got "
                f"{list(depths)}."
            )

    def stages(self, ratio: float, num_layers: int) -> dict[int, float]:
        """Return the published table, scaled in proportion and cut at 1."""
        return {
            math.floor(depth * num_layers): min(1.0, ratio * count / PUBLISHED_TOTAL)
            for depth, count in zip(self.prune_depths, self.published_counts, strict=True)
        }


@dataclass(frozen=True, kw_only=True)
class SparseVLM(_RatedByText):
    """SparseVLM 1.5: fixed counts per stage; some of what is dropped comes back merged.

    A patch token scores the attention it receives from the raters, mean over heads (section 3.2).
    The best of the dropped tokens are clustered, and the mean of each cluster stays.
    """

    about: ClassVar[About] = About(
        paper="SparseVLM 1.5, ICML 2025, arXiv 2410.04417",
        budget_note="the published counts 300, 200, 110 for 192 of 576 tokens, in proportion: "
        "after the three stages 1.563, 1.042 and 0.573 of retain_ratio stay (1/3 is that table; 1 "
        "prunes nothing), and recycling adds about 3 % of what each stage drops; with "
        "budget_rule=mean recycled tokens count",
        count="own",
        deviations=(
            "Other published budgets (128, 96, 64) have tables that are not in proportion to each "
            "other; here there is one.",
            "Tokens keep their positions, and a merged token stands at the centre of its cluster. "
            "The released code puts merged tokens after the kept ones and renumbers all.",
            "The released code breaks ties between cluster centres with unseeded noise; here the "
            "first token wins.",
        ),
    )
    published_counts: ClassVar[tuple[int, ...]] = (300, 200, 110)

    recycle: bool = option(True, "Whether dropped tokens come back merged.")
    recycle_ratio: float = option(
        0.3, "Share of the dropped tokens that is clustered.", above=0, high=1
    )
    cluster_ratio: float = option(0.1, "Clusters per clustered token.", above=0, high=1)

    def left(self, before: float, share: float) -> float:
        """Return what a stage leaves, merged tokens included."""
        return share + self.recycle * self.recycle_ratio * self.cluster_ratio * (before - share)

    def choose(self, view: LayerView, count: int) -> Keep | Tensor:
        """Return the best patch tokens, and put merged tokens in the place of some others."""
        scores = view.attention(raters(view)).mean(dim=(0, 1))[view.patches]
        ranked = view.patches[top(scores, len(scores))]
        kept, dropped = ranked[:count], ranked[count:]
        if not self.recycle:
            return kept
        num_recycled = min(len(dropped), int(self.recycle_ratio * len(dropped)) + 1)
        num_clusters = min(num_recycled, int(self.cluster_ratio * num_recycled) + 1)
        recycled = dropped[:num_recycled].sort().values
        hidden = view.hidden_states()
        centres, merged = merge_clusters(hidden[recycled], num_clusters)
        view.tally.product(num_clusters, num_recycled, hidden.shape[1])
        features = torch.cat([hidden[kept], merged.to(hidden.dtype)])
        return Keep(torch.cat([kept, recycled[centres]]), features)


@dataclass(frozen=True, kw_only=True)
class SparseVLMPlus(_RatedByText):
    """SparseVLM+ (version 2.0, 11 Dec 2025): corrected attention of a few heads, no recycling.

    Attention is divided by what RoPE alone gives a pair of tokens at that distance (section 4.2),
    then the heads whose raters attend to the image most are taken (section 4.3).
    """

    about: ClassVar[About] = About(
        paper="SparseVLM+ (SparseVLM 2.0), 2025, arXiv 2410.04417",
        budget_note="the published counts 300, 200, 118 for 192 of 576 tokens, in proportion: "
        "after the three stages 1.563, 1.042 and 0.615 of retain_ratio stay (1/3 is that table; 1 "
        "prunes nothing)",
        count="own",
        deviations=(
            "Other published budgets (128, 96, 64) have tables that are not in proportion to each "
            "other; here there is one.",
            "The RoPE weight is never below that of one pair of dimensions in phase. Only far "
            "pairs meet this bound (with heads of 128 and base 10,000: 1,479 tokens apart); the "
            "released code divides by values near or below zero there.",
        ),
    )
    published_counts: ClassVar[tuple[int, ...]] = (300, 200, 118)

    num_heads: int = option(14, "Heads that rate; all heads if the model has fewer.", low=1)

    def choose(self, view: LayerView, count: int) -> Tensor:
        """Return the best patch tokens by corrected attention."""
        patches, rows = view.patches, raters(view)
        attention = view.attention(rows)[:, :, patches]  # (H, R, P)
        weights = rope_weights(len(view.prompt.kinds), view.decoder.rope_frequencies)
        positions = view.prompt.positions
        distance = positions[rows][:, None] - positions[patches]  # (R, P)
        attention = attention / weights.to(attention)[distance.abs()]
        heads = top(attention.sum(dim=(1, 2)), self.num_heads)
        return patches[top(attention[heads].mean(dim=(0, 1)), count)]


def raters(view: LayerView) -> Tensor:
    """Return (R,) positions of the text tokens that match the image more than the mean does.

    Every patch token spreads one vote over the text after the first image, by the softmax of the
    dot products of their input embeddings. Where all match alike, the last token rates. With
    several images, text between them rates only those before it, because attention is causal.
    """
    text = (view.prompt.kinds == TokenType.TEXT).nonzero()[:, 0]
    embeds = view.prompt.embeds().float()
    patches = embeds[view.prompt.kinds == TokenType.VISUAL]  # (P, D)
    votes = (patches @ embeds[text].T).softmax(dim=1)  # (P, T)
    view.tally.product(*patches.shape, len(text))
    match = votes.mean(dim=0)
    rows = torch.isin(view.prompt.positions, text[match > match.mean()]).nonzero()[:, 0]
    return rows if len(rows) else view.last_row


def rope_weights(num_distances: int, frequencies: Tensor) -> Tensor:
    """Return (num_distances,) float64: scaled products of two vectors of ones, rotated by RoPE.

    The product is ``2 * sum(cos(distance * frequency)) / sqrt(E)`` over the E / 2 frequencies. Far
    apart it falls to zero and below; here not below what one pair in phase gives.
    """
    distances = torch.arange(num_distances, dtype=torch.float64)
    cosines = (distances[:, None] * frequencies.double().cpu()).cos()  # (num_distances, E / 2)
    return 2 * cosines.sum(dim=1).clamp_min(1.0) / math.sqrt(2 * len(frequencies))


def merge_clusters(states: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Cluster tokens around their density peaks, and return the centres and the means.

    A token is a centre when its neighbourhood is dense and the next denser token is far (DPC-KNN).
    The product of both is compared as a sum of logarithms, which cannot underflow.

    Args:
        states: (M, D).
        count: C, from 1 to M; also how many neighbours, itself included, make a neighbourhood.

    Returns:
        (C,) indices of the centres, and the (C, D) float32 mean of each cluster.
    """
    check_finite(states)
    states = states.float()
    centred = states - states.mean(dim=0)  # distances near zero lose less
    distance = torch.cdist(centred, centred).fill_diagonal_(0.0) / states.shape[1] ** 0.5
    log_density = -distance.topk(count, largest=False).values.square().mean(dim=1)  # (M,)
    index = torch.arange(len(states), device=states.device)
    theirs, own = log_density, log_density[:, None]
    denser = (theirs > own) | ((theirs == own) & (index < index[:, None]))  # (M, M)
    separation = distance.where(denser, distance.max()).amin(dim=1)
    centres = top(separation.log() + log_density, count)
    owner = distance[:, centres].argmin(dim=1)  # (M,)
    owner[centres] = index[:count]
    members = torch.nn.functional.one_hot(owner, count).T.float()  # (C, M)
    return centres, members @ states / members.sum(dim=1, keepdim=True)
