"""Uniform and Pooling: cells against a slow reference, their middles and means."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from conftest import selected, visual_tokens
from slow import at_every_shape, grid_of, groups, kept

from llava_todre.pruners.grid import Pooling, Uniform, cells, middles
from llava_todre.spans import VisualTokens


def reference(tokens: VisualTokens, budget: int) -> dict[int, list[int]]:
    """Return the tokens of each cell, by the one nearest to its centre."""
    row, column = tokens.row.tolist(), tokens.column.tolist()
    found = {}
    for members, share in groups(tokens, budget):
        rows = sorted({row[i] for i in members})
        columns = sorted({column[i] for i in members})
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
                cell = [
                    i for i in members if row[i] in band_rows and column[i] in columns[start:end]
                ]
                away = {
                    i: (row[i] - middle_row) ** 2 + (column[i] - middle_column) ** 2 for i in cell
                }
                found[min(cell, key=lambda i: (away[i], i))] = cell
    return found


@at_every_shape
def test_a_token_of_each_cell_stays_or_its_mean_in_that_place(shape, ratio):
    tokens = visual_tokens(**shape)
    budget = round(ratio * len(tokens))
    expected = reference(tokens, budget)
    assert kept(Uniform(), tokens, budget) == sorted(expected)
    pooled = selected(Pooling(), tokens, budget)
    assert pooled.indices.tolist() == sorted(expected)
    means = [tokens.features[expected[i]].double().mean(dim=0) for i in sorted(expected)]
    torch.testing.assert_close(pooled.features.double(), torch.stack(means), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "columns", "budget", "expected"),
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
def test_small_views_are_cut_as_by_hand(rows, columns, budget, expected):
    assert kept(Uniform(), grid_of(rows, columns), budget) == expected


def test_every_number_of_cells_of_every_rectangle_gives_full_rectangles():
    for height in range(1, 8):
        for width in range(1, 8):
            tokens = grid_of(height, width)
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
            place = torch.randperm(30, generator=generator)[:14].sort().values
            row, column = place // 6, place % 6
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


def test_four_cells_of_a_small_image_are_averaged_by_hand():
    selection = selected(Pooling(), grid_of(4, 4, features=torch.arange(16.0)[:, None]), 4)
    assert selection.indices.tolist() == [0, 2, 8, 10]
    assert selection.features.flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    alone = selected(Pooling(), grid_of(1, 3, features=torch.arange(3.0)[:, None]), 2)
    assert alone.features.flatten().tolist() == [0.5, 2.0]
