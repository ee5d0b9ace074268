"""Cutting a view into rectangles of about equal size, for the controls that keep an even grid.

Symbols: N tokens of the image, n tokens of one view, k cells of that view.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from llava_todre.pruners.base import round_half_up
from llava_todre.pruners.per_view import by_view
from llava_todre.spans import VisualTokens


def cut(tokens: VisualTokens, budget: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Cut every view into as many cells as its share of ``budget``; views without one are left out.

    Yields:
        (n,) the tokens of a view, (n,) the cell of each, (k,) the token in the middle of each cell.
    """
    for group, share in by_view(tokens, budget):
        row, column = tokens.row[group], tokens.column[group]
        cell = cells(row, column, share)
        yield group, cell, group[middles(row, column, cell)]


def cells(row: Tensor, column: Tensor, count: int) -> Tensor:
    """Return (n,) the cell of each token, from 0 to ``count`` - 1, none of them empty.

    The rectangle around the tokens is cut into bands of rows, as many as make square cells, and
    each band into cells, the floor or the ceiling of their mean number per band.

    Args:
        row: (n,) int64.
        column: (n,) int64; no two tokens agree in both.
        count: k, from 1 to n.
    """
    row, column = row - row.min(), column - column.min()
    rows, columns = int(row.max()) + 1, int(column.max()) + 1
    bands = round_half_up(math.sqrt(count * rows / columns))
    bands = min(max(bands, math.ceil(count / columns)), count)
    band = row * bands // rows
    first = band * count // bands
    cell = first + column * ((band + 1) * count // bands - first) // columns
    # Only a rectangle with holes leaves a cell empty: half of the fullest one fills it.
    for empty in (cell.bincount(minlength=count) == 0).nonzero()[:, 0].tolist():
        fullest = (cell == cell.bincount().argmax()).nonzero()[:, 0]
        cell[fullest[len(fullest) // 2 :]] = empty
    return cell


def middles(row: Tensor, column: Tensor, cell: Tensor) -> Tensor:
    """Return (k,) the token nearest to the centre of each cell, of equally near ones the first."""
    size = cell.bincount()

    def offset(place: Tensor) -> Tensor:
        """Return (n,) distances to the mean of the cell times its size: whole, so ties are ties."""
        total = torch.zeros_like(size).index_add(0, cell, place)
        return place * size[cell] - total[cell]

    nearest_first = (offset(row) ** 2 + offset(column) ** 2).argsort(stable=True)
    by_cell = nearest_first[cell[nearest_first].argsort(stable=True)]
    return by_cell[size.cumsum(0) - size]
