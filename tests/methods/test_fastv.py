"""FastV against a plain reading of its specification."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from layer_views import (
    HEADS,
    INSIDE,
    PROMPTS,
    SYSTEM,
    TEXT,
    VISUAL,
    assert_keeps,
    attention_row,
    best,
    kept_patches,
    make_case,
)

from llava_todre.errors import TodreError
from llava_todre.pruners.fastv import FastV


def reference(case, count):
    last = len(case.kinds) - 1
    scores = sum(attention_row(case.queries, case.keys, head, last) for head in range(HEADS))
    return best(scores / HEADS, case.where(VISUAL), count)


@pytest.mark.parametrize("inside", INSIDE)
def test_it_keeps_what_the_last_token_attends_to_most(inside):
    assert_keeps(FastV, reference, inside, layer=1)


def test_heads_count_alike():
    """One head prefers patch 1 a little, three of four patch 2: their mean decides."""
    weights = torch.tensor([[0.9, 0.0, 0.1], *[[0.2, 0.6, 0.2]] * 3])
    queries, keys = torch.zeros(4, 1, 3), torch.zeros(4, 5, 3)
    queries[:, 0, 0] = 1.0
    keys[:, 1:4] = weights.clamp_min(1e-3).log()[:, :, None]
    given = {"queries": lambda rows: queries, "keys": lambda: keys, "scaling": 1.0}
    case = make_case([SYSTEM, VISUAL, VISUAL, VISUAL, TEXT], **given)
    assert kept_patches(case, FastV(retain_tokens=1).at_layer(case.view)) == {2}


def test_equal_scores_go_to_the_first():
    case = make_case(PROMPTS["LLaVA-1.5"], keys=lambda: torch.ones(4, 631, 16))
    kept = kept_patches(case, FastV(retain_tokens=100).at_layer(case.view))
    assert kept == set(range(35, 135))


@pytest.mark.parametrize(("layer", "probes"), [(2, (1,)), (3, (2,)), (1, (0,)), (31, (30,))])
def test_layer_k_is_the_first_to_work_on_fewer_tokens(layer, probes):
    pruner = FastV(layer=layer)
    assert pruner.probe_layers(32) == probes
    assert np.isclose(pruner.mean_share(0.0, 32), layer / 32)


def test_a_layer_the_decoder_does_not_have_is_refused():
    with pytest.raises(TodreError, match="layer must be from 1 to 31 .* 32 layers, got 32"):
        FastV(layer=32).probe_layers(32)
    assert FastV(layer=32, retain_ratio=1.0).probe_layers(32) == ()
