"""HiPrune against a plain reference."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import visual_tokens
from slow import at_every_shape, grid_of, groups, kept
from torch import Tensor

from llava_todre.pruners.hiprune import HiPrune
from llava_todre.spans import VisualTokens

OBJECT, DEEP = ("received_attention", 0.35), ("received_attention", -2)


def slow_select(tokens: VisualTokens, budget: int, side: int, alpha: float) -> list[int]:
    """The released rule for views of side x side patches, some of them unpadded."""
    objects, deep = tokens.vision[OBJECT].tolist(), tokens.vision[DEEP].tolist()
    cells = [
        side * row + column
        for row, column in zip(tokens.row.tolist(), tokens.column.tolist(), strict=True)
    ]
    picked: list[int] = []
    for members, share in groups(tokens, budget):
        at_cell = {cells[i]: i for i in members}
        anchors = sorted(members, key=lambda i: (-objects[i], i))[: round(share * alpha / 5)]
        chosen = list(anchors)
        for anchor in anchors:
            for step in (-1, 1, -side, side):
                cell = min(side * side - 1, max(0, cells[anchor] + step))
                if cell in at_cell and at_cell[cell] not in chosen:
                    chosen.append(at_cell[cell])
        registers = sorted((i for i in members if i not in chosen), key=lambda i: (-deep[i], i))
        picked += (chosen + registers)[:share]
    return sorted(picked)


def with_object_layer(tokens: VisualTokens) -> VisualTokens:
    return dataclasses.replace(
        tokens, vision={**tokens.vision, OBJECT: tokens.vision["received_attention", 8]}
    )


@at_every_shape
@pytest.mark.parametrize("alpha", [0.1, 0.6])
def test_it_keeps_what_the_slow_reference_keeps(shape: dict, alpha: float, ratio: float) -> None:
    tokens = with_object_layer(visual_tokens(**shape))
    budget = round(ratio * len(tokens))
    expected = slow_select(tokens, budget, shape.get("side", 24), alpha)
    assert kept(HiPrune(alpha=alpha), tokens, budget) == expected


@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("budget", [1, 2, 3, 4, 5, 6, 13, 25, 26, 28, 142, 143])
def test_any_budget_is_met_exactly(alpha: float, budget: int) -> None:
    tokens = with_object_layer(visual_tokens(side=12))
    expected = slow_select(tokens, budget, 12, alpha)
    assert kept(HiPrune(alpha=alpha), tokens, budget) == expected


def planted(side: int, objects: list[int], deep: list[int]) -> VisualTokens:
    """One view in which object and deep layer rank these patches first, in this order."""

    def scores(ranked: list[int]) -> Tensor:
        values = torch.zeros(side * side)
        values[ranked] = torch.arange(len(ranked), 0, -1) / 10
        return values

    return grid_of(side, side, vision={OBJECT: scores(objects), DEEP: scores(deep)})


def test_anchors_bring_their_neighbours_and_registers_fill_up() -> None:
    """Budget 7 of 5 x 5, one anchor (7 / 5 rounds to 1): 12, its cross, and the deep layer's best.

    The deep layer's first choice, 12, is there already, and so are 7 and 11.
    """
    tokens = planted(5, objects=[12, 24], deep=[12, 7, 11, 20, 4, 3])
    assert kept(HiPrune(alpha=1.0), tokens, 7) == [4, 7, 11, 12, 13, 17, 20]


def test_an_anchor_counts_five_and_half_an_anchor_rounds_to_even() -> None:
    """round(0.5) is 0 and round(1.5) is 2, as in the released code."""
    tokens = planted(24, objects=[100, 400], deep=[30, 31, 32])
    assert 100 not in kept(HiPrune(), tokens, 25)
    assert {100, 99, 101, 76, 124} <= set(kept(HiPrune(), tokens, 26))
    assert 400 in kept(HiPrune(), tokens, 75)


def test_neighbours_at_the_edge_follow_the_released_code() -> None:
    """Patch 5 of 5 x 5 has 4, the end of the row above, to its left; patch 2 has 0 above it.

    Patch 22 has 24, the last, below it.
    """
    for anchor, neighbours in {5: {4, 6, 0, 10}, 2: {1, 3, 0, 7}, 22: {21, 23, 17, 24}}.items():
        tokens = planted(5, objects=[anchor], deep=[])
        assert set(kept(HiPrune(alpha=1.0), tokens, 5)) == neighbours | {anchor}


def test_buffers_of_the_best_anchor_come_first() -> None:
    """Budget 13 makes three anchors (2.6), which with their crosses would be fifteen."""
    tokens = planted(9, objects=[40, 60, 20], deep=[0, 80])
    expected = sorted([40, 60, 20] + [39, 41, 31, 49] + [59, 61, 51, 69] + [19, 21])
    assert kept(HiPrune(alpha=1.0), tokens, 13) == expected
