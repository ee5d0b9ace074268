"""The greedy kernel against the papers' algorithms, written as plain loops in float64."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llava_todre import selection
from llava_todre.errors import TodreError
from llava_todre.selection import greedy_diverse, unit_rows

OBJECTIVES = ("max_sum", "max_min")

# Signs in 16 dimensions have length 4, axes length 1: every cosine and every sum of cosines is
# exact in float32 as in float64, so equal scores are equal in both and the tie rule decides.
SIGNS = st.lists(st.sampled_from([-1.0, 1.0]), min_size=16, max_size=16)
AXES = st.tuples(st.integers(0, 15), st.sampled_from([-1.0, 1.0])).map(
    lambda axis: [axis[1] if i == axis[0] else 0.0 for i in range(16)]
)
ZEROS = st.just([0.0] * 16)
EXACT_FEATURES = st.lists(SIGNS | AXES | ZEROS, min_size=1, max_size=20).map(torch.tensor)


def random_features(num_tokens: int, width: int = 64, seed: int = 0) -> Tensor:
    """Gaussian tokens around a common mean, as projected features are."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(width, generator=generator)
    return torch.randn(num_tokens, width, generator=generator) + 0.5 * mean


def pick(features: Tensor, budget: int, first: int, objective: Any, gram: bool) -> list[int]:
    """Pick by one similarity matrix or column by column, whichever would be faster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "_gram_pays", lambda *_: gram)
        return greedy_diverse(features, budget, first, objective).tolist()


@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize("objective", OBJECTIVES)
@settings(max_examples=50, deadline=None)
@given(features=EXACT_FEATURES, data=st.data())
def test_equals_the_algorithm_of_the_paper(objective, gram, features, data):
    num_tokens = len(features)
    budget = data.draw(st.integers(1, num_tokens))
    first = data.draw(st.integers(0, num_tokens - 1))
    picked = pick(features, budget, first, objective, gram)
    assert picked == reference.greedy_diverse(features, budget, first, objective)


@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("num_tokens", "budget"), [(576, 58), (576, 144), (2880, 288)])
def test_every_pick_is_the_best_one_in_float64(objective, num_tokens, budget, gram):
    features = random_features(num_tokens)
    picked = pick(features, budget, 7, objective, gram)
    assert picked[0] == 7
    assert len(picked) == len(set(picked)) == budget
    assert max(reference.greedy_gaps(features, picked, objective)) == 0.0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_rules_give_two_selections(objective):
    """The oracles above would not notice if both names meant the same rule on easy data."""
    features = random_features(576)
    other = OBJECTIVES[1 - OBJECTIVES.index(objective)]
    picked = greedy_diverse(features, 58, 0, objective).tolist()
    assert max(reference.greedy_gaps(features, picked, other)) > 0.01


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_all_tokens_are_a_permutation(objective):
    picked = greedy_diverse(random_features(50), 50, 49, objective)
    assert picked.dtype == torch.int64
    assert sorted(picked.tolist()) == list(range(50))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_type_is_compared_in_float32(objective, dtype):
    features = random_features(100).to(dtype)
    picked = greedy_diverse(features, 20, 3, objective)
    assert torch.equal(picked, greedy_diverse(features.float(), 20, 3, objective))
    assert torch.equal(picked, greedy_diverse(features, 20, 3, objective)), "deterministic"


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_scaling_a_token_by_a_power_of_two_changes_nothing(objective, draw):
    features = random_features(100)
    scales = 2.0 ** torch.randint(-30, 30, (100, 1), generator=draw)
    picked = greedy_diverse(features, 40, 3, objective)
    assert torch.equal(picked, greedy_diverse(features * scales, 40, 3, objective))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_scaling_a_token_changes_nothing(objective, draw):
    features = random_features(100)
    scales = 0.1 + 10 * torch.rand(100, 1, generator=draw)
    picked = greedy_diverse(features, 40, 3, objective)
    assert torch.equal(picked, greedy_diverse(features * scales, 40, 3, objective))


@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_huge_and_tiny_features_keep_their_directions(magnitude):
    features = random_features(100)
    assert torch.isfinite(unit_rows(features * magnitude)).all()
    torch.testing.assert_close(unit_rows(features * magnitude), unit_rows(features))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_renaming_the_tokens_renames_the_picks(objective, draw):
    features = random_features(100)
    order = torch.randperm(100, generator=draw)
    first = int((order == 3).nonzero())
    picked = greedy_diverse(features, 40, 3, objective)
    assert torch.equal(picked, order[greedy_diverse(features[order], 40, first, objective)])


@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_duplicates_are_never_picked_twice_and_the_lowest_index_wins(objective, gram):
    features = random_features(40).repeat(3, 1)
    picked = pick(features, 120, 5, objective, gram)
    assert len(set(picked)) == 120
    rank = {token: step for step, token in enumerate(picked)}
    for token in range(40):
        assert rank[token] < rank[token + 40] < rank[token + 80]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_equal_tokens_are_picked_in_order(objective):
    assert greedy_diverse(torch.ones(6, 4), 6, 2, objective).tolist() == [2, 0, 1, 3, 4, 5]
    assert greedy_diverse(torch.zeros(6, 4), 6, 2, objective).tolist() == [2, 0, 1, 3, 4, 5]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_more_tokens_than_the_matrix_may_have_give_the_same_result(objective, monkeypatch):
    features = random_features(576)
    whole = greedy_diverse(features, 300, 3, objective)
    assert selection._gram_pays(features, 300)
    monkeypatch.setattr(selection, "MAX_GRAM_TOKENS", 575)
    assert not selection._gram_pays(features, 300)
    assert torch.equal(whole, greedy_diverse(features, 300, 3, objective))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_features_that_are_not_finite_are_an_error(bad):
    features = random_features(10)
    features[4, 2] = features[7, 0] = bad
    with pytest.raises(TodreError, match="2 of 10 visual tokens"):
        greedy_diverse(features, 3, 0, "max_sum")


@pytest.mark.parametrize(
    ("budget", "first", "objective", "message"),
    [
        (0, 0, "max_sum", "budget 0 .* 1 to 10"),
        (11, 0, "max_sum", "budget 11 .* 1 to 10"),
        (3, -1, "max_sum", "first -1 .* 0 to 9"),
        (3, 10, "max_sum", "first 10 .* 0 to 9"),
        (3, 0, "max_summ", "'max_summ' is unknown. Did you mean 'max_sum'"),
    ],
)
def test_values_out_of_range_are_named(budget, first, objective, message):
    with pytest.raises(TodreError, match=message):
        greedy_diverse(random_features(10), budget, first, objective)
