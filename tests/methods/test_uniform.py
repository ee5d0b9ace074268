"""Uniform: cells against a slow reference, middles, shapes and budgets."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from conftest import selected, visual_tokens
from slow import slow_shares

from llava_todre.pruners.grid import Uniform, cells, middles
from llava_todre.spans import VisualTokens

CASES = {
    "LLaVA-1.5": {},
    "AnyRes": {"grid": (2, 2), "side": 12},
    "padded": {"grid": (2, 2), "side": 12, "padding": 3},
    "wide": {"grid": (3, 1), "side": 12, "padding": 2},
    "video": {"frames": 5, "side": 12},
}


def reference(tokens: VisualTokens, budget: int) -> list[int]:
    """Cut each view, walk over its cells, and keep the patch nearest to the centre of each."""
    position = {}
    for i, key in enumerate(torch.stack([tokens.view, tokens.row, tokens.column], 1).tolist()):
        position[tuple(key)] = i
    views = sorted({view for view, _, _ in position})
    sizes = [sum(key[0] == view for key in position) for view in views]
    kept = []
    for view, share in zip(views, slow_shares(budget, sizes), strict=True):
        if share == 0:
            continue
        rows = sorted({row for v, row, _ in position if v == view})
        columns = sorted({column for v, _, column in position if v == view})
        height, width = len(rows), len(columns)
        bands = math.floor(math.sqrt(share * height / width) + 0.5)
        while bands * width < share:
            bands += 1
        bands = min(bands, height, share)
        for band in range(bands):
            in_band = share * (band + 1) // bands - share * band // bands
            band_rows = rows[-(-band * height // bands) : -(-(band + 1) * height // bands)]
            for j in range(in_band):
                start, end = -(-j * width // in_band), -(-(j + 1) * width // in_band)
                middle_row = Fraction(band_rows[0] + band_rows[-1], 2)
                middle_column = Fraction(columns[start] + columns[end - 1], 2)
                kept.append(
                    min(
                        (
                            (row - middle_row) ** 2 + (column - middle_column) ** 2,
                            position[view, row, column],
                        )
                        for row in band_rows
                        for column in columns[start:end]
                    )[1]
                )
    return sorted(kept)


def a_view(rows: int, columns: int) -> VisualTokens:
    """Return the tokens of one view of that shape."""
    index = torch.arange(rows * columns)
    return VisualTokens(
        features=torch.randn(rows * columns, 4),
        view=torch.zeros_like(index),
        row=index // columns,
        column=index % columns,
    )


@pytest.mark.parametrize("ratio", [0.25, 0.10, 0.6])
@pytest.mark.parametrize("case", CASES)
def test_keeps_what_the_slow_reference_keeps(case, ratio):
    tokens = visual_tokens(**CASES[case])
    budget = Uniform(retain_ratio=ratio).num_keep(len(tokens))
    selection = selected(Uniform(), tokens, budget)
    assert selection.features is None
    assert selection.indices.dtype == torch.int64
    assert selection.indices.tolist() == reference(tokens, budget)
    assert len(set(selection.indices.tolist())) == budget


@pytest.mark.parametrize(
    ("rows", "columns", "budget", "kept"),
    [
        (6, 6, 4, [7, 10, 25, 28]),  # four cells of 3 x 3
        (4, 4, 4, [0, 2, 8, 10]),  # no middle token in a cell of 2 x 2: the upper left one
        (4, 4, 3, [1, 8, 10]),  # a band of one cell over a band of two
        (3, 3, 1, [4]),
        (2, 6, 3, [0, 2, 4]),  # wide: one band of square cells
        (6, 2, 3, [0, 4, 8]),  # high: three bands
        (1, 8, 5, [0, 2, 4, 5, 7]),  # never more bands than rows
        (8, 1, 5, [0, 2, 4, 5, 7]),  # never more cells in a band than columns
        (2, 10, 11, [0, 2, 4, 6, 8, 10, 12, 14, 15, 17, 19]),  # one band could not hold 11 cells
        (3, 3, 8, [0, 2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_small_views_are_cut_as_by_hand(rows, columns, budget, kept):
    assert selected(Uniform(), a_view(rows, columns), budget).indices.tolist() == kept


def test_every_number_of_cells_of_every_rectangle_gives_full_rectangles():
    for height in range(1, 8):
        for width in range(1, 8):
            tokens = a_view(height, width)
            for count in range(1, height * width + 1):
                cell = cells(tokens.row + 3, tokens.column + 5, count)
                assert sorted(set(cell.tolist())) == list(range(count))
                for number in range(count):
                    row, column = tokens.row[cell == number], tokens.column[cell == number]
                    area = (row.max() - row.min() + 1) * (column.max() - column.min() + 1)
                    assert area == len(row)


def test_a_rectangle_with_holes_still_fills_every_cell():
    generator = torch.Generator().manual_seed(0)
    for count in range(1, 15):
        for _ in range(10):
            kept = torch.randperm(30, generator=generator)[:14].sort().values
            row, column = kept // 6, kept % 6
            cell = cells(row, column, count)
            assert sorted(set(cell.tolist())) == list(range(count))
            chosen = middles(row, column, cell)
            assert cell[chosen].tolist() == list(range(count))


@pytest.mark.parametrize(
    ("places", "nearest"),
    [
        ([(0, 0), (0, 1), (1, 1)], 1),  # the centre is (1/3, 2/3)
        ([(0, 2), (2, 1), (2, 3), (4, 2)], 1),  # at (2, 2): two are 2 away, two are 1 away
    ],
)
def test_the_middle_of_a_cell_with_holes_is_the_token_nearest_to_its_mean(places, nearest):
    row, column = torch.tensor(places).T
    assert middles(row, column, torch.zeros_like(row)).tolist() == [nearest]
