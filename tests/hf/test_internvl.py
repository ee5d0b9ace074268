"""What is special about stock InternVL: tiles, and prompts that do not say how many."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from checks import Watch
from PIL import Image
from tiny import ONE, PATCH, TILE, build, inputs_for, model_of
from torch import Tensor
from transformers import GotOcr2ImageProcessorPil

from llava_todre import hf
from llava_todre.errors import TodreError
from llava_todre.hf.families import family_of
from llava_todre.hf.internvl import tiles_layout

SIDE, TOKENS = 4, 16


# ---------------------------------------------------------------- where tokens stand


def processed(colours: Tensor) -> Tensor:
    """Return the tiles (T, 3, TILE, TILE) of a picture of (rows, columns, 3), a colour a token."""
    picture = np.kron(colours.numpy(), np.ones((2 * PATCH, 2 * PATCH, 1))).astype(np.uint8)
    processor = GotOcr2ImageProcessorPil(size={"height": TILE, "width": TILE})
    made = processor(Image.fromarray(picture), crop_to_patches=True, return_tensors="pt")
    return made["pixel_values"]


def test_a_token_is_where_its_colour_is(monkeypatch):
    """The blocks of this tower do nothing, so a token is made of the patches under it alone.

    The picture is two tiles high and three wide; the processor adds the thumbnail.
    """
    model = copy.deepcopy(model_of("internvl"))
    tower = model.model.vision_tower
    tower.embeddings.position_embeddings.data.zero_()
    for block in tower.encoder.layer:
        block.lambda_1.data.zero_()
        block.lambda_2.data.zero_()
    count = 2 * SIDE * 3 * SIDE
    colours = (torch.arange(count * 3).view(2 * SIDE, 3 * SIDE, 3) * 255) // (count * 3)
    tiles = processed(colours)
    assert len(tiles) == 7
    watch = Watch(quantity="cls_attention", retain_ratio=0.5)
    raw = dataclasses.replace(
        family_of(model),
        measure=lambda quantity, layer, hidden, called: hidden[:, 1:].flatten(0, 1),
    )
    monkeypatch.setattr("llava_todre.hf.attachment.family_of", lambda model: raw)
    inputs = inputs_for(model, [[2, (56, 350), 4]]) | {"pixel_values": tiles}
    with hf.prune(model, watch):
        model.generate(**inputs, max_new_tokens=1)
    (tokens,) = watch.seen
    assert tokens.view.unique().tolist() == list(range(7))
    assert (
        torch.stack([tokens.view, tokens.row, tokens.column]).unique(dim=1).shape[1] == 7 * TOKENS
    )

    def alone(pixels: Tensor) -> tuple[Tensor, Tensor]:  # of a (3, 28, 28) cell
        whole = pixels.repeat(1, SIDE, SIDE)[None]
        feature = model.model.get_image_features(whole).pooler_output[0, 0]
        return feature, tower.embeddings(whole)[0, 1:].view(8, 8, -1)[:2, :2].mean(dim=(0, 1))

    flat = processed(colours[:1, :1].expand(SIDE, SIDE, 3))  # one tile, for the scale of colours
    assert flat.shape[0] == 1
    cell = 2 * PATCH
    for index in range(len(tokens)):
        view, row, column = (int(each[index]) for each in (tokens.view, tokens.row, tokens.column))
        if view:
            down, right = divmod(view - 1, 3)
            colour = colours[down * SIDE + row, right * SIDE + column]
            shown = processed(colour.expand(SIDE, SIDE, 3))[0, :, :cell, :cell]
        else:  # the thumbnail mixes colours
            shown = tiles[-1][:, row * cell : (row + 1) * cell, column * cell : (column + 1) * cell]
        feature, patch = alone(shown)
        torch.testing.assert_close(tokens.features[index], feature, rtol=0, atol=1e-4)
        measured = tokens.vision["cls_attention", 0][index]
        torch.testing.assert_close(measured, patch, rtol=0, atol=1e-4)


def test_one_tile_is_the_only_view():
    layout = tiles_layout(1, 8, 2)
    assert layout.view.unique().tolist() == [0]
    assert layout.num_patches == 64
    assert layout.sources[1].tolist() == [2, 3, 10, 11]


@pytest.mark.parametrize("qk_norm", [False, True])
def test_cls_attention_is_that_of_the_tower(qk_norm):
    """The maps are those of the tower in eager mode."""
    model = build("internvl", attention="eager", vision={"use_qk_norm": qk_norm})
    inputs = inputs_for(model, ONE)
    watch = Watch(quantity="cls_attention", retain_ratio=0.5, layer=2)
    with hf.prune(model, watch):
        model.generate(**inputs, max_new_tokens=1)
    maps: list[Tensor] = []
    attention = model.model.vision_tower.encoder.layer[2].attention
    handle = attention.register_forward_hook(lambda module, args, output: maps.append(output[1]))
    with torch.no_grad():
        model.model.get_image_features(inputs["pixel_values"])
    handle.remove()
    paid = maps[0][:, :, 0, 1:].mean(dim=1)  # (tiles, patches)
    cells = paid.view(4, SIDE, 2, SIDE, 2).mean(dim=(2, 4)).flatten()
    torch.testing.assert_close(watch.seen[0].vision["cls_attention", 2], cells)


# ---------------------------------------------------------------- errors, and off


@pytest.mark.parametrize("missing", [1, TOKENS])
def test_a_prompt_that_does_not_fit_the_pixels_is_an_error_of_one_line(missing):
    model = model_of("internvl")
    inputs = inputs_for(model, ONE)
    keep = torch.ones(inputs["input_ids"].shape[1], dtype=torch.bool)
    keep[10 : 10 + missing] = False
    inputs |= {key: inputs[key][:, keep] for key in ("input_ids", "attention_mask")}
    message = "must be a multiple of 16" if missing == 1 else "must have 3 tiles"
    with hf.prune(model, retain_ratio=0.25), pytest.raises(TodreError, match=message) as told:
        model.generate(**inputs, max_new_tokens=1)
    assert "\n" not in str(told.value)


def test_off_asks_for_nothing_that_the_model_itself_does_not_need() -> None:
    model = model_of("internvl")
    inputs = inputs_for(model, ONE)
    inputs.pop("attention_mask")
    ids = inputs.pop("input_ids")
    plain = model.generate(ids, **inputs, max_new_tokens=3, do_sample=False)
    with hf.prune(model, "vanilla"):
        given = model.generate(ids, **inputs, max_new_tokens=3, do_sample=False)
        assert torch.equal(given, plain) and len(hf.last_stats(model)) == 1
