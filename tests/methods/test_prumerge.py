"""PruMerge and PruMerge+: which tokens stay, what is merged into them, adaptive counts."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import selected, visual_tokens
from slow import SHAPES, assert_merged, at_every_shape, grid_of, groups
from torch import Tensor

from llava_todre.pruners.prumerge import PruMerge, PruMergePlus
from llava_todre.spans import VisualTokens


def reference(
    tokens: VisualTokens,
    budget: int,
    part: Fraction = Fraction(1),
    num_merged: int = 32,
    layer: int = -1,
) -> dict[int, Tensor]:
    """Return what stands in each place before the projector, in float64."""
    attention = tokens.vision["cls_attention_unsplit", layer].double()
    keys = tokens.vision["keys", layer].double().reshape(len(tokens), -1)
    keys = keys / keys.norm(dim=1, keepdim=True)
    states = tokens.vision_features.double()
    result = {}
    for group, share in groups(tokens, budget):
        if share == 0:
            continue
        by_attention = sorted(group, key=lambda i: (-float(attention[i]), i))
        count = max(1, share - 1)
        num_top = min(count, max(1, math.floor(share * part + Fraction(1, 2))))
        kept = by_attention[:num_top]
        free = [i for i in group if i not in set(kept)]
        spaced = count - num_top
        for j in range(spaced):
            kept.append(free[math.floor(Fraction(2 * j + 1, 2 * spaced) * len(free))])
        cosine = (keys[kept] @ keys[group].T).tolist()
        for i, row in zip(kept, cosine, strict=True):
            others = [(value, -j) for value, j in zip(row, group, strict=True) if j != i]
            others.sort(reverse=True)
            # The outcome must not hang on the last bit of float32.
            if 0 < num_merged < len(others):
                assert others[num_merged - 1][0] - others[num_merged][0] > 3e-7
            near = [-j for _, j in others[:num_merged]]
            result[i] = states[i] + attention[near] @ states[near]
        if share > 1:
            dropped = [i for i in by_attention if i not in set(kept)]
            result[dropped[0]] = attention[dropped] @ states[dropped]
    return result


PARTS = pytest.mark.parametrize(
    ("method", "part"), [(PruMerge, Fraction(1)), (PruMergePlus, Fraction(1, 4))]
)


@at_every_shape
@PARTS
def test_matches_the_slow_reference(method, part, shape, ratio):
    tokens = visual_tokens(**shape)
    budget = round(ratio * len(tokens))
    expected = reference(tokens, budget, part)
    assert len(expected) == budget
    assert_merged(selected(method(), tokens, budget), tokens, expected)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({}, Fraction(1)),
        ({"attention_share": 0.25}, Fraction(1, 4)),
        ({"attention_share": 0.625}, Fraction(5, 8)),
        ({"num_merged": 0}, Fraction(1)),
        ({"num_merged": 3}, Fraction(1)),
        ({"num_merged": 10_000}, Fraction(1)),
        ({"cls_layer": -2}, Fraction(1)),
    ],
)
def test_every_option_does_what_the_reference_does(options, part):
    tokens = visual_tokens(grid=(2, 1), side=8, padding=1)
    pruner = PruMerge(**options)
    for budget in (1, 2, 3, 5, 6, 9, 40, len(tokens) - 1):
        expected = reference(tokens, budget, part, pruner.num_merged, pruner.cls_layer)
        assert len(expected) == budget
        assert_merged(selected(pruner, tokens, budget), tokens, expected)


def small(attention: list[float]) -> VisualTokens:
    """Return 2 x 4 patches whose keys turn by ten degrees each; features are powers of ten."""
    index = torch.arange(8)
    angle = torch.deg2rad(10.0 * index)
    keys = torch.stack([angle.cos(), angle.sin()], dim=1).view(8, 2, 1)
    return grid_of(
        2,
        4,
        vision={
            ("cls_attention_unsplit", -1): torch.tensor(attention),
            ("keys", -1): keys * (1.0 + index.view(8, 1, 1)),
        },
        vision_features=10.0 ** index[:, None],
        project=lambda states: 2 * states,
    )


def test_eight_patches_by_hand():
    # 7 and 2 are kept. The nearest other two of 7 are 6 and 5; of 2, with keys 1 and 3 equally
    # near, both. Neighbours may be kept or dropped, and what is added is what they were before.
    tokens = small([0.0, 0.125, 0.25, 0.0625, 0.0, 0.03125, 0.125, 0.375])
    selection = selected(PruMerge(num_merged=2), tokens, 3)
    assert selection.indices.tolist() == [1, 2, 7]  # of equal 1 and 6 the first holds the extra
    extra = 0.125 * 10 + 0.0625 * 1e3 + 0.03125 * 1e5 + 0.125 * 1e6
    two = 100 + 0.125 * 10 + 0.0625 * 1e3
    seven = 1e7 + 0.03125 * 1e5 + 0.125 * 1e6
    assert selection.features.flatten().tolist() == [2 * extra, 2 * two, 2 * seven]


def own_count(attention: Tensor) -> int:
    """Count the values above Q3 + 1.5 IQR."""
    values = attention.double().numpy()
    low, high = np.percentile(values, [25, 75])
    return sum(value > high + 1.5 * (high - low) for value in values.tolist())


@pytest.mark.parametrize("shape", ["image", "crops", "video"])
@PARTS
def test_adaptive_keeps_the_outliers_of_the_whole_image_and_one_more_per_view(method, part, shape):
    tokens = visual_tokens(**SHAPES[shape])
    outliers = own_count(tokens.vision["cls_attention_unsplit", -1])
    num_views = int(tokens.view.max()) + 1
    total = min(len(tokens), int(outliers / part) + num_views)
    selections = [selected(method(adaptive=True), tokens, budget) for budget in (1, 300)]
    assert torch.equal(selections[0].indices, selections[1].indices)
    assert_merged(selections[0], tokens, reference(tokens, total, part))


@pytest.mark.parametrize("method", [PruMerge, PruMergePlus])
def test_adaptive_takes_exactly_the_outliers_by_attention(method):
    attention = torch.full((24 * 24,), 0.001)
    attention[7::50] = 0.05
    vision = {("cls_attention_unsplit", -1): attention, ("keys", -1): torch.randn(576, 2, 4)}
    tokens = dataclasses.replace(visual_tokens(), vision=vision)
    kept = selected(method(adaptive=True), tokens, 5).indices.tolist()
    outliers = list(range(7, 576, 50))
    assert set(outliers) <= set(kept)
    assert len(kept) == len(outliers) * (1 if method is PruMerge else 4) + 1


@pytest.mark.parametrize(
    ("highest", "count"),
    [
        ([7.0, 12.0], 1),  # no outlier: one stays all the same
        ([7.0, 12.5], 1),
        ([12.0, 12.5], 1),
        ([12.5, 12.5], 2),
    ],
)
def test_outliers_are_above_the_third_quartile_by_one_and_a_half_ranges(highest, count):
    # The quartiles are 2 and 6, so an outlier is above 12.
    attention = torch.tensor([5.0, 1, 2, 3, 4, 0, 6, *highest])
    assert PruMerge().own_count(attention) == count
    assert PruMergePlus().own_count(attention) == 4 * count


def test_adaptive_never_asks_for_more_tokens_than_there_are():
    tokens = visual_tokens(grid=(2, 1), side=8, padding=1)
    selection = selected(PruMerge(adaptive=True, attention_share=0.01), tokens, 5)
    assert selection.indices.tolist() == list(range(len(tokens)))
