"""VisPruner (arXiv 2412.01818v2): tokens important to [CLS], and distinct ones among the rest.

Symbols: n tokens of one view, R of them still in question, W width of the vision tower.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava_todre.pruners.base import About, Pruner, option, top
from llava_todre.pruners.per_view import by_view
from llava_todre.selection import unit_rows
from llava_todre.spans import VisualTokens

REMOVED_PER_ROUND = 8


@dataclass(frozen=True, kw_only=True)
class VisPruner(Pruner):
    """Treat each view, or each frame of a video, by itself.

    The most attended tokens stay as important ones. Of the rest, near duplicates are removed in
    rounds until the budget is met; similarity is the cosine before the projector.
    """

    about: ClassVar[About] = About(
        paper="VisPruner, ICCV 2025, arXiv 2412.01818v2",
        budget_note="k tokens of the image, shared among its views in proportion to their size; "
        "published: 192, 128 and 64 of 576",
        deviations=(
            "The released code never unpads and gives every view the same number.",
            "It stops with an error at most odd numbers of residual tokens, and where a round "
            "would remove more than half of them; here the rule goes on, with the odd one among "
            "those that may go.",
            "Rounding decides near-ties, and each round builds on the last, so other hardware or "
            "another precision can keep clearly different tokens.",
            "Videos, which the released code does not treat, are pruned frame by frame.",
        ),
    )
    reads = ("cls_attention", "vision_features")

    important_ratio: float = option(
        0.5,
        "Share of the kept tokens chosen by [CLS] attention; the rest are distinct ones.",
        low=0,
        high=1,
    )
    cls_layer: int = option(
        -2, "Vision layer of the [CLS] attention: -2 is the one LLaVA reads its features from."
    )

    def select(self, tokens: VisualTokens, num_keep: int) -> Tensor:
        """Keep the important and the distinct tokens of each view."""
        attention = tokens["cls_attention", self.cls_layer]
        rows = unit_rows(tokens["vision_features"])  # (N, W)
        kept = []
        for group, share in by_view(tokens, num_keep):
            order = group[top(attention[group], len(group))]
            num_important = int(share * self.important_ratio)
            important, residual = order[:num_important], order[num_important:]
            kept += [important, residual[_distinct(rows[residual], share - num_important)]]
        return torch.cat(kept)


def _distinct(rows: Tensor, count: int) -> Tensor:
    """Return (count,) indices of ``rows`` (R, W), unit vectors, after removing near duplicates.

    Each round splits the list into its even and its odd places and removes the 8 (at the end:
    fewer) even ones that come closest to an odd one. The other even ones, closest first, and then
    the odd ones make up the list of the next round.
    """
    left = torch.arange(len(rows), device=rows.device)
    if count == 0:
        return left[:0]
    gram = rows @ rows.T  # (R, R)
    while len(left) > count:
        even, odd = left[::2], left[1::2]
        closeness = gram[even[:, None], odd].amax(dim=1)
        num_removed = min(REMOVED_PER_ROUND, len(left) - count)
        left = torch.cat([even[top(closeness, len(even))[num_removed:]], odd])
    return left
