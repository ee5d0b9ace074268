"""Downsample: the grid it chooses, where coarse tokens stand, and what padding takes away."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from conftest import selected, visual_tokens
from slow import at_every_shape
from torch import Tensor

from llava_todre.pruners.downsample import Downsample
from llava_todre.spans import VisualTokens

THIN = {"grid": (2, 2), "side": 8, "padding": 7}
NARROW = {"grid": (1, 2), "side": 12, "padding": 3}


def nearest(side: int, count: int) -> list[int]:
    """Return the patches nearest to the centres of ``count`` equal parts of ``side`` patches."""
    # In units of 1 / (2 count) patches, so that all numbers are whole.
    return [
        min(range(side), key=lambda i: (abs((2 * i + 1) * count - (2 * part + 1) * side), i))
        for part in range(count)
    ]


def reference(tokens: VisualTokens, budget: int) -> tuple[list[int], list[Tensor]]:
    """Try every grid and return the places and the features of the best."""
    position = {}
    for i, key in enumerate(torch.stack([tokens.view, tokens.row, tokens.column], 1).tolist()):
        position[tuple(key)] = i
    side = 1 + max(row for view, row, _ in position if view == 0)
    best = None
    for rows in range(1, side + 1):
        for columns in range(1, side + 1):
            if abs(rows - columns) > 1:
                continue
            at_row, at_column = nearest(side, rows), nearest(side, columns)
            found = [
                (position[view, at_row[i], at_column[j]], (view, i * columns + j))
                for view in range(1 + max(view for view, _, _ in position))
                for i in range(rows)
                for j in range(columns)
                if (view, at_row[i], at_column[j]) in position
            ]
            rank = (rows * columns, len(found), columns)
            if len(found) <= budget and (best is None or rank > best[0]):
                best = rank, found, rows, columns
            if rows == columns == 1:
                smallest = found
    if best is None:
        best = None, smallest[:budget], 1, 1
    _, found, rows, columns = best
    features = tokens.resized(rows, columns)
    found.sort()
    return [place for place, _ in found], [features[where] for _, where in found]


def recorded(tokens: VisualTokens) -> tuple[VisualTokens, list[tuple[int, int]]]:
    """Return the tokens and a list of the grids that will have been wanted."""
    given = []

    def resized(rows: int, columns: int) -> Tensor:
        given.append((rows, columns))
        return tokens.resized(rows, columns)

    return dataclasses.replace(tokens, resized=resized), given


def assert_matches(tokens: VisualTokens, budget: int) -> None:
    selection = selected(Downsample(), tokens, budget)
    places, features = reference(tokens, budget)
    assert selection.indices.tolist() == places and 0 < len(places) <= budget
    assert torch.equal(selection.features, torch.stack(features))


@at_every_shape
def test_matches_a_search_of_all_grids(shape, ratio):
    tokens = visual_tokens(**shape)
    assert_matches(tokens, round(ratio * len(tokens)))


@pytest.mark.parametrize("shape", [THIN, NARROW, {"frames": 3, "side": 5}], ids=str)
def test_matches_the_search_at_every_budget(shape):
    tokens = visual_tokens(**shape)
    for budget in range(1, len(tokens), 7):
        assert_matches(tokens, budget)


@pytest.mark.parametrize("gone", [1, 4])
def test_views_of_which_padding_leaves_nothing_are_left_out(gone):
    whole = visual_tokens(grid=(2, 2), side=6)
    assert_matches(only(whole, (whole.view != gone).nonzero()[:, 0]), 16)


@pytest.mark.parametrize(
    ("budget", "grid", "kept"),
    [
        (1, (1, 1), [5]),
        (2, (1, 2), [4, 6]),
        (4, (2, 2), [0, 2, 8, 10]),
        (5, (2, 2), [0, 2, 8, 10]),
        (6, (2, 3), [0, 1, 3, 8, 9, 11]),  # wide rather than high
        (15, (3, 4), [0, 1, 2, 3, 4, 5, 6, 7, 12, 13, 14, 15]),
    ],
)
def test_a_small_image_shrinks_to_the_largest_grid_that_fits(budget, grid, kept):
    tokens, given = recorded(visual_tokens(side=4))
    selection = selected(Downsample(), tokens, budget)
    assert given == [grid]
    assert selection.indices.tolist() == kept
    assert torch.equal(selection.features, tokens.resized(*grid)[0])


def test_of_a_grid_and_its_transpose_the_one_with_more_tokens_outside_padding_wins():
    # 1 x 2 has its centres in row 1 of 4, 2 x 1 in rows 0 and 2; of view 1 only row 2 is there.
    whole = visual_tokens(grid=(1, 1), side=4)
    there = ((whole.view == 0) | (whole.row == 2)).nonzero()[:, 0]
    tokens, given = recorded(only(whole, there))
    selection = selected(Downsample(), tokens, 3)
    assert given == [(2, 1)]
    assert tokens.view[selection.indices].tolist() == [0, 0, 1]
    expected = tokens.resized(2, 1)
    assert torch.equal(selection.features, torch.stack([*expected[0], expected[1, 1]]))


def test_the_largest_grid_wins_even_if_a_smaller_one_has_more_tokens_outside_padding():
    # 3 x 2 has its centres in rows 0, 1 and 3, 2 x 2 in rows 0 and 2, the only one of both crops.
    whole = visual_tokens(grid=(2, 1), side=4)
    there = ((whole.view == 0) | (whole.row == 2)).nonzero()[:, 0]
    tokens, given = recorded(only(whole, there))
    assert len(selected(Downsample(), tokens, 8).indices) == 6
    assert given == [(3, 2)]


def only(tokens: VisualTokens, kept: Tensor) -> VisualTokens:
    """Return some of the tokens."""
    changed: dict[str, Any] = {
        name: getattr(tokens, name)[kept] for name in ("features", "view", "row", "column")
    }
    return dataclasses.replace(tokens, **changed)


def test_features_come_in_the_dtype_of_the_tokens():
    tokens = visual_tokens(side=6, dtype=torch.bfloat16)
    tokens = dataclasses.replace(tokens, resized=lambda r, c: torch.ones(1, r * c, 64))
    assert selected(Downsample(), tokens, 9).features.dtype == torch.bfloat16
