"""Sharing a budget among views."""

from __future__ import annotations

import pytest
import torch
from conftest import visual_tokens
from hypothesis import given
from hypothesis import strategies as st

from llava_todre.pruners.per_view import apportion, by_view, view_groups


@given(st.data())
def test_shares_are_spent_within_limits_and_in_proportion(data: st.DataObject) -> None:
    limits = data.draw(st.lists(st.integers(0, 50), min_size=1, max_size=8))
    total = data.draw(st.integers(0, sum(limits)))
    weights = [data.draw(st.floats(0, 100)) for _ in limits]
    shares = apportion(total, weights, limits)
    assert sum(shares) == total
    assert all(0 <= share <= limit for share, limit in zip(shares, limits, strict=True))
    if all(share < limit for share, limit in zip(shares, limits, strict=True)) and sum(weights):
        for share, weight in zip(shares, weights, strict=True):
            assert abs(share - total * weight / sum(weights)) < 1 + 1e-9


@pytest.mark.parametrize(
    ("total", "weights", "limits", "shares"),
    [
        (288, [576] * 5, [576] * 5, [58, 58, 58, 57, 57]),
        (720, [576] * 5, [576] * 5, [144] * 5),
        (1, [5, 5], [5, 5], [1, 0]),
        (10, [9, 1], [4, 8], [4, 6]),
        (4, [0, 0], [3, 6], [1, 3]),
        (7, [0, 0, 9], [3, 3, 3], [2, 2, 3]),
        (0, [1, 2], [1, 2], [0, 0]),
    ],
)
def test_shares_by_hand(
    total: int, weights: list[float], limits: list[int], shares: list[int]
) -> None:
    assert apportion(total, weights, limits) == shares


def test_views_are_found_although_crops_are_interleaved() -> None:
    tokens = visual_tokens(grid=(2, 2), side=6, padding=2)
    groups = view_groups(tokens)
    assert [len(group) for group in groups] == [36, 24, 24, 24, 24]
    assert torch.cat(groups).sort().values.tolist() == list(range(len(tokens)))
    for view, group in enumerate(groups):
        assert (tokens.view[group] == view).all() and (group.diff() > 0).all()
    shares = [(len(group), share) for group, share in by_view(tokens, 22)]
    assert shares == [(36, 6), (24, 4), (24, 4), (24, 4), (24, 4)]
    assert [share for _, share in by_view(tokens, 2)] == [1, 1]
