"""Unpruned, our model equals transformers' own LLaVA classes on the same weights."""

from __future__ import annotations

import pytest
import torch
from conftest import PINPOINTS
from reference import IMAGE
from stock import prompt_for, stock

from llava_todre.model.llava import LlavaLlamaForCausalLM
from llava_todre.stage1.anyres import anyres_grid_shape

SIZES = [(120, 80), (64, 150), (113, 111), (201, 60), (33, 110), (40, 30), (500, 59), (57, 499)]
TOLERANCE = {"rtol": 0, "atol": 2e-5}  # 7e-6 measured; logits have a spread of 1


def num_visual_tokens(model: LlavaLlamaForCausalLM) -> list[int]:
    stats = model.last_stats[0]
    counts = [image.num_tokens for image in stats.images]
    assert len(counts) == 1 or stats.newline_tokens == 0
    return [counts[0] + stats.newline_tokens, *counts[1:]]


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_llava_next(tiny_llava, attention, draw, size):
    model = tiny_llava(attention)
    other = stock(model)
    columns, rows = anyres_grid_shape(size, PINPOINTS, 56)
    pixels = torch.randn(1, 1 + columns * rows, 3, 56, 56, generator=draw)
    ids = [1, 5, 6, IMAGE, 7, 8, 9]
    ours = {"images": pixels, "image_sizes": [size]}
    logits = model(torch.tensor([ids]), **ours).logits
    new = model.generate(torch.tensor([ids]), **ours, max_new_tokens=12, do_sample=False)

    theirs = {"pixel_values": pixels, "image_sizes": torch.tensor([[size[1], size[0]]])}
    theirs["input_ids"] = prompt_for(ids, num_visual_tokens(model))
    torch.testing.assert_close(logits, other(**theirs).logits, **TOLERANCE)
    length = theirs["input_ids"].shape[1]
    generated = other.generate(
        **theirs, attention_mask=torch.ones(1, length), max_new_tokens=12, do_sample=False
    )
    assert torch.equal(new, generated[:, length:])


@pytest.mark.parametrize("ids", [[1, 5, 6, IMAGE, 7, 8, 9], [1, IMAGE, 7, IMAGE, 8, 9]])
@torch.no_grad()
def test_llava_1_5(tiny_llava, attention, draw, ids):
    model = tiny_llava(attention, image_aspect_ratio="pad", mm_patch_merge_type="flat")
    other = stock(model)
    pixels = torch.randn(ids.count(IMAGE), 3, 56, 56, generator=draw)
    logits = model(torch.tensor([ids]), images=pixels).logits
    new = model.generate(torch.tensor([ids]), images=pixels, max_new_tokens=12, do_sample=False)

    theirs = {"pixel_values": pixels, "input_ids": prompt_for(ids, num_visual_tokens(model))}
    torch.testing.assert_close(logits, other(**theirs).logits, **TOLERANCE)
    length = theirs["input_ids"].shape[1]
    generated = other.generate(
        **theirs, attention_mask=torch.ones(1, length), max_new_tokens=12, do_sample=False
    )
    assert torch.equal(new, generated[:, length:])


@torch.no_grad()
def test_llava_next_in_a_left_padded_batch(tiny_llava, attention, draw):
    model = tiny_llava(attention)
    other = stock(model)
    sizes = [(120, 80), (113, 111)]  # five views each
    pixels = torch.randn(2, 5, 3, 56, 56, generator=draw)
    prompts = [[1, 5, 6, IMAGE, 7, 8, 9], [1, 4, IMAGE, 3]]
    ids, mask = torch.zeros(2, 7, dtype=torch.int64), torch.zeros(2, 7, dtype=torch.int64)
    rows = []
    for row, prompt in enumerate(prompts):
        ids[row, -len(prompt) :], mask[row, -len(prompt) :] = torch.tensor(prompt), 1
        model(
            torch.tensor([prompt]), images=pixels[row : row + 1], image_sizes=sizes[row : row + 1]
        )
        rows.append(prompt_for(prompt, num_visual_tokens(model))[0])
    new = model.generate(
        ids, attention_mask=mask, images=pixels, image_sizes=sizes, max_new_tokens=12,
        do_sample=False,
    )  # fmt: skip
    padded = torch.nn.utils.rnn.pad_sequence(rows, True, 0, padding_side="left")
    generated = other.generate(
        input_ids=padded,
        attention_mask=(padded != 0).long(),
        pixel_values=pixels,
        image_sizes=torch.tensor([[height, width] for width, height in sizes]),
        max_new_tokens=12,
        do_sample=False,
    )
    assert torch.equal(new, generated[:, padded.shape[1] :])
