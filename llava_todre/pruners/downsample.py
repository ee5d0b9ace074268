"""Control: shrink the image itself and encode it again, with fewer patches.

Symbols: V views, N tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava_todre.pruners.base import About, Keep, Pruner
from llava_todre.spans import VisualTokens


@dataclass(frozen=True, kw_only=True)
class Downsample(Pruner):
    """Encode all views, or frames, again with the most patches the budget allows.

    The new grid is rows x columns in every view, nearly square, and coarse patches that lie in
    padding are left out. A coarse token stands in the place of the fine token nearest to the
    centre of its patch, of equally near ones the upper left one.
    """

    about: ClassVar[About] = About(
        paper="control",
        budget_note="the largest grid per view, |rows - columns| <= 1, with at most k tokens in "
        "all outside padding; if one per view is too many, the first k views keep theirs",
        count="at most",
        deviations=(
            "The views are encoded in full resolution as well, so the time of the vision tower is "
            "an upper bound.",
            "The position embeddings of the tower are interpolated to the smaller grid.",
        ),
    )

    reads = ("resized",)

    def select(self, tokens: VisualTokens, num_keep: int) -> Keep:
        """Choose the grid, encode, and leave out what lies in padding."""
        fine = fine_grid(tokens)
        side = fine.shape[1]
        grids = [
            (rows, columns)
            for rows in range(1, side + 1)
            for columns in (rows - 1, rows, rows + 1)
            if 0 < rows * columns <= side**2
        ]
        counts = {grid: int((places(fine, *grid) >= 0).sum()) for grid in grids}
        fitting = [grid for grid in grids if counts[grid] <= num_keep] or [(1, 1)]
        # Of rows x columns and columns x rows the one with more tokens, or else the wider one.
        rows, columns = max(fitting, key=lambda grid: (grid[0] * grid[1], counts[grid]))

        place = places(fine, rows, columns)
        present = place >= 0
        features = tokens["resized"](rows, columns)[: len(place)]
        features = features[present.to(features.device)][:num_keep]
        return Keep(place[present][:num_keep], features.to(tokens.features.dtype))


def fine_grid(tokens: VisualTokens) -> Tensor:
    """Return (V, side, side) int64 on the CPU, the token of each patch, -1 in padding.

    The side is that of view 0 (the thumbnail, the only view or the first frame), never cut.
    """
    view, row, column = tokens.view.cpu(), tokens.row.cpu(), tokens.column.cpu()
    side = 1 + int(row[view == 0].max())
    grid = torch.full((int(view.max()) + 1, side, side), -1)
    grid[view, row, column] = torch.arange(len(view))
    return grid


def places(fine: Tensor, rows: int, columns: int) -> Tensor:
    """Return (V, rows * columns) tokens of ``fine`` nearest to the centres of coarse patches."""
    side = fine.shape[1]

    def nearest(count: int) -> Tensor:
        """Return the patch at each of ``count`` centres, ((i + 1/2) side / count - 1/2) rounded."""
        return ((2 * torch.arange(count) + 1) * side - 1) // (2 * count)

    return fine[:, nearest(rows)][:, :, nearest(columns)].flatten(1)
