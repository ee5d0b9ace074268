"""HoloV against a plain reference."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import visual_tokens
from slow import at_every_shape, grid_of, kept
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
    picked: list[int] = []
    for run, number in zip(runs, share, strict=True):
        picked += sorted(run, key=lambda i: (-attention[i], i))[:number]
    return sorted(picked)


@at_every_shape
@pytest.mark.parametrize("layer", [-2, -1])
def test_it_keeps_what_the_slow_reference_keeps(shape: dict, ratio: float, layer: int) -> None:
    tokens = visual_tokens(**shape)
    budget = round(ratio * len(tokens))
    expected = slow_select(tokens, budget, layer=layer)
    assert kept(HoloV(cls_layer=layer), tokens, budget) == expected


@pytest.mark.parametrize(
    ("side", "budget", "num_runs"),
    [(3, 1, 16), (3, 8, 16), (4, 5, 16), (5, 24, 16), (5, 7, 16)]
    + [(12, 36, num_runs) for num_runs in (1, 5, 144, 1000)],
)
def test_runs_may_have_one_token_or_none(side: int, budget: int, num_runs: int) -> None:
    tokens = visual_tokens(side=side)
    expected = slow_select(tokens, budget, num_runs)
    assert kept(HoloV(num_runs=num_runs), tokens, budget) == expected


def planted(attention: list[float], features: Tensor | None = None) -> VisualTokens:
    """Tokens with this attention; all alike unless features are given."""
    count = len(attention)
    given = torch.ones(count, 4) if features is None else features
    return grid_of(
        1, count, features=given, vision={("cls_attention", -2): torch.tensor(attention)}
    )


def test_what_is_left_after_rounding_goes_to_the_heaviest_runs() -> None:
    """Weights 0.5, 0.3, 0.2 of 4: 2.0, 1.2 and 0.8 are cut to 2, 1, 0; the last goes to run 0.

    The largest remainder would have given it to run 2.
    """
    tokens = planted([0.1] * 5 + [0.06] * 5 + [0.04] * 5)
    assert kept(HoloV(num_runs=3), tokens, 4) == [0, 1, 2, 5]


def test_what_a_full_run_cannot_take_goes_to_the_others_by_weight() -> None:
    """Of 5, run 0 asks for nearly all and has room for 2; 3 more go 2 : 1 to the other two."""
    tokens = planted([0.4, 0.4, 0.04, 0.04, 0.02, 0.02])
    assert kept(HoloV(num_runs=3), tokens, 5) == [0, 1, 2, 3, 4]


def test_a_run_of_orthogonal_tokens_lacks_nine_percent() -> None:
    """Runs weigh 1.05 and 1.09 once the second, not the first, has any variance of cosines."""
    orthogonal = torch.eye(4)
    alike = torch.ones(2, 4)
    attention = [0.105, 0.105, 0.1, 0.1]
    varied = planted(attention, torch.cat([orthogonal[:2], alike]))
    assert kept(HoloV(num_runs=2), varied, 1) == [2]
    uniform = planted(attention, orthogonal)
    assert kept(HoloV(num_runs=2), uniform, 1) == [0]


def test_runs_without_any_attention_still_meet_the_budget() -> None:
    assert kept(HoloV(num_runs=3), planted([0.0] * 6), 4) == [0, 1, 2, 4]


def test_a_run_of_nearly_orthogonal_tokens_gains_less() -> None:
    """Two tokens with cosine 0.001 have variance 0.000001, as large as epsilon: half of 9 %."""
    nearly = torch.tensor([[1.0, 0.0], [0.001, 1.0]])
    for other, expected in (0.104, 0), (0.105, 2):
        tokens = planted([0.1, 0.1, other, other], torch.cat([nearly, torch.eye(2)]))
        assert kept(HoloV(num_runs=2), tokens, 1) == [expected]
