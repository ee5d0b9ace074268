"""LLaVA-PruMerge (arXiv 2403.15388): the tokens [CLS] attends to, each with its neighbours added.

Symbols: N tokens, n tokens of one view, T tokens it keeps, k of them chosen, W width of the vision
    tower.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava_todre.pruners.base import About, Count, Keep, Pruner, option, round_half_up, top
from llava_todre.pruners.per_view import by_view, view_groups
from llava_todre.selection import check_finite, unit_rows
from llava_todre.spans import VisualTokens


@dataclass(frozen=True, kw_only=True)
class PruMerge(Pruner):
    """Keep the patches [CLS] attends to most and merge others into them, before the projector.

    In each view, or frame, a kept token becomes itself plus the sum of its ``num_merged`` most
    similar tokens (by their keys, kept or not), each times its attention. One more token holds the
    sum of all dropped tokens, each times its attention. A view that may keep one token only has no
    such extra.
    """

    about: ClassVar[About] = About(
        paper="LLaVA-PruMerge, ICCV 2025, arXiv 2403.15388",
        budget_note="per view T = its share: T - 1 tokens by attention and one for the dropped; "
        "adaptive = true keeps the paper's own count instead, where the budget drops any token",
        deviations=(
            "The release sends kept tokens by falling attention, then the extra one; here all are "
            "in position order, the extra one in the place of the dropped token with the highest "
            "attention.",
            "The release is for LLaVA-1.5 only; with crops or frames each view is merged alone, "
            "and adaptive = true counts the outliers of all views together, at least one.",
            "The paper also tunes the model with LoRA; this is the training-free method.",
        ),
    )
    reads = ("cls_attention_unsplit", "keys", "vision_features")

    adaptive: bool = option(
        False,
        "Keep the paper's own count instead of the budget: as many tokens as there are outliers "
        "of the attention (above the third quartile by 1.5 times the interquartile range), "
        "divided by `attention_share`, and one per view for the dropped.",
    )
    attention_share: float = option(
        1.0,
        "Share of the kept tokens chosen by attention, at least one; the rest are spaced evenly.",
        above=0,
        high=1,
    )
    num_merged: int = option(32, "How many similar tokens are added to each kept one.", low=0)
    cls_layer: int = option(
        -1, "Vision layer of the [CLS] attention and of the keys; heads are not split."
    )

    @property
    def count(self) -> Count:
        """Exact, unless the paper's own count is kept."""
        return "own" if self.adaptive else self.about.count

    def select(self, tokens: VisualTokens, num_keep: int) -> Keep:
        """Merge view by view, then project what stays."""
        states = tokens["vision_features"]
        check_finite(states)
        attention = tokens["cls_attention_unsplit", self.cls_layer].float()
        keys = unit_rows(tokens["keys", self.cls_layer].flatten(1))
        if self.adaptive:
            num_keep = min(len(tokens), self.own_count(attention) + len(view_groups(tokens)))

        places, merged = [], []
        for group, share in by_view(tokens, num_keep):
            place = self.choose(attention[group], share)
            weights = self.neighbours(attention[group], keys[group], place)  # (k, n)
            if len(place) < share:
                dropped = attention[group].index_fill(0, place, 0.0)
                first = top(attention[group].index_fill(0, place, -torch.inf), 1)
                place, weights = torch.cat([place, first]), torch.cat([weights, dropped[None]])
            places.append(group[place])
            merged.append((weights @ states[group].float()).to(states.dtype))  # (T, W)
        indices, order = torch.cat(places).sort()
        return Keep(indices, tokens["project"](torch.cat(merged)[order]))

    def own_count(self, attention: Tensor) -> int:
        """Return how many tokens the paper keeps of an image with ``attention`` (N,)."""
        low, high = attention.quantile(attention.new_tensor([0.25, 0.75]))
        outliers = int((attention > high + 1.5 * (high - low)).sum())
        return round_half_up(max(1, outliers) / self.attention_share)

    def choose(self, attention: Tensor, share: int) -> Tensor:
        """Return the tokens of a view that stay, by attention (n,) and evenly spaced: (k,)."""
        count = max(1, share - 1)
        num_top = min(count, max(1, round_half_up(share * self.attention_share)))
        best = top(attention, num_top)
        others = torch.ones_like(attention).index_fill(0, best, 0.0).nonzero()[:, 0]
        steps = 2 * torch.arange(count - num_top, device=others.device) + 1
        return torch.cat([best, others[steps * len(others) // max(1, 2 * len(steps))]])

    def neighbours(self, attention: Tensor, keys: Tensor, kept: Tensor) -> Tensor:
        """Return (k, n) the weights of all tokens of a view in each of the ``kept`` (k,)."""
        similarity = keys[kept] @ keys.T
        similarity.scatter_(1, kept[:, None], -torch.inf)
        nearest = similarity.argsort(dim=1, descending=True, stable=True)[:, : self.num_merged]
        weights = torch.zeros_like(similarity).scatter_(1, nearest, attention[nearest])
        return weights.scatter_(1, kept[:, None], 1.0)


@dataclass(frozen=True, kw_only=True)
class PruMergePlus(PruMerge):
    """PruMerge+: three quarters of the tokens are spaced evenly over those not yet chosen."""

    about: ClassVar[About] = dataclasses.replace(
        PruMerge.about,
        paper="LLaVA-PruMerge+, ICCV 2025, arXiv 2403.15388",
        budget_note="per view T = its share: a quarter by attention, one for the dropped, the rest "
        "evenly spaced (published means: 32 tokens without, 144 with the spaced ones); "
        "adaptive = true keeps the paper's own count instead, where the budget drops any token",
        deviations=(
            *PruMerge.about.deviations,
            "In the release the number of spaced tokens follows from the number by attention, "
            "about three times as many, and it fails when the latter is above a third of all. Its "
            "branch for a fixed budget takes half by attention (attention_share = 0.5), keeps some "
            "tokens twice and fails for most budgets.",
        ),
    )

    attention_share: float = 0.25
