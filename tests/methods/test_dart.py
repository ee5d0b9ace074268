"""DART against a plain reading of its specification."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from layer_views import (
    INSIDE,
    LLAVA_15,
    SYSTEM,
    TEXT,
    VISUAL,
    assert_keeps,
    kept_patches,
    make_case,
)

from llava_todre.pruners.dart import DART


def reference(case, count, num_image=4, num_text=4):
    length = [float(np.abs(case.keys[:, i]).sum()) for i in range(len(case.kinds))]

    def pivots(kind, most):
        return sorted(sorted(case.where(kind), key=lambda i: -length[i])[:most])

    normed = case.view.decoder.final_norm(torch.tensor(case.hidden)).numpy()
    normed = normed / np.linalg.norm(normed, axis=1, keepdims=True)
    image, text = pivots(VISUAL, min(num_image, count)), pivots(TEXT, num_text)
    kept, turns = set(image), image + text
    for turn, pivot in enumerate(turns):
        quota = (count - len(image)) // len(turns) + (turn < (count - len(image)) % len(turns))
        similarity = normed @ normed[pivot]
        free = [i for i in case.where(VISUAL) if i not in kept]
        kept |= set(sorted(free, key=lambda i: (similarity[i], i))[:quota])
    return kept


@pytest.mark.parametrize(
    "inside", INSIDE + [({"retain_tokens": n}, LLAVA_15, (576,)) for n in (2, 3, 4, 5, 12, 13, 132)]
)
def test_it_keeps_pivots_and_what_is_least_like_them(inside):
    assert_keeps(DART, reference, inside, layer=1)


@pytest.mark.parametrize(("num_image", "num_text"), [(1, 0), (3, 9), (50, 50), (4, 1)])
def test_the_numbers_of_pivots_are_options(num_image, num_text):
    """There are 20 text tokens: 50 pivots among them are 20."""
    case = make_case(LLAVA_15)
    pruner = DART(image_pivots=num_image, text_pivots=num_text)
    kept = kept_patches(case, pruner.at_layer(case.view))
    assert kept == reference(case, 58, num_image, num_text)


# Six patches, pivots: patch 1 and the first text token. Directions are angles in degrees.
KINDS = [SYSTEM] + [VISUAL] * 6 + [TEXT] * 2
ANGLES = [0, 0, 90, 80, 100, 179, 70, 90, 90]
STRENGTH = [9, 5, 4, 3, 2, 1, 0, 8, 7]


def small_case(**options):
    angles = torch.deg2rad(torch.tensor(ANGLES, dtype=torch.float32))
    keys = torch.zeros(4, 9, 16)
    keys[1, :, 0] = torch.tensor(STRENGTH, dtype=torch.float32)
    return make_case(
        KINDS,
        hidden=torch.stack([angles.cos(), angles.sin()], dim=1) * torch.arange(1, 10)[:, None],
        width=2,
        keys=lambda: keys,
        final_norm=lambda rows: rows,
        **options,
    )


@pytest.mark.parametrize(
    ("count", "kept"),
    [
        (1, {1}),  # the strongest patch
        (2, {1, 5}),  # opposite to patch 1
        (3, {1, 5, 6}),  # 89 degrees from text (patch 5) is taken; 20 degrees is next
        (4, {1, 5, 4, 6}),  # patch 1 takes 5 and 4, then the text takes 6
    ],
)
def test_pivots_take_turns_image_first(count, kept):
    case = small_case()
    pruner = DART(retain_tokens=count, image_pivots=1, text_pivots=1)
    assert kept_patches(case, pruner.at_layer(case.view)) == kept


def test_pivots_are_the_longest_keys_by_the_l1_norm_over_all_heads():
    """Patch 2 is longest by L1, patch 3 by L2 and in every single head but the first."""
    keys = torch.zeros(4, 9, 16)
    keys[:, 3, 0] = 3.0
    keys[0, 2, :14] = 1.0
    case = make_case(KINDS, keys=lambda: -keys)
    assert kept_patches(case, DART(retain_tokens=1).at_layer(case.view)) == {2}


def test_similarity_is_that_of_the_states_after_the_final_norm():
    """The norm turns the plane: what was opposite to the pivot is now the same."""
    case = small_case()
    pruner = DART(retain_tokens=2, image_pivots=1, text_pivots=0)
    assert kept_patches(case, pruner.at_layer(case.view)) == {1, 5}
    folded = make_case(
        KINDS,
        hidden=case.view.hidden_states(),
        keys=case.view.keys,
        final_norm=lambda rows: rows.abs(),
    )
    assert kept_patches(folded, pruner.at_layer(folded.view)) == {1, 2}
