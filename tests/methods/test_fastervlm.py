"""FasterVLM against a plain reference."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from conftest import selected, visual_tokens
from slow import slow_shares
from torch import Tensor

from llava_todre.pruners.fastervlm import FasterVLM
from llava_todre.spans import VisualTokens

SHAPES = [
    {},
    {"grid": (2, 2), "side": 12},
    {"grid": (2, 2), "side": 12, "padding": 3},
    {"frames": 5, "side": 12},
    {"dtype": torch.bfloat16},
]


def slow_select(tokens: VisualTokens, budget: int, attention: Tensor) -> list[int]:
    views = [
        [i for i, view in enumerate(tokens.view.tolist()) if view == wanted]
        for wanted in sorted(set(tokens.view.tolist()))
    ]
    scores = attention.tolist()
    kept: list[int] = []
    for members, share in zip(views, slow_shares(budget, [len(v) for v in views]), strict=True):
        kept += sorted(members, key=lambda i: (-scores[i], i))[:share]
    return sorted(kept)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ratio", [0.25, 0.10])
def test_it_keeps_what_the_slow_reference_keeps(shape: dict, ratio: float) -> None:
    tokens = visual_tokens(**shape)
    method = FasterVLM(retain_ratio=ratio)
    budget = method.num_keep(len(tokens))
    kept = selected(method, tokens, budget).indices
    assert kept.tolist() == slow_select(tokens, budget, tokens.vision["cls_attention", -2])
    assert kept.dtype == torch.int64


def test_a_view_keeps_its_share_however_little_attention_its_tokens_get() -> None:
    tokens = visual_tokens(grid=(2, 1), side=2)
    scores = torch.where(tokens.view == 0, 0.001, 0.1) + 0.0001 * torch.arange(12)
    tokens = dataclasses.replace(tokens, vision={("cls_attention", -2): scores})
    kept = selected(FasterVLM(), tokens, 3).indices
    assert Counter(tokens.view[kept].tolist()) == {0: 1, 1: 1, 2: 1}
    # The crops, side by side, are read row by row: the last row ends with 8, 9 and then 10, 11.
    assert kept.tolist() == [3, 9, 11]


def test_ties_go_to_the_first_tokens() -> None:
    tokens = visual_tokens(side=3)
    tokens = dataclasses.replace(tokens, vision={("cls_attention", -2): torch.full((9,), 0.1)})
    assert selected(FasterVLM(), tokens, 4).indices.tolist() == [0, 1, 2, 3]


def test_the_layer_is_the_one_that_llava_reads_unless_another_is_asked_for() -> None:
    tokens = visual_tokens()
    assert FasterVLM().needs == {("cls_attention", -2)}
    last = FasterVLM(cls_layer=-1)
    assert last.needs == {("cls_attention", -1)}
    kept = selected(last, tokens, 58).indices.tolist()
    assert kept == slow_select(tokens, 58, tokens.vision["cls_attention", -1])
