"""Controls: an even grid of tokens, as they are or averaged, whatever they show.

Symbols: N tokens of the image, n tokens of one view, k cells of that view.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from llava_todre.pruners.base import About, Keep, Pruner, round_half_up
from llava_todre.pruners.per_view import by_view
from llava_todre.selection import check_finite
from llava_todre.spans import VisualTokens

ABOUT = About(
    paper="control",
    budget_note="k tokens of the image, shared among its views in proportion to their size",
)


@dataclass(frozen=True, kw_only=True)
class Uniform(Pruner):
    """Cut each view, or frame, into as many rectangles as it may keep tokens; keep the middle ones.

    Where a rectangle has no middle token, the upper left one of those around its centre stays.
    """

    about: ClassVar[About] = ABOUT

    def select(self, tokens: VisualTokens, num_keep: int) -> Tensor:
        """Keep the token nearest to the centre of each cell."""
        return torch.cat([middle for _, _, middle in cut(tokens, num_keep)])


@dataclass(frozen=True, kw_only=True)
class Pooling(Pruner):
    """Cut each view, or frame, into as many rectangles as it may keep tokens; keep their means.

    Features are averaged after the projector. A mean stands where ``uniform`` keeps a token, so the
    two controls differ only in what stands there.
    """

    about: ClassVar[About] = ABOUT

    def select(self, tokens: VisualTokens, num_keep: int) -> Keep:
        """Put the mean of each cell in its middle."""
        check_finite(tokens.features)
        places, means = [], []
        for group, cell, middle in cut(tokens, num_keep):
            member = one_hot(cell, len(middle)).T.float()  # (k, n)
            sums = member @ tokens.features[group].float()
            places.append(middle)
            means.append(sums / member.sum(dim=1, keepdim=True))
        return Keep(torch.cat(places), torch.cat(means).to(tokens.features.dtype))


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
