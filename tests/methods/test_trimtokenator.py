"""TrimTokenator against a plain reference in float64."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from conftest import selected, visual_tokens
from slow import at_every_shape, grid_of, kept, unit
from torch import Tensor

from llava_todre.pruners.todre import Todre
from llava_todre.pruners.trimtokenator import TrimTokenator, alignment
from llava_todre.spans import VisualTokens


def slow_alpha(features: Tensor, text: Tensor) -> list[float]:
    """Minus the mean squared distance of each token to the text tokens."""
    alpha = []
    for token in features.double():
        squared = [float((token - word).square().sum()) for word in text.double()]
        alpha.append(-sum(squared) / len(squared))
    return alpha


def slow_survivors(tokens: VisualTokens, budget: int, align_ratio: float = 0.8) -> list[int]:
    count = max(budget, math.floor(align_ratio * len(tokens) + 0.5))
    alpha = slow_alpha(tokens.features, tokens.text_embeds)
    return sorted(sorted(range(len(alpha)), key=lambda i: (-alpha[i], i))[:count])


def worst_gap(features: Tensor, survivors: list[int], picked: list[int]) -> float:
    """Replay Stage 2 inside ``picked``; how far the mean cosine of a pick ever is from the best."""
    rows = unit(features[survivors])
    cosine = rows @ rows.T
    assert set(picked) <= set(survivors)
    left = {survivors.index(token) for token in picked}
    score, count, worst = cosine.mean(dim=1), 0, 0.0
    total = torch.zeros(len(rows), dtype=torch.float64)
    while left:
        pick = min(left, key=lambda i: float(score[i]))
        worst = max(worst, float(score[pick] - score.min()))
        left.remove(pick)
        count += 1
        total = total + cosine[pick]
        total[pick] = math.inf
        score = total / count
    return worst


def select(tokens: VisualTokens, budget: int, **options: float) -> list[int]:
    return kept(TrimTokenator(**options), tokens, budget)


def hand_made(features: list[list[float]], text: list[list[float]]) -> VisualTokens:
    given = {"features": torch.tensor(features), "text_embeds": torch.tensor(text)}
    return grid_of(1, len(features), **given)


@at_every_shape
def test_every_pick_is_the_best_one_in_float64(shape, ratio):
    tokens = visual_tokens(**shape, num_text=4)
    budget = round(ratio * len(tokens))
    survivors = slow_survivors(tokens, budget)
    assert worst_gap(tokens.features, survivors, select(tokens, budget)) < 1e-5


def test_stage_1_alone_keeps_the_tokens_closest_to_the_text():
    tokens = visual_tokens()
    assert select(tokens, 58, align_ratio=0.0) == slow_survivors(tokens, 58, 0.0)


def test_alignment_is_alpha_up_to_a_constant():
    tokens = visual_tokens(side=12)
    fast = alignment(tokens.features, tokens.text_embeds).double()
    slow = torch.tensor(slow_alpha(tokens.features, tokens.text_embeds))
    difference = slow - fast
    assert difference.std() < 1e-6 * fast.abs().max()
    spread = float(tokens.text_embeds.double().var(dim=0, correction=0).sum())
    assert float(difference.mean()) == pytest.approx(-spread, rel=1e-4)


# Token 4 is farthest from the text at the origin. Mean cosines of 0 to 3 with the four of them:
# 0.5, 0.5, 0 and 0. So 2 comes first, then 3 (cosine -1), then 0: its sum is that of 1, which is
# closer to the text but not first.
SMALL = [[2.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, -1.0], [-5.0, 0.0]]


def test_small_example_by_hand():
    tokens = hand_made(SMALL, [[0.1, 0.0], [-0.1, 0.0]])
    assert select(tokens, 1) == [2]
    assert select(tokens, 2) == [2, 3]
    assert select(tokens, 3) == [0, 2, 3]
    assert select(tokens, 4) == [0, 1, 2, 3]


def test_stage_1_never_keeps_fewer_than_the_budget():
    tokens = visual_tokens(side=12)
    assert select(tokens, 130) == slow_survivors(tokens, 130)


@pytest.mark.parametrize(("num_tokens", "survive"), [(10, 8), (13, 10), (8, 6), (5, 3)])
def test_the_number_of_survivors_is_rounded_half_up(num_tokens, survive):
    """The last survivor points the other way, so Stage 2 takes it at once if it is there."""
    ratio = {10: 0.8, 13: 0.8, 8: 0.75, 5: 0.5}[num_tokens]
    features = [[1.0 + i, 0.1 * i] for i in range(num_tokens)]
    for place, expected in ((survive - 1, True), (survive, False)):
        changed = [row if i != place else [-row[0], 0.0] for i, row in enumerate(features)]
        tokens = hand_made(changed, [[0.0, 0.0]])
        assert (place in select(tokens, 1, align_ratio=ratio)) is expected


def test_a_prompt_without_text_after_the_image_keeps_all_tokens_in_stage_1():
    tokens = visual_tokens(num_text=0)
    everything = list(range(len(tokens)))
    assert worst_gap(tokens.features, everything, select(tokens, 58)) < 1e-5
    assert select(tokens, 58) == select(visual_tokens(), 58, align_ratio=1.0)


@pytest.mark.parametrize("budget", [*range(1, 41), 144, 575])
def test_stage_2_is_the_rule_of_todre_v2_with_another_first_token(budget):
    """Equal sets for budgets 1, 2, 3... are equal picks."""
    tokens = visual_tokens()
    (first,) = select(tokens, 1, align_ratio=1.0)
    pivot = torch.zeros(len(tokens)).index_fill(0, torch.tensor(first), 1.0)
    tokens = dataclasses.replace(tokens, vision={("cls_attention", -1): pivot})
    todre = selected(Todre(objective="max_sum"), tokens, budget)
    assert select(tokens, budget, align_ratio=1.0) == todre.indices.tolist()
