"""VisPruner against a plain reference.

The procedure is chaotic: rounding decides near-ties and every round builds on the last. Features of
plus and minus one have cosines that are exact in any precision, so there the reference may compute
in float64; on other features it takes the same float32 cosines.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import visual_tokens
from slow import at_every_shape, grid_of, groups, kept
from torch import Tensor

from llava_todre.pruners.vispruner import VisPruner
from llava_todre.spans import VisualTokens


def slow_distinct(residual: list[int], count: int, cosine: list[list[float]]) -> list[int]:
    """Remove near duplicates from ``residual`` (indices into ``cosine``)."""
    if count == 0:
        return []
    while len(residual) > count:
        quota = min(8, len(residual) - count)
        a = [token for place, token in enumerate(residual) if place % 2 == 0]
        b = [token for place, token in enumerate(residual) if place % 2 == 1]
        closest = [max(cosine[i][j] for j in b) for i in a]
        by_closeness = sorted(range(len(a)), key=lambda place: -closest[place])
        residual = [a[place] for place in by_closeness[quota:]] + b
    return residual


def slow_select(
    tokens: VisualTokens, budget: int, dtype: torch.dtype, ratio: float = 0.5
) -> list[int]:
    scores = tokens.vision["cls_attention", -2].tolist()
    rows = tokens.vision_features.to(dtype)
    rows = torch.nn.functional.normalize(rows / rows.abs().max(dim=1, keepdim=True).values, dim=1)
    picked: list[int] = []
    for members, share in groups(tokens, budget):
        ranked = sorted(members, key=lambda i: (-scores[i], i))
        num_important = int(share * ratio)
        residual = ranked[num_important:]
        cosine = (rows[residual] @ rows[residual].T).tolist()
        places = slow_distinct(list(range(len(residual))), share - num_important, cosine)
        picked += ranked[:num_important] + [residual[place] for place in places]
    return sorted(picked)


def exact_tokens(**shape: object) -> VisualTokens:
    """Tokens whose vision features are 64 times plus or minus one, many of them alike."""
    tokens = visual_tokens(**shape)
    generator = torch.Generator().manual_seed(1)
    kinds = torch.randn(40, 64, generator=generator)[
        torch.randint(40, (len(tokens),), generator=generator)
    ]
    noise = torch.randn(len(tokens), 64, generator=generator)
    return dataclasses.replace(tokens, vision_features=(kinds + 0.7 * noise).sign())


@at_every_shape
def test_it_keeps_what_the_slow_reference_keeps(shape: dict, ratio: float) -> None:
    tokens = exact_tokens(**shape)
    budget = round(ratio * len(tokens))
    assert kept(VisPruner(), tokens, budget) == slow_select(tokens, budget, torch.float64)


@pytest.mark.parametrize("ratio", [0.25, 0.10])
def test_so_it_does_on_ordinary_features_in_the_same_precision(ratio: float) -> None:
    tokens = visual_tokens(grid=(2, 2), side=12, padding=3)
    budget = round(ratio * len(tokens))
    assert kept(VisPruner(), tokens, budget) == slow_select(tokens, budget, torch.float32)


@pytest.mark.parametrize("important_ratio", [0.0, 0.3, 0.75, 1.0])
def test_the_share_of_important_tokens_is_an_option(important_ratio: float) -> None:
    tokens = exact_tokens(side=12)
    method = VisPruner(important_ratio=important_ratio)
    assert kept(method, tokens, 58) == slow_select(tokens, 58, torch.float64, important_ratio)


@pytest.mark.parametrize("budget", [1, 2, 3, 4, 8, 15, 16, 17, 58, 142, 143])
def test_budgets_that_stop_the_released_code_are_met_exactly(budget: int) -> None:
    tokens = exact_tokens(side=12)
    assert kept(VisPruner(), tokens, budget) == slow_select(tokens, budget, torch.float64)


def planted(vision_features: Tensor, ranked: list[int]) -> VisualTokens:
    """One row of tokens with these features, which attention ranks in this order."""
    attention = torch.zeros(len(ranked))
    attention[ranked] = torch.arange(len(ranked), 0, -1).float()
    vision = {("cls_attention", -2): attention}
    return grid_of(1, len(ranked), vision=vision, vision_features=vision_features)


def on_a_circle(degrees: list[float]) -> Tensor:
    radians = torch.tensor(degrees).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], dim=1)


def test_rounds_of_eight_at_most() -> None:
    """Ranked 0 ... 12, ten must go. Round 1 has only seven even places; 1 3 5 7 9 11 stay.

    Round 2 removes the even places 1 5 9 of these.
    """
    tokens = planted(on_a_circle([7.0 * i for i in range(13)]), list(range(13)))
    assert kept(VisPruner(important_ratio=0.0), tokens, 3) == [3, 7, 11]


def test_the_list_of_the_next_round_starts_with_the_survivors_closest_first() -> None:
    """20 tokens to 9: a round removes 8 of the 10 even places, the next one three of 6.

    Tokens 2i and 2i + 1 are a pair, orthogonal to all others. Those of pair 1 are farthest apart,
    then those of pair 4: tokens 2 and 8 survive, 8 the closer one. The list is 8 2 1 3 5 7 ... 19;
    its even places 8 1 5 9 13 17 have their partners, if any, among themselves. All are equally
    close (0) to the odd places, so the first three go.
    """
    degrees = torch.tensor([10.0, 80, 20, 30, 70, 25, 12, 14, 16, 18]).deg2rad()
    features = torch.zeros(20, 20)
    for pair, angle in enumerate(degrees):
        features[2 * pair, 2 * pair] = angle.sin()
        features[2 * pair, 2 * pair + 1] = angle.cos()
        features[2 * pair + 1, 2 * pair + 1] = 1
    tokens = planted(features, list(range(20)))
    expected = [2, 3, 7, 9, 11, 13, 15, 17, 19]
    assert kept(VisPruner(important_ratio=0.0), tokens, 9) == expected
