"""Our own class and the stock one, same weights and method: same tokens kept, same answers."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from conftest import PINPOINTS
from reference import IMAGE
from stock import prompt_for, stock
from torch.nn.utils.rnn import pad_sequence

from llava_todre import hf
from llava_todre.pruners import PRUNERS
from llava_todre.stage1.anyres import anyres_grid_shape

METHODS = [name for name in PRUNERS if name not in ("vanilla", "downsample")]  # needs ``resized``
PROMPTS = [[1, 5, 6, IMAGE, 7, 8, 9, 10, 11], [1, 4, IMAGE, 3, 17, 23]]
SIZES = [(120, 80), (113, 111)]  # (width, height), five views each
NEW = {"max_new_tokens": 8, "do_sample": False}


def knobs_of(method: str) -> dict[str, Any]:
    return {"retain_ratio": 0.25} | ({"tau": 0.6} if method.startswith("todre") else {})


def assert_same(ours: tuple[Any, Any], theirs: tuple[Any, Any]) -> None:
    assert torch.equal(ours[0], theirs[0])
    for own, other in zip(ours[1], theirs[1], strict=True):
        assert own.prompt_tokens_per_layer == other.prompt_tokens_per_layer
        assert own.visual_tokens_per_layer == other.visual_tokens_per_layer
        assert [probe.dropped for probe in own.probes] == [probe.dropped for probe in other.probes]
        for image, same in zip(own.images, other.images, strict=True):
            assert torch.equal(image.keep_idx, same.keep_idx)
            assert torch.equal(image.patches, same.patches)
            assert image.num_newlines == same.num_newlines


@pytest.mark.parametrize(
    ("method", "newlines"),
    [*((method, "row") for method in METHODS), *product(("todre", "fastv"), ("all", "none"))],
)
def test_llava_next(tiny_llava, draw, method, newlines):
    knobs = knobs_of(method) | {"newlines": newlines}
    model = tiny_llava("sdpa")
    other = stock(model)
    other.generation_config.pad_token_id = 0
    assert [anyres_grid_shape(size, PINPOINTS, 56) for size in SIZES] == [(2, 2), (2, 2)]
    pixels = torch.randn(2, 5, 3, 56, 56, generator=draw)
    ids = pad_sequence([torch.tensor(row) for row in PROMPTS], True, 0, padding_side="left")
    model.set_pruner(method, **knobs)
    new = model.generate(
        ids, attention_mask=(ids != 0).long(), images=pixels, image_sizes=SIZES, **NEW
    )
    ours = new, model.last_stats

    rows = []
    for row, prompt in enumerate(PROMPTS):
        image = ours[1][row].images[0]
        rows.append(prompt_for(prompt, [image.num_tokens + image.num_newlines])[0])
    padded = pad_sequence(rows, True, 0, padding_side="left")
    with hf.prune(other, method, **knobs):
        output = other.generate(
            input_ids=padded,
            attention_mask=(padded != 0).long(),
            pixel_values=pixels,
            image_sizes=torch.tensor([[height, width] for width, height in SIZES]),
            **NEW,
        )
        theirs = output[:, padded.shape[1] :], hf.last_stats(other)
    assert_same(ours, theirs)
    assert ours[1][0].mean_visual_tokens < 88


@pytest.mark.parametrize("method", ["todre", "fastv", "visionzip", "cdpruner"])
def test_llava_1_5_with_two_images(tiny_llava, draw, method):
    model = tiny_llava("sdpa", image_aspect_ratio="pad", mm_patch_merge_type="flat")
    other = stock(model)
    ids = [1, 5, IMAGE, 7, IMAGE, 8, 9]
    pixels = torch.randn(2, 3, 56, 56, generator=draw)
    model.set_pruner(method, **knobs_of(method))
    new = model.generate(torch.tensor([ids]), images=pixels, **NEW)
    ours = new, model.last_stats

    padded = prompt_for(ids, [16, 16])
    with hf.prune(other, method, **knobs_of(method)):
        output = other.generate(
            padded, attention_mask=torch.ones_like(padded), pixel_values=pixels, **NEW
        )
        theirs = output[:, padded.shape[1] :], hf.last_stats(other)
    assert_same(ours, theirs)
