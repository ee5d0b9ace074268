"""DivPrune against a plain reference in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import selected, visual_tokens
from slow import at_every_shape, grid_of, kept, unit
from torch import Tensor

from llava_todre.pruners import divprune
from llava_todre.pruners.divprune import DivPrune, nearest_similarity
from llava_todre.pruners.todre import Todre
from llava_todre.spans import VisualTokens


def distances(features: Tensor) -> Tensor:
    """(N, N) one minus cosine, float64."""
    rows = unit(features)
    return 1 - rows @ rows.T


def slow_first(distance: Tensor) -> int:
    """The token whose second smallest distance (the smallest is its own) is largest."""
    isolation = [sorted(row)[1] for row in distance.tolist()]
    return isolation.index(max(isolation))


def worst_gap(distance: Tensor, picked: list[int]) -> float:
    """Replay the greedy rule inside ``picked``; how far its picks ever are from the best of all."""
    first = slow_first(distance)
    assert first in picked
    nearest, left, worst = distance[first].clone(), set(picked) - {first}, 0.0
    nearest[first] = -1.0
    while left:
        pick = max(left, key=lambda i: float(nearest[i]))
        worst = max(worst, float(nearest.max() - nearest[pick]))
        nearest = torch.minimum(nearest, distance[pick])
        nearest[pick] = -1.0
        left.remove(pick)
    return worst


def select(tokens: VisualTokens, budget: int) -> list[int]:
    return kept(DivPrune(), tokens, budget)


def hand_made(*features: list[float]) -> VisualTokens:
    return grid_of(1, len(features), features=torch.tensor(features))


@at_every_shape
def test_every_pick_is_the_farthest_one_in_float64(shape, ratio):
    tokens = visual_tokens(**shape)
    picked = select(tokens, round(ratio * len(tokens)))
    assert worst_gap(distances(tokens.features), picked) < 1e-5


def test_starts_with_the_most_isolated_token_and_then_takes_the_farthest():
    """Angles in degrees. The nearest others are 10, 10, 31, 29 and 29 away: 70 is first. Farthest
    from it is 0 (70 away), then 130 (60), then 101 (29; 10 has only 10)."""
    angles = torch.tensor([0.0, 10.0, 70.0, 101.0, 130.0]).deg2rad()
    tokens = hand_made(*torch.stack([angles.cos(), angles.sin()], dim=1).tolist())
    assert select(tokens, 1) == [2]
    assert select(tokens, 2) == [0, 2]
    assert select(tokens, 3) == [0, 2, 4]
    assert select(tokens, 4) == [0, 2, 3, 4]


def test_equal_isolation_goes_to_the_lowest_index():
    axes = torch.eye(4)
    assert select(hand_made(*axes.tolist()), 1) == [0]
    assert select(hand_made(*axes.tolist()), 3) == [0, 1, 2]


def test_duplicates_wait_until_all_distinct_tokens_are_kept():
    tokens = visual_tokens(side=4)
    features = tokens.features[torch.arange(16) % 5]
    picked = select(dataclasses.replace(tokens, features=features), 5)
    assert {i % 5 for i in picked} == set(range(5))


@pytest.mark.parametrize("rows_at_a_time", [1, 50, 144, 1000])
def test_blocks_of_rows_give_the_same_neighbours(monkeypatch, rows_at_a_time):
    features = visual_tokens(side=12).features
    monkeypatch.setattr(divprune, "ROWS_AT_A_TIME", rows_at_a_time)
    expected = 1 - distances(features).fill_diagonal_(torch.inf).amin(dim=1)
    torch.testing.assert_close(nearest_similarity(features).double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("budget", [*range(1, 41), 144, 575])
def test_is_the_rule_of_todre_v1_with_another_first_token(budget):
    """Equal sets for budgets 1, 2, 3... are equal picks."""
    tokens = visual_tokens()
    (first,) = select(tokens, 1)
    pivot = torch.zeros(len(tokens)).index_fill(0, torch.tensor(first), 1.0)
    tokens = dataclasses.replace(tokens, vision={("cls_attention", -1): pivot})
    todre = selected(Todre(objective="max_min"), tokens, budget)
    assert select(tokens, budget) == todre.indices.tolist()
