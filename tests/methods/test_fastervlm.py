"""FasterVLM against a plain reference."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import visual_tokens
from slow import at_every_shape, groups, kept

from llava_todre.pruners.fastervlm import FasterVLM
from llava_todre.spans import VisualTokens


def reference(tokens: VisualTokens, budget: int, layer: int = -2) -> list[int]:
    scores = tokens.vision["cls_attention", layer].tolist()
    best = [
        sorted(members, key=lambda i: (-scores[i], i))[:share]
        for members, share in groups(tokens, budget)
    ]
    return sorted(sum(best, []))


@at_every_shape
@pytest.mark.parametrize("layer", [-2, -1])
def test_it_keeps_what_the_slow_reference_keeps(shape: dict, ratio: float, layer: int) -> None:
    tokens = visual_tokens(**shape)
    budget = round(ratio * len(tokens))
    assert kept(FasterVLM(cls_layer=layer), tokens, budget) == reference(tokens, budget, layer)


def test_a_view_keeps_its_share_however_little_attention_its_tokens_get() -> None:
    tokens = visual_tokens(grid=(2, 1), side=2)
    scores = torch.where(tokens.view == 0, 0.001, 0.1) + 0.0001 * torch.arange(12)
    tokens = dataclasses.replace(tokens, vision={("cls_attention", -2): scores})
    # The crops, side by side, are read row by row: the last row ends with 8, 9 and then 10, 11.
    assert kept(FasterVLM(), tokens, 3) == [3, 9, 11]


def test_ties_go_to_the_first_tokens() -> None:
    tokens = visual_tokens(side=3)
    tokens = dataclasses.replace(tokens, vision={("cls_attention", -2): torch.full((9,), 0.1)})
    assert kept(FasterVLM(), tokens, 4) == [0, 1, 2, 3]
