"""HoloV against a plain reference."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import selected, visual_tokens
from torch import Tensor

from llava_todre.pruners.holov import HoloV
from llava_todre.spans import VisualTokens


def slow_run_score(attention: list[float], features: Tensor) -> float:
    """The released formula, in float64: attention per mill plus scaled variance of cosines."""
    count = len(attention)
    scaled = [1000 * value for value in attention]
    if count == 1:
        return scaled[0]
    rows = features / features.norm(dim=1, keepdim=True)
    cosines = (rows @ rows.T).tolist()
    variances = []
    for i in range(count):
        line = [0.0 if j == i else cosines[i][j] for j in range(count)]
        mean = math.fsum(line) / (count - 1)
        variances.append(math.fsum((value - mean) ** 2 for value in line) / (count - 1))
    scale = (math.fsum(scaled) / count) / (math.fsum(variances) / count + 1e-6)
    scores = [a + 0.09 * scale * v for a, v in zip(scaled, variances, strict=True)]
    return math.fsum(scores) / count


def slow_select(
    tokens: VisualTokens, budget: int, num_runs: int = 16, layer: int = -2
) -> list[int]:
    attention = tokens.vision["cls_attention", layer].double().tolist()
    features = tokens.features.double()
    count = len(tokens)
    runs, start = [], 0
    for number in range(num_runs):
        size = count // num_runs + (1 if number < count % num_runs else 0)
        if size:
            runs.append(range(start, start + size))
        start += size
    scores = [slow_run_score([attention[i] for i in run], features[run]) for run in runs]
    share = [0] * len(runs)
    while sum(share) < budget:
        rest = budget - sum(share)
        room = [r for r in range(len(runs)) if share[r] < len(runs[r])]
        total = math.fsum(scores[r] for r in room)
        extra = {r: int(rest * scores[r] / total) for r in room}
        left_over = rest - sum(extra.values())
        for r in sorted(room, key=lambda r: (-scores[r], r))[:left_over]:
            extra[r] += 1
        for r in room:
            share[r] = min(len(runs[r]), share[r] + extra[r])
    kept: list[int] = []
    for run, number in zip(runs, share, strict=True):
        kept += sorted(run, key=lambda i: (-attention[i], i))[:number]
    return sorted(kept)


SHAPES = [
    {},
    {"grid": (2, 2), "side": 12},
    {"grid": (2, 2), "side": 12, "padding": 3},
    {"frames": 5, "side": 12},
    {"dtype": torch.bfloat16},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ratio", [0.25, 0.10])
def test_it_keeps_what_the_slow_reference_keeps(shape: dict, ratio: float) -> None:
    tokens = visual_tokens(**shape)
    method = HoloV(retain_ratio=ratio)
    budget = method.num_keep(len(tokens))
    kept = selected(method, tokens, budget).indices
    assert kept.tolist() == slow_select(tokens, budget)
    assert kept.dtype == torch.int64


@pytest.mark.parametrize(("side", "budget"), [(3, 1), (3, 8), (4, 5), (5, 24), (5, 7)])
def test_runs_may_have_one_token_or_none(side: int, budget: int) -> None:
    tokens = visual_tokens(side=side)
    kept = selected(HoloV(), tokens, budget).indices.tolist()
    assert kept == slow_select(tokens, budget)
    assert len(set(kept)) == budget


@pytest.mark.parametrize("num_runs", [1, 5, 144, 1000])
def test_the_number_of_runs_is_a_knob(num_runs: int) -> None:
    tokens = visual_tokens(side=12)
    kept = selected(HoloV(num_runs=num_runs), tokens, 36).indices.tolist()
    assert kept == slow_select(tokens, 36, num_runs)


def planted(attention: list[float], features: Tensor | None = None) -> VisualTokens:
    """Tokens with this attention; all alike unless features are given."""
    count = len(attention)
    return VisualTokens(
        features=torch.ones(count, 4) if features is None else features,
        view=torch.zeros(count, dtype=torch.int64),
        row=torch.zeros(count, dtype=torch.int64),
        column=torch.arange(count),
        vision={("cls_attention", -2): torch.tensor(attention)},
    )


def test_runs_are_contiguous_and_the_first_ones_longer() -> None:
    """Two runs of 5 tokens are 0 1 2 and 3 4; one token each, as the runs weigh the same."""
    tokens = planted([0.1, 0.2, 0.3, 0.19, 0.21])
    assert selected(HoloV(num_runs=2), tokens, 2).indices.tolist() == [2, 4]


def test_what_is_left_after_rounding_goes_to_the_heaviest_runs() -> None:
    """Weights 0.5, 0.3, 0.2 of 4: 2.0, 1.2 and 0.8 are cut to 2, 1, 0; the last goes to run 0.

    The largest remainder would have given it to run 2.
    """
    tokens = planted([0.1] * 5 + [0.06] * 5 + [0.04] * 5)
    assert selected(HoloV(num_runs=3), tokens, 4).indices.tolist() == [0, 1, 2, 5]


def test_what_a_full_run_cannot_take_goes_to_the_others_by_weight() -> None:
    """Of 5, run 0 asks for nearly all and has room for 2; 3 more go 2 : 1 to the other two."""
    tokens = planted([0.4, 0.4, 0.04, 0.04, 0.02, 0.02])
    assert selected(HoloV(num_runs=3), tokens, 5).indices.tolist() == [0, 1, 2, 3, 4]


def test_a_run_of_orthogonal_tokens_lacks_nine_percent() -> None:
    """Runs weigh 1.05 and 1.09 once the second, not the first, has any variance of cosines."""
    orthogonal = torch.eye(4)
    alike = torch.ones(2, 4)
    attention = [0.105, 0.105, 0.1, 0.1]
    varied = planted(attention, torch.cat([orthogonal[:2], alike]))
    assert selected(HoloV(num_runs=2), varied, 1).indices.tolist() == [2]
    uniform = planted(attention, orthogonal)
    assert selected(HoloV(num_runs=2), uniform, 1).indices.tolist() == [0]


def test_a_run_of_nearly_orthogonal_tokens_gains_less() -> None:
    """Two tokens with cosine 0.001 have variance 0.000001, as large as epsilon: half of 9 %.

    So run 0 weighs 1.045 against 1.03 and 1.06 of orthogonal ones.
    """
    nearly = torch.tensor([[1.0, 0.0], [0.001, 1.0]])
    for other, kept in (0.103, 0), (0.106, 2):
        tokens = planted([0.1, 0.1, other, other], torch.cat([nearly, torch.eye(2)]))
        assert selected(HoloV(num_runs=2), tokens, 1).indices.tolist() == [kept]


def test_runs_without_any_attention_still_meet_the_budget() -> None:
    assert selected(HoloV(num_runs=3), planted([0.0] * 6), 4).indices.tolist() == [0, 1, 2, 4]


def test_the_layer_is_the_one_that_llava_reads_unless_another_is_asked_for() -> None:
    tokens = visual_tokens()
    assert HoloV().needs == {("cls_attention", -2)}
    last = HoloV(cls_layer=-1)
    assert last.needs == {("cls_attention", -1)}
    assert selected(last, tokens, 58).indices.tolist() == slow_select(tokens, 58, layer=-1)
