"""CDPruner against plain references in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from conftest import visual_tokens
from slow import at_every_shape, grid_of, groups, kept, unit
from torch import Tensor

from llava_todre.pruners.cdpruner import CDPruner
from llava_todre.spans import VisualTokens


def slow_relevance(tokens: VisualTokens, source: str) -> Tensor:
    """(N,) float64: min-max over all tokens of the image."""
    if source == "none":
        return torch.ones(len(tokens), dtype=torch.float64)
    if source == "clip":
        raw = [-sum(row) / len(row) for row in tokens.clip_similarity.double().tolist()]
    else:
        words = unit(tokens.text_embeds)
        raw = [
            sum(float(token @ word) for word in words) / len(words)
            for token in unit(tokens.features)
        ]
    low, high = min(raw), max(raw)
    return torch.tensor([(value - low + 1e-6) / (high - low) for value in raw], dtype=torch.float64)


def worst_gap(tokens: VisualTokens, picked: list[int], source: str) -> float:
    """Replay the greedy rule inside ``picked``; how far its gains ever are from the best of all.

    The gain of a token is the squared length of what is left of its weighted feature after taking
    away its part along each picked one: Gram-Schmidt instead of Cholesky.
    """
    relevance = slow_relevance(tokens, source)
    worst = 0.0
    for group, share in groups(tokens, len(picked)):
        left = {place for place, i in enumerate(group) if i in set(picked)}
        assert len(left) == share
        rest = relevance[group][:, None] * unit(tokens.features[group])
        while left:
            gain = rest.square().sum(dim=1)
            best = max(float(gain[i]) for i in left)
            pick = min(i for i in left if gain[i] > best - 1e-12)  # equal up to rounding: lowest
            worst = max(worst, float(gain.max() - gain[pick]))
            left.remove(pick)
            direction = rest[pick] / rest[pick].norm()
            rest = rest - (rest @ direction)[:, None] * direction
    return worst


def select(tokens: VisualTokens, budget: int, **options: Any) -> list[int]:
    return kept(CDPruner(**options), tokens, budget)


def with_clip(tokens: VisualTokens, chunks: int = 2) -> VisualTokens:
    generator = torch.Generator().manual_seed(1)
    similarity = 0.2 + 0.03 * torch.randn(len(tokens), chunks, generator=generator)
    return dataclasses.replace(tokens, clip_similarity=similarity)


def hand_made(features: list[list[float]], clip: list[float]) -> VisualTokens:
    given = {"features": torch.tensor(features), "clip_similarity": torch.tensor(clip)[:, None]}
    return grid_of(1, len(features), **given)


@at_every_shape
@pytest.mark.parametrize("source", ["text_embeds", "clip", "none"])
def test_every_pick_is_the_best_one_in_float64(shape, ratio, source):
    tokens = with_clip(visual_tokens(**shape, width=192, num_text=3))
    picked = select(tokens, round(ratio * len(tokens)), relevance=source)
    assert worst_gap(tokens, picked, source) < 1e-5


@pytest.mark.parametrize("seed", range(20))
def test_every_pick_makes_the_largest_determinant(seed):
    tokens = with_clip(visual_tokens(side=4, width=12, seed=seed))
    relevance = slow_relevance(tokens, "clip")
    rows = relevance[:, None] * unit(tokens.features)
    kernel = rows @ rows.T
    picked: list[int] = []
    for budget in range(1, 9):
        others = [i for i in range(16) if i not in picked]
        volume = [torch.linalg.det(kernel[[*picked, i]][:, [*picked, i]]).item() for i in others]
        picked.append(others[volume.index(max(volume))])
        assert select(tokens, budget, relevance="clip") == sorted(picked)


# Along the first axis; close to it (cosine 0.8); along the second axis.
THREE = [[1.0, 0.0], [0.8, 0.6], [0.0, 2.0]]


def test_irrelevant_tokens_lose_however_different_they_are():
    """Relevance 1, 0.5 and 0: after token 0, token 1 has 0.25 * 0.36 left and token 2 nothing."""
    tokens = hand_made(THREE, [0.1, 0.2, 0.3])
    assert select(tokens, 1, relevance="clip") == [0]
    assert select(tokens, 2, relevance="clip") == [0, 1]
    relevance = CDPruner(relevance="clip").relevance_of(tokens, tokens.features)
    assert 0 < float(relevance.min()) < 1e-4, "the least relevant token stays above zero"


def test_past_the_rank_the_most_relevant_tokens_make_up_the_number():
    tokens = with_clip(visual_tokens(side=6, width=8))
    by_rank = select(tokens, 8, relevance="clip")
    assert worst_gap(tokens, by_rank, "clip") < 1e-5
    relevance = slow_relevance(tokens, "clip").tolist()
    others = sorted(set(range(36)) - set(by_rank), key=lambda i: -relevance[i])
    for budget in (9, 20, 35):
        expected = sorted([*by_rank, *others[: budget - 8]])
        assert select(tokens, budget, relevance="clip") == expected


def test_rank_is_noticed_at_the_size_of_a_view():
    """64 directions for 144 tokens: the released code comes back with about half of them."""
    tokens = with_clip(visual_tokens(width=64))
    kept = select(tokens, 144, relevance="clip")
    directions = select(tokens, 64, relevance="clip")
    assert set(directions) < set(kept)
    relevance = slow_relevance(tokens, "clip")
    dropped = sorted(set(range(576)) - set(kept))
    filled = sorted(set(kept) - set(directions))
    assert relevance[filled].min() > relevance[dropped].max()


def test_a_faint_new_direction_comes_before_a_relevant_duplicate():
    """Rounding leaves a duplicate a gain of about 1e-7, more than the faint token's 1e-8."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(5, 64, generator=generator)
    features[1] = 3 * features[0]
    tokens = hand_made(features.tolist(), [0.0, 0.0, 1.0, 0.9999, 0.5])
    assert select(tokens, 3, relevance="clip") == [0, 3, 4]


def test_a_token_that_hardly_differs_still_comes_before_a_duplicate():
    """0.0025 of it lies outside what is kept."""
    tokens = hand_made([[1.0, 0.0], [2.0, 0.0], [1.0, 0.05]], [0.0, 0.0, 0.0])
    assert select(tokens, 2, relevance="none") == [0, 2]


def test_equal_tokens_and_tokens_of_zeros_still_make_up_the_number():
    for features in (torch.ones(16, 8), torch.zeros(16, 8)):
        tokens = dataclasses.replace(visual_tokens(side=4, width=8), features=features)
        assert select(tokens, 5, relevance="none") == [0, 1, 2, 3, 4]
        assert select(tokens, 15)


def test_relevance_that_tells_nothing_is_like_none():
    tokens = visual_tokens(side=12)
    plain = select(tokens, 14, relevance="none")
    flat = dataclasses.replace(tokens, clip_similarity=torch.full((144, 3), 0.25))
    assert select(flat, 14, relevance="clip") == plain
    no_text = visual_tokens(side=12, num_text=0)
    assert select(no_text, 14) == plain
