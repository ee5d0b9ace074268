"""VisionZip: dominant and contextual tokens against a slow reference, places, [CLS], budgets."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from conftest import selected, visual_tokens
from slow import assert_merged, at_every_shape, grid_of, groups, unit
from torch import Tensor

from llava_todre.pruners.visionzip import VisionZip
from llava_todre.spans import VisualTokens


def reference(
    tokens: VisualTokens,
    budget: int,
    ratio: Fraction = Fraction(27, 32),
    keep_cls: bool = True,
    layer: int = -2,
) -> dict[int, Tensor]:
    """Return what stands in each place before the projector, in float64."""
    attention = tokens.vision["cls_attention", layer].double().tolist()
    metric = unit(tokens.vision["keys", layer].double().mean(dim=1))
    states, cls_states = tokens.vision_features.double(), tokens.cls_features.double()
    result = {}
    for group, share in groups(tokens, budget):
        if share == 0:
            continue
        num_dominant = max(1, math.floor(share * ratio + Fraction(1, 2)))
        num_contextual = share - num_dominant
        num_patches = num_dominant - 1 if keep_cls else num_dominant
        dominant = sorted(group, key=lambda i: (-attention[i], i))[:num_patches]
        left = [i for i in group if i not in set(dominant)]
        step = len(left) // num_contextual if num_contextual else 1
        targets = [left[j * step] for j in range(num_contextual)]
        others = [i for i in left if i not in set(targets)]
        joined: dict[int, list[int]] = {target: [] for target in targets}
        cosine = (metric[others] @ metric[targets].T).tolist()
        for i, row in zip(others, cosine, strict=True) if targets else ():
            best, *rest = sorted(row, reverse=True)
            # The outcome must not hang on the last bit of float32.
            assert not rest or best - rest[0] > 3e-7
            joined[targets[row.index(best)]].append(i)
        for i in dominant:
            result[i] = states[i]
        for target in targets:
            result[target] = states[target]
            if joined[target]:
                result[target] = states[target] + states[joined[target]].mean(dim=0)
        if keep_cls:
            result[others[0]] = cls_states[int(tokens.view[group[0]])]
    return result


@at_every_shape
def test_matches_the_slow_reference(shape, ratio):
    tokens = visual_tokens(**shape)
    budget = round(ratio * len(tokens))
    expected = reference(tokens, budget)
    assert len(expected) == budget
    assert_merged(selected(VisionZip(), tokens, budget), tokens, expected)


@pytest.mark.parametrize(
    ("options", "ratio"),
    [
        ({"keep_cls": False}, Fraction(27, 32)),
        ({"dominant_ratio": 0.5}, Fraction(1, 2)),
        ({"dominant_ratio": 1.0}, Fraction(1)),
        ({"dominant_ratio": 0.0}, Fraction(0)),
        ({"dominant_ratio": 0.0, "keep_cls": False}, Fraction(0)),
        ({"cls_layer": -1}, Fraction(27, 32)),
    ],
)
def test_every_option_does_what_the_reference_does(options, ratio):
    tokens = visual_tokens(grid=(2, 1), side=12, padding=2)
    pruner = VisionZip(**options)
    for budget in (1, 3, 40, 131, len(tokens) - 1):
        expected = reference(tokens, budget, ratio, pruner.keep_cls, pruner.cls_layer)
        assert len(expected) == budget
        assert_merged(selected(pruner, tokens, budget), tokens, expected)


@pytest.mark.parametrize(
    ("total", "dominant", "contextual"), [(192, 162, 30), (128, 108, 20), (64, 54, 10)]
)
def test_the_published_budgets_split_as_published(total, dominant, contextual):
    tokens = visual_tokens()
    selection = selected(VisionZip(), tokens, total)
    whole = tokens.project(tokens.vision_features)
    unchanged = (selection.features - whole[selection.indices]).abs().amax(dim=1) < 1e-4
    assert int(unchanged.sum()) == dominant - 1  # [CLS] is the last one
    assert total - int(unchanged.sum()) == contextual + 1


def test_nine_patches_by_hand():
    """3 x 3 patches; attention falls with the index, keys point along 2 axes.

    T = 5, half of it (2.5) rounds up to 3 dominant: [CLS], patches 0 and 1; left 2...8, every third
    is a target: 2 and 5. Patches 3, 6, 7 join 2; 4 and 8 join 5. [CLS] stands at 3.
    """
    index = torch.arange(9)
    keys = torch.zeros(9, 2, 2)
    keys[:, :, 0] = 1.0
    keys[[4, 5, 8]] = torch.tensor([0.0, 2.0])
    tokens = grid_of(
        3,
        3,
        vision={("cls_attention", -2): 1.0 / (1 + index), ("keys", -2): keys},
        vision_features=10.0 * index[:, None].float(),
        cls_features=torch.tensor([[-7.0]]),
        project=lambda states: states + 1,
    )
    selection = selected(VisionZip(dominant_ratio=0.5), tokens, 5)
    assert selection.indices.tolist() == [0, 1, 2, 3, 5]
    means = [20 + (30 + 60 + 70) / 3, 50 + (40 + 80) / 2]
    expected = torch.tensor([0.0, 10.0, means[0], -7.0, means[1]]) + 1
    torch.testing.assert_close(selection.features[:, 0], expected)
