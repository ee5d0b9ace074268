"""ToDRE (arXiv 2505.18757): diverse tokens first, then none once text stops attending to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from llava_todre.pruners.base import About, LayerView, Needs, Pruner, option
from llava_todre.selection import Objective, greedy_diverse_batch, unit_rows
from llava_todre.spans import TokenType, VisualTokens

Pivot = Literal["cls", "random", "nearest", "farthest"]
Similarity = Literal["raw", "centred"]
ClsHeads = Literal["mean", "unsplit"]
TextSet = Literal["after_image", "all"]


@dataclass(frozen=True, kw_only=True)
class Todre(Pruner):
    """ToDRE as in version 2 of the paper (19 Nov 2025).

    Stage 1 keeps a diverse subset, grown greedily from a pivot token by cosine similarity in the
    embedding space of the decoder (section 4.1, Algorithm 1). Stage 2 measures the attention
    between text and visual tokens after the probe layers and withdraws all visual tokens from the
    following layer on once both shares are below ``tau`` (section 4.2, Eq. 8). Where the paper is
    silent: kept tokens stay in reading order, probe layers are ``floor(depth * layers)`` counted
    from 0, and T is the text after the first visual token.
    """

    about: ClassVar[About] = About(
        paper="ToDRE v2, arXiv 2505.18757v2",
        budget_note="k = share of the patch tokens of an image, thumbnail and crops together; "
        "published: 25 and 10 %",
        deviations=(
            "No code is public; every choice the paper leaves open is an option.",
            "Eq. 3 knows no heads: read literally, queries and keys of all heads are one, divided "
            "by sqrt(d), which is cls_heads = unsplit. The default is the mean over heads, as "
            "every baseline takes [CLS] attention. On the bundled model the first token differs "
            "on 20 of 32 pictures, and 96 % of 32 kept tokens are the same.",
        ),
    )

    objective: Objective = option(
        "max_sum",
        "Greedy rule of Stage 1: `max_sum` (v2) or `max_min` (k-center, v1).",
        choices=get_args(Objective),
    )
    pivot: Pivot = option(
        "cls",
        "First token: the one [CLS] attends to most, `random` (the paper's choice for encoders "
        "without [CLS]), or the one `nearest` to or `farthest` from the mean direction of all "
        "(the paper's ablation).",
        choices=get_args(Pivot),
    )
    similarity: Similarity = option(
        "raw",
        "Cosine of the features as they are, or `centred`: after their mean is taken away, which "
        "spreads a cloud that lies on one side of the origin.",
        choices=get_args(Similarity),
    )
    cls_layer: int = option(
        -1,
        "Vision layer of the [CLS] attention: -1 is the last (paper), -2 is what LLaVA reads its "
        "features from.",
    )
    cls_heads: ClsHeads = option(
        "mean",
        "How the heads of that attention make one number: the `mean` of their softmaxes, or "
        "`unsplit`, one softmax over all of them taken as one head (Eq. 3 to the letter).",
        choices=get_args(ClsHeads),
    )
    probe_depths: tuple[float, ...] = option(
        (7 / 8,),
        "Depths at which Stage 2 measures, after the layers floor(depth * layers); an empty list "
        "switches it off.",
        above=0,
        high=1,
    )
    tau: float = option(0.10, "Threshold on both attention shares of Eq. 8.", low=0, high=1)
    text_set: TextSet = option(
        "after_image",
        "The set T of Eq. 8: text after the first visual token, or `all` text including the "
        "system prompt.",
        choices=get_args(TextSet),
    )
    seed: int = option(0, "For pivot = random.")

    @property
    def needs(self) -> Needs:
        """[CLS] attention, when it chooses the pivot."""
        name = "cls_attention_unsplit" if self.cls_heads == "unsplit" else "cls_attention"
        return {(name, self.cls_layer)} if self.pivot == "cls" else set()

    @property
    def withdraws_all(self) -> bool:
        """Unless the system prompt counts as text."""
        return self.text_set == "after_image"

    def select(self, tokens: VisualTokens, num_keep: int) -> Tensor:
        """Stage 1: grow a diverse set from the pivot."""
        return self.select_all([tokens], [num_keep])[0]

    def select_all(
        self, images: Sequence[VisualTokens], num_keeps: Sequence[int]
    ) -> Sequence[Tensor]:
        """Stage 1 of several images, at the same time on a GPU."""
        features = [tokens.features for tokens in images]
        if self.similarity == "centred":
            features = [rows.float() - rows.float().mean(dim=0) for rows in features]
        pivots = [self.pivot_index(tokens) for tokens in images]
        return greedy_diverse_batch(features, num_keeps, pivots, self.objective)

    def pivot_index(self, tokens: VisualTokens) -> int:
        """Return the best token of the thumbnail (AnyRes), of the image, or of all frames."""
        if self.pivot == "random":
            draw = torch.Generator().manual_seed(self.seed)
            return int(torch.randint(len(tokens), (), generator=draw))
        if self.pivot == "cls":
            (need,) = self.needs
            score = tokens[need]
        else:
            rows = unit_rows(tokens.features)
            closeness = rows @ torch.nn.functional.normalize(rows.mean(dim=0), dim=0)
            score = closeness if self.pivot == "nearest" else -closeness
        if not tokens.is_video:
            score = score.masked_fill(tokens.view != 0, -torch.inf)
        return int(score.argmax())

    def at_layer(self, view: LayerView) -> Tensor | None:
        """Stage 2: withdraw all visual tokens when neither side attends to the other."""
        visual = view.visual
        if not bool(visual.any()) or bool(visual[-1]):
            return None  # a prompt that ends with an image: its last token predicts the answer
        text = ~visual if self.text_set == "all" else view.kinds == TokenType.TEXT
        return view.patches[:0] if max(view.attention_ratios(text)) < self.tau else None


@dataclass(frozen=True, kw_only=True)
class TodreV1(Todre):
    """ToDRE as in version 1 of the paper (24 May 2025): greedy k-center, four probe layers."""

    about: ClassVar[About] = dataclasses.replace(Todre.about, paper="ToDRE v1, arXiv 2505.18757v1")

    objective: Objective = "max_min"
    probe_depths: tuple[float, ...] = (4 / 8, 5 / 8, 6 / 8, 7 / 8)
    tau: float = 0.03
