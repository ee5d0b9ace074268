"""HiPrune against a plain reference."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from conftest import selected, visual_tokens
from slow import slow_shares
from torch import Tensor

from llava_todre.pruners.hiprune import HiPrune
from llava_todre.spans import VisualTokens

OBJECT, DEEP = ("received_attention", 0.35), ("received_attention", -2)


def slow_select(
    tokens: VisualTokens, budget: int, side: int, alpha: float = 0.1, deep_key: tuple = DEEP
) -> list[int]:
    """The released rule for views of side x side patches, some of them unpadded."""
    objects, deep = tokens.vision[OBJECT].tolist(), tokens.vision[deep_key].tolist()
    cells = [
        side * row + column
        for row, column in zip(tokens.row.tolist(), tokens.column.tolist(), strict=True)
    ]
    views = [
        [i for i, view in enumerate(tokens.view.tolist()) if view == wanted]
        for wanted in sorted(set(tokens.view.tolist()))
    ]
    kept: list[int] = []
    for members, share in zip(views, slow_shares(budget, [len(v) for v in views]), strict=True):
        at_cell = {cells[i]: i for i in members}
        anchors = sorted(members, key=lambda i: (-objects[i], i))[: round(share * alpha / 5)]
        chosen = list(anchors)
        for anchor in anchors:
            for step in (-1, 1, -side, side):
                cell = min(side * side - 1, max(0, cells[anchor] + step))
                if cell in at_cell and at_cell[cell] not in chosen:
                    chosen.append(at_cell[cell])
        registers = sorted((i for i in members if i not in chosen), key=lambda i: (-deep[i], i))
        kept += (chosen + registers)[:share]
    return sorted(kept)


def with_object_layer(tokens: VisualTokens) -> VisualTokens:
    return dataclasses.replace(
        tokens, vision={**tokens.vision, OBJECT: tokens.vision["received_attention", 8]}
    )


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"grid": (2, 2), "side": 12},
        {"grid": (2, 2), "side": 12, "padding": 3},
        {"frames": 5, "side": 12},
        {"dtype": torch.bfloat16},
    ],
    ids=str,
)
@pytest.mark.parametrize("alpha", [0.1, 0.6])
@pytest.mark.parametrize("ratio", [0.25, 0.10])
def test_it_keeps_what_the_slow_reference_keeps(shape: dict, alpha: float, ratio: float) -> None:
    tokens = with_object_layer(visual_tokens(**shape))
    method = HiPrune(retain_ratio=ratio, alpha=alpha)
    budget = method.num_keep(len(tokens))
    kept = selected(method, tokens, budget).indices
    assert kept.tolist() == slow_select(tokens, budget, shape.get("side", 24), alpha)
    assert kept.dtype == torch.int64


@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("budget", [1, 2, 3, 4, 5, 6, 13, 25, 26, 28, 142, 143])
def test_any_budget_is_met_exactly(alpha: float, budget: int) -> None:
    tokens = with_object_layer(visual_tokens(side=12))
    kept = selected(HiPrune(alpha=alpha), tokens, budget).indices.tolist()
    assert kept == slow_select(tokens, budget, 12, alpha)
    assert len(set(kept)) == budget


def planted(side: int, objects: list[int], deep: list[int]) -> VisualTokens:
    """One view in which object and deep layer rank these patches first, in this order."""

    def scores(ranked: list[int]) -> Tensor:
        values = torch.zeros(side * side)
        values[ranked] = torch.arange(len(ranked), 0, -1) / 10
        return values

    patches = torch.arange(side * side)
    return VisualTokens(
        features=torch.zeros(side * side, 1),
        view=torch.zeros_like(patches),
        row=patches // side,
        column=patches % side,
        vision={OBJECT: scores(objects), DEEP: scores(deep)},
    )


def test_anchors_bring_their_neighbours_and_registers_fill_up() -> None:
    """Budget 7 of 5 x 5, one anchor (7 / 5 rounds to 1): 12, its cross, and the deep layer's best.

    The deep layer's first choice, 12, is there already, and so are 7 and 11.
    """
    tokens = planted(5, objects=[12, 24], deep=[12, 7, 11, 20, 4, 3])
    kept = selected(HiPrune(alpha=1.0), tokens, 7).indices.tolist()
    assert kept == [4, 7, 11, 12, 13, 17, 20]


def test_an_anchor_counts_five_and_half_an_anchor_rounds_to_even() -> None:
    """round(0.5) is 0 and round(1.5) is 2, as in the released code."""
    tokens = planted(24, objects=[100, 400], deep=[30, 31, 32])
    assert 100 not in selected(HiPrune(), tokens, 25).indices
    assert {100, 99, 101, 76, 124} <= set(selected(HiPrune(), tokens, 26).indices.tolist())
    assert 400 in selected(HiPrune(), tokens, 75).indices


def test_neighbours_at_the_edge_follow_the_released_code() -> None:
    """Patch 5 of 5 x 5 has 4, the end of the row above, to its left; patch 2 has 0 above it.

    Patch 22 has 24, the last, below it.
    """
    for anchor, neighbours in {5: {4, 6, 0, 10}, 2: {1, 3, 0, 7}, 22: {21, 23, 17, 24}}.items():
        tokens = planted(5, objects=[anchor], deep=[])
        assert set(selected(HiPrune(alpha=1.0), tokens, 5).indices.tolist()) == neighbours | {
            anchor
        }


def test_anchors_come_before_buffers_and_buffers_of_the_best_anchor_first() -> None:
    """Budget 13 makes three anchors (2.6), which with their crosses would be fifteen."""
    tokens = planted(9, objects=[40, 60, 20], deep=[0, 80])
    kept = selected(HiPrune(alpha=1.0), tokens, 13).indices.tolist()
    assert kept == sorted([40, 60, 20] + [39, 41, 31, 49] + [59, 61, 51, 69] + [19, 21])


def test_neighbours_removed_by_unpadding_are_left_out() -> None:
    """Two crops of 4 x 4 whose first and last rows are gone, beside each other."""
    tokens = with_object_layer(visual_tokens(grid=(2, 1), side=4, padding=1))
    assert len(tokens) == 16 + 2 * 8
    scores = torch.zeros(32)
    anchor = int(((tokens.view == 2) & (tokens.row == 1) & (tokens.column == 2)).nonzero())
    scores[anchor] = 1.0
    tokens = dataclasses.replace(tokens, vision={OBJECT: scores, DEEP: torch.zeros(32)})
    kept = selected(HiPrune(alpha=1.0), tokens, 16).indices
    crop = kept[tokens.view[kept] == 2]
    places = set(zip(tokens.row[crop].tolist(), tokens.column[crop].tolist(), strict=True))
    assert places == {(1, 1), (1, 2), (1, 3), (2, 2)}


def test_ties_go_to_the_first_tokens() -> None:
    tokens = planted(4, objects=[], deep=[])
    assert selected(HiPrune(), tokens, 3).indices.tolist() == [0, 1, 2]


def test_it_asks_for_the_ninth_layer_of_24_and_for_the_one_that_llava_reads() -> None:
    """The authors count from 1: their layer 9 is our 8."""
    assert HiPrune().needs == {OBJECT, DEEP}
    assert math.floor(HiPrune().object_depth * 24) == 8


def test_the_layers_are_knobs() -> None:
    tokens = with_object_layer(visual_tokens(side=12))
    last = HiPrune(register_layer=-1)
    assert last.needs == {OBJECT, ("received_attention", -1)}
    kept = selected(last, tokens, 36).indices.tolist()
    assert kept == slow_select(tokens, 36, 12, deep_key=("received_attention", -1))
    early = HiPrune(object_depth=0.1)
    assert early.needs == {("received_attention", 0.1), DEEP}
