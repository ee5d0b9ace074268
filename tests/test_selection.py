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


PATHS: dict[str, dict[str, Any]] = {
    "one by one": {"MIN_FEATURES": 2**62},
    "ahead": {"MIN_FEATURES": 0, "COLUMNS_AT_A_TIME": 8},
    "forgetful": {"MIN_FEATURES": 0, "COLUMNS_AT_A_TIME": 3, "MAX_COSINES": 0},
    "without oneDNN": {"MIN_FEATURES": 0, "torch.backends.mkldnn.is_available": lambda: False},
}
FUSED = ["fused", "fused in blocks"]
ALL_PATHS = [*PATHS, *FUSED]


def pick(features: Tensor, budget: int, first: int, objective: Any, path: str) -> list[int]:
    """Pick by one of the ways to do it, whichever would be fastest."""
    with pytest.MonkeyPatch.context() as patch:
        if path in FUSED:
            fused = pytest.importorskip("llava_todre.selection_triton")
            patch.setattr(selection, "_runs_fused", lambda _: True)
            if path == "fused in blocks":
                patch.setattr(fused, "MAX_COSINES", 0)
                patch.setattr(fused, "SCORES_AT_A_TIME", 8)
            features = features.to("cuda" if torch.cuda.is_available() else "cpu")
        for name, value in PATHS.get(path, {}).items():
            patch.setattr(f"llava_todre.selection.{name}", value)
        return greedy_diverse(features, budget, first, objective).tolist()


@pytest.mark.parametrize("path", ALL_PATHS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@settings(max_examples=30, deadline=None)
@given(features=EXACT_FEATURES, data=st.data())
def test_equals_the_algorithm_of_the_paper(objective, path, features, data):
    num_tokens = len(features)
    budget = data.draw(st.integers(1, num_tokens))
    first = data.draw(st.integers(0, num_tokens - 1))
    picked = pick(features, budget, first, objective, path)
    assert picked == reference.greedy_diverse(features, budget, first, objective)


@pytest.mark.parametrize(
    ("num_tokens", "budget", "path"),
    [(576, 58, path) for path in [*PATHS, "fused"]]
    + [(200, 40, "fused in blocks")]  # without a GPU it is interpreted, block by block
    + [(577, 144, path) for path in PATHS]
    + [(2880, 288, path) for path in ("one by one", "ahead")],
)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_pick_is_the_best_one_in_float64(objective, num_tokens, budget, path):
    features = random_features(num_tokens)
    picked = pick(features, budget, 7, objective, path)
    assert picked[0] == 7
    assert len(picked) == len(set(picked)) == budget
    assert max(reference.greedy_gaps(features, picked, objective)) == 0.0


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_near_duplicates_cost_no_more_than_the_rounding_of_float32(objective, path, draw):
    centres = torch.randn(12, 64, generator=draw)
    features = centres.repeat(48, 1) + 1e-3 * torch.randn(576, 64, generator=draw)
    picked = pick(features, 144, 7, objective, path)
    assert len(set(picked)) == 144
    rounding = 1e-6 * (144 if objective == "max_sum" else 1)
    assert max(reference.greedy_gaps(features, picked, objective)) <= rounding


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


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_equal_tokens_take_their_turns_in_the_order_of_their_index(objective, path, draw):
    """Also where a product rounds the same sum in two ways, as MKL's do for 37 rows on AMD."""
    tokens = random_features(12, width=4096)
    for _ in range(10):
        kinds = torch.arange(37)[torch.randperm(37, generator=draw)] % 12
        picked = pick(tokens[kinds], 37, 5, objective, path)
        assert sorted(picked) == list(range(37))
        for kind in range(12):
            turns = [place for place in picked[1:] if kinds[place] == kind]
            assert turns == sorted(turns)


@pytest.mark.parametrize("path", ALL_PATHS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_duplicates_wait_for_all_others(objective, path):
    kinds = 16 if path in FUSED else 40
    picked = pick(random_features(kinds).repeat(3, 1), 3 * kinds, 5, objective, path)
    assert len(set(picked)) == 3 * kinds
    if objective == "max_min":
        assert sorted(token % kinds for token in picked[:kinds]) == list(range(kinds))


def test_rows_that_share_their_ends_are_not_equal(draw):
    features = random_features(40)
    features[:, [0, -1]] = torch.tensor([0.5, -0.0])
    features = features.repeat(2, 1)
    features[60:, -1] = 0.0
    picked = pick(features, 30, 5, "max_min", "one by one")
    assert max(reference.greedy_gaps(features, picked, "max_min")) < 1e-7
    assert picked[1:] == [token % 40 for token in picked[1:]]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_equal_tokens_are_picked_in_order(objective):
    assert greedy_diverse(torch.ones(6, 4), 6, 2, objective).tolist() == [2, 0, 1, 3, 4, 5]
    assert greedy_diverse(torch.zeros(6, 4), 6, 2, objective).tolist() == [2, 0, 1, 3, 4, 5]


def test_large_features_are_multiplied_some_columns_ahead(monkeypatch):
    """The fast way is taken, and reads few more columns than it needs."""
    features = random_features(1024, width=4096)
    asked: list[int] = []
    columns = selection._Cosines.columns
    monkeypatch.setattr(
        selection._Cosines, "columns", lambda self, t: asked.append(len(t)) or columns(self, t)
    )
    picked = greedy_diverse(features, 300, 3, "max_sum").tolist()
    assert 10 <= len(asked) <= 15 and set(asked) == {selection.COLUMNS_AT_A_TIME}
    assert picked == pick(features, 300, 3, "max_sum", "one by one")


@pytest.mark.parametrize("path", PATHS)
def test_autocast_does_not_make_the_cosines_coarser(path):
    features = random_features(300)
    expected = pick(features, 100, 3, "max_sum", path)
    with torch.autocast("cpu", torch.bfloat16):
        assert pick(features, 100, 3, "max_sum", path) == expected


def test_features_that_need_a_gradient_can_be_selected_from():
    features = random_features(50)
    picked = greedy_diverse(features, 20, 3, "max_sum")
    for path in ("one by one", "ahead"):
        assert pick(features.requires_grad_(), 20, 3, "max_sum", path) == picked.tolist()


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
