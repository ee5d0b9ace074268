"""PyramidDrop against a plain reading of its specification."""

from __future__ import annotations

import pytest
from layer_views import (
    HEADS,
    INSIDE,
    LLAVA_15,
    VISUAL,
    assert_keeps,
    attention_row,
    best,
    patches_per_layer,
)

from llava_todre.pruners.pyramiddrop import PyramidDrop


def reference(case, count):
    last = len(case.kinds) - 1
    rows = [attention_row(case.queries_ahead, case.keys_ahead, head, last) for head in range(HEADS)]
    return best(sum(rows) / HEADS, case.where(VISUAL), count)


@pytest.mark.parametrize("inside", INSIDE)
def test_it_keeps_what_the_last_token_will_attend_to_most(inside):
    assert_keeps(PyramidDrop, reference, inside, layer=23)


def test_the_default_is_the_schedule_of_its_authors():
    """50, 25 and 12.5 % of the patches enter layers 8, 16 and 24 of 32."""
    counts = patches_per_layer(PyramidDrop(), LLAVA_15, 32)
    assert counts == [576] * 8 + [288] * 8 + [144] * 8 + [72] * 8
    assert PyramidDrop().mean_share(0.125, 32) == pytest.approx(0.46875)


def test_every_stage_drops_the_same_factor():
    shares = PyramidDrop().stages(0.4, 32)
    assert list(shares) == [7, 15, 23]
    assert list(shares.values()) == pytest.approx([0.4 ** (1 / 3), 0.4 ** (2 / 3), 0.4])
    assert PyramidDrop(prune_depths=(0.75, 0.5)).stages(0.25, 32) == {15: 0.5, 23: 0.25}


@pytest.mark.parametrize(
    ("depths", "num_layers", "layers"),
    [
        ((0.25, 0.5, 0.75), 40, (9, 19, 29)),
        ((0.25, 0.5, 0.75), 8, (1, 3, 5)),
        ((0.25, 0.5, 0.75), 2, (0,)),
        ((0.3, 1.0), 32, (8,)),
        ((), 32, ()),
    ],
)
def test_depths_name_the_first_layer_on_fewer_tokens(depths, num_layers, layers):
    assert PyramidDrop(prune_depths=depths).probe_layers(num_layers) == layers
