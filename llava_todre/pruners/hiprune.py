"""HiPrune (arXiv 2508.00553): objects from a middle vision layer, the rest from a deep one.

Symbols: N tokens of the image or video, n tokens of one view, A anchors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava_todre.pruners.base import About, Needs, Pruner, option, top
from llava_todre.pruners.per_view import by_view
from llava_todre.spans import VisualTokens


@dataclass(frozen=True, kw_only=True)
class HiPrune(Pruner):
    """Treat each view, or each frame of a video, by itself; needs no [CLS] token.

    A token's score in a layer is the attention it receives from all queries. Anchors score highest
    in the object layer, buffers are their neighbours, and registers, highest in a deep layer, fill
    the budget. With the default ``alpha`` a view that keeps 25 tokens or fewer has no anchor.
    """

    about: ClassVar[About] = About(
        paper="HiPrune, ACL 2026 Findings, arXiv 2508.00553",
        budget_note="k tokens of the image, shared among its views in proportion to their size; "
        "published: 192, 128 and 64 of 576",
        deviations=(
            "The object layer is given as a depth, so that it exists in any tower: 0.35 of 24 "
            "layers is the authors' ninth.",
            "The released code never unpads and gives every view the same number; here neighbours "
            "that unpadding removed are left out.",
            "Where anchors and buffers alone exceed the budget, the released code stops with an "
            "error; here anchors go first, then the neighbours of the best.",
            "Videos, which the code for LLaVA does not treat, are pruned frame by frame.",
        ),
    )

    alpha: float = option(
        0.1,
        "Share of the kept tokens meant for anchors and buffers; an anchor counts five.",
        low=0,
        high=1,
    )
    object_depth: float = option(
        0.35, "Object layer: floor(depth * layers) from 0; 0.35 of 24 is layer 8.", above=0, below=1
    )
    register_layer: int = option(
        -2,
        "Vision layer of the registers: -2 is the one LLaVA reads its features from (released "
        "code for LLaVA), -1 the last (released code for Qwen2.5-VL).",
    )

    @property
    def needs(self) -> Needs:
        """Attention received in the two layers."""
        return {("received_attention", at) for at in (self.object_depth, self.register_layer)}

    def select(self, tokens: VisualTokens, num_keep: int) -> Tensor:
        """Keep anchors, buffers and registers of each view."""
        objects = tokens["received_attention", self.object_depth]
        deep = tokens["received_attention", self.register_layer]
        columns, rows = int(tokens.column.max()) + 1, int(tokens.row.max()) + 1
        cell = tokens.row * columns + tokens.column  # (N,)
        kept = []
        for group, share in by_view(tokens, num_keep):
            anchors = top(objects[group], round(share * self.alpha / 5))
            buffers = _neighbours(anchors, cell[group], columns, columns * rows)
            wanted = torch.cat([anchors, buffers, top(deep[group], len(group))])
            kept.append(group[_first_distinct(wanted, len(group))[:share]])
        return torch.cat(kept)


def _neighbours(anchors: Tensor, cell: Tensor, columns: int, num_cells: int) -> Tensor:
    """Return the neighbours of ``anchors`` (A,): left, right, above, below, the best anchor first.

    As in the released code, the step is taken in the row-major index of the whole grid and cut off
    at its ends: the left of the first column is the end of the row above, and above the first row
    is the first patch.

    Args:
        anchors: indices into ``cell``.
        cell: (n,) row-major index of each token of a view in the grid.
        columns: of the grid.
        num_cells: of the grid, of which unpadding may have removed some.
    """
    index = cell.new_full((num_cells,), -1)
    index[cell] = torch.arange(len(cell), device=cell.device)
    steps = torch.tensor([-1, 1, -columns, columns], device=cell.device)
    found = index[(cell[anchors, None] + steps).clamp(0, num_cells - 1)].flatten()
    return found[found >= 0]


def _first_distinct(wanted: Tensor, num_tokens: int) -> Tensor:
    """Return (num_tokens,) the distinct values of ``wanted``, in order of their first place.

    Args:
        wanted: indices below ``num_tokens``, each at least once.
        num_tokens: number of distinct values.
    """
    places = torch.arange(len(wanted), device=wanted.device)
    first = places.new_full((num_tokens,), len(wanted)).scatter_reduce(0, wanted, places, "amin")
    return first.argsort()
