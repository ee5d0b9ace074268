"""What is special about stock Qwen2-VL, Qwen2.5-VL and Qwen3-VL: positions, cells, windows."""

from __future__ import annotations

import copy
import dataclasses
import importlib
from typing import Any

import numpy as np
import pytest
import torch
from checks import Watch
from PIL import Image
from tiny import ONE, PATCH, QWEN, inputs_for, model_of
from torch import Tensor
from transformers import Qwen2VLImageProcessorPil

from llava_todre import hf
from llava_todre.errors import TodreError
from llava_todre.hf.families import family_of

STAGE_1 = {"method": "todre", "probe_depths": ()}


@pytest.mark.parametrize("family", QWEN)
def test_layers_also_get_positions_without_gaps(family):
    """FlashAttention would take a gap for a boundary between two sequences."""
    model = model_of(family)
    got: list[Tensor] = []

    def note(layer: Any, args: Any, kwargs: Any) -> None:
        got.append(kwargs["position_ids"])

    handle = model.model.language_model.layers[0].register_forward_pre_hook(note, with_kwargs=True)
    with hf.prune(model, retain_ratio=0.25, **STAGE_1):
        model.generate(**inputs_for(model, ONE), max_new_tokens=3)
        (stats,) = hf.last_stats(model)
    handle.remove()
    length = stats.prompt_tokens_per_layer[0]
    assert [each.tolist() for each in got] == [[[*range(length)]], [[length]], [[length + 1]]]


# ---------------------------------------------------------------- where tokens stand


def coloured(views: int, rows: int, columns: int) -> Tensor:
    """Return (views, rows, columns, 3) a colour for every token, no two alike."""
    count = views * rows * columns
    return torch.arange(count * 3).view(views, rows, columns, 3) * 255 // (count * 3)


def processed(colours: Tensor) -> tuple[Tensor, Tensor]:
    """Return pixels and grid (1, 3) that the processor makes of frames in these colours."""
    processor = Qwen2VLImageProcessorPil(patch_size=PATCH, min_pixels=1, max_pixels=10**8)
    pixels, grids = [], []
    for frame in colours:
        picture = np.kron(frame.numpy(), np.ones((2 * PATCH, 2 * PATCH, 1))).astype(np.uint8)
        made = processor(Image.fromarray(picture), return_tensors="pt")
        pixels.append(made["pixel_values"])
        grids.append(made["image_grid_thw"])
    return torch.cat(pixels), grids[0] * torch.tensor([len(colours), 1, 1])


@pytest.mark.parametrize("family", QWEN)
def test_a_token_is_where_its_colour_is(family, monkeypatch):
    """The blocks of this tower do nothing, so a token is made of the patches under it alone."""
    model = copy.deepcopy(model_of(family))
    for block in model.model.visual.blocks:
        block.attn.proj.weight.data.zero_()
        block.attn.proj.bias.data.zero_()
        for weight in block.mlp.parameters():
            weight.data.zero_()
    if family == "qwen3_vl":
        model.model.visual.pos_embed.weight.data.zero_()
    image, video = coloured(1, 3, 5), coloured(3, 2, 3)
    pruner = Watch(quantity="received_attention", retain_ratio=0.5)
    raw = dataclasses.replace(
        family_of(model), measure=lambda quantity, layer, hidden, called: hidden
    )
    monkeypatch.setattr("llava_todre.hf.attachment.family_of", lambda model: raw)
    inputs = inputs_for(model, [[2, (42, 70), 3, "video", 4]])
    inputs["pixel_values"], inputs["image_grid_thw"] = processed(image)
    inputs["pixel_values_videos"], inputs["video_grid_thw"] = processed(video)
    with hf.prune(model, pruner):
        model.generate(**inputs, max_new_tokens=1)
    for tokens, colours in zip(pruner.seen, (image, video), strict=True):
        assert len(tokens) == colours[..., 0].numel()
        assert tokens.is_video == (len(colours) > 1)
        where = torch.stack([tokens.view, tokens.row, tokens.column])
        assert where.unique(dim=1).shape[1] == len(tokens)
        for index, place in enumerate(zip(tokens.view, tokens.row, tokens.column, strict=True)):
            pixels, grid = processed(colours[place].expand(1, 2, 2, 3))
            alone = model.model.get_image_features(pixels, grid).pooler_output[0][0]
            torch.testing.assert_close(tokens.features[index], alone, rtol=0, atol=1e-5)
            patch = model.model.visual.patch_embed(pixels)[0]
            measured = tokens.vision["received_attention", 0][index]
            torch.testing.assert_close(measured, patch, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", QWEN)
def test_received_attention_is_that_of_the_tower(family, monkeypatch):
    """The reference runs the tower in eager mode, without windows, and reads its maps."""
    model = copy.deepcopy(model_of(family))
    given = inputs_for(model, [[2, (56, 84), 3, "video", 5]])
    if family == "qwen2_5_vl":  # so that the order of windows is all that differs
        model.model.visual.fullatt_block_indexes = range(4)
    monkeypatch.setattr("llava_todre.hf.qwen._MAX_ENTRIES", 4 * 96 * 5)  # five rows at a time
    watch = Watch(quantity="received_attention", retain_ratio=0.5, layer=-1)
    with hf.prune(model, watch):
        model.generate(**given, max_new_tokens=1)
    model.set_attn_implementation("eager")
    module = importlib.import_module(type(model).__module__)
    maps: list[Tensor] = []
    eager = module.eager_attention_forward

    def noting(*args: Any, **kwargs: Any) -> Any:
        output, weights = eager(*args, **kwargs)
        maps.append(weights)
        return output, weights

    def unpermuted(grid: Tensor, **kwargs: Any) -> Any:
        return torch.arange(int(grid.prod(-1).sum()) // 4), torch.zeros(2, dtype=torch.int32)

    monkeypatch.setattr(module, "eager_attention_forward", noting)
    if family == "qwen2_5_vl":
        monkeypatch.setattr(module, "get_vision_window_index", unpermuted)
    for tokens, pixels, grid in zip(
        watch.seen,
        (given["pixel_values"], given["pixel_values_videos"]),
        (given["image_grid_thw"], given["video_grid_thw"]),
        strict=True,
    ):
        maps.clear()
        with torch.no_grad():
            model.model.visual(pixels, grid_thw=grid)
        last = maps[-int(grid[0, 0]) :]  # of each view, (1, H, n, n)
        received = torch.cat([each[0].mean(dim=(0, 1)) for each in last])
        assert received.std() > 0.05 * received.mean()
        measured = tokens.vision["received_attention", -1]
        torch.testing.assert_close(measured, received.view(-1, 4).mean(dim=1))


def test_windowed_layers_of_qwen2_5_pass_the_question_to_the_nearest_that_sees_everything():
    answers, model = [], model_of("qwen2_5_vl")
    for layer in (-2, 3, 1):
        watch = Watch(quantity="received_attention", retain_ratio=0.5, layer=layer)
        with hf.prune(model, watch):
            model.generate(**inputs_for(model, ONE), max_new_tokens=1)
        answers.append(watch.seen[0].vision["received_attention", layer])
    near_the_end, last, first = answers
    assert torch.equal(near_the_end, first)  # of 1 and 3, equally near to 2, the first
    assert not torch.equal(last, first)


# ---------------------------------------------------------------- methods


@pytest.mark.parametrize("family", QWEN)
def test_without_a_cls_token_received_attention_takes_its_place(family):
    model = model_of(family)
    assert family_of(model).proxies == {"cls_attention": "received_attention"}
    with hf.prune(model, "fastervlm", retain_ratio=0.25):
        model.generate(**inputs_for(model, ONE), max_new_tokens=1)
        (image,) = hf.last_stats(model)[0].images
    watch = Watch(quantity="received_attention", retain_ratio=0.5, layer=-2)
    with hf.prune(model, watch):
        model.generate(**inputs_for(model, ONE), max_new_tokens=1)
    best = watch.seen[0].vision["received_attention", -2].topk(len(image.keep_idx)).indices
    assert image.keep_idx.tolist() == best.sort().values.tolist()


@pytest.mark.parametrize("method", ["visionzip", "prumerge", "globalcom2", "downsample"])
@pytest.mark.parametrize("family", QWEN)
def test_a_need_that_the_tower_cannot_meet_is_an_error_of_one_line(family, method):
    with pytest.raises(TodreError, match=f"the family {family} do not give; allowed needs") as told:
        hf.attach(model_of(family), method)
    assert "\n" not in str(told.value)


def test_no_token_leaves_qwen3_vl_before_all_its_image_features_have_been_added():
    model = model_of("qwen3_vl")
    with pytest.raises(TodreError, match="after decoder layer 2 or later, .* up to layer 1"):
        hf.attach(model, "fastv", layer=2)
    with hf.prune(model, "fastv", layer=3):
        model.generate(**inputs_for(model, ONE), max_new_tokens=2)


@pytest.mark.parametrize("family", QWEN)
def test_a_prompt_without_token_types_is_an_error(family):
    model = model_of(family)
    inputs = inputs_for(model, ONE)
    del inputs["mm_token_type_ids"]
    with (
        hf.prune(model, retain_ratio=0.25),
        pytest.raises(TodreError, match="mm_token_type_ids is missing"),
    ):
        model.generate(**inputs, max_new_tokens=1)


@pytest.mark.parametrize("family", QWEN)
def test_off_asks_for_nothing_that_the_model_itself_does_not_need(family):
    model = model_of(family)
    inputs = inputs_for(model, ONE)
    for key in ("mm_token_type_ids", "attention_mask"):
        inputs.pop(key)
    ids = inputs.pop("input_ids")
    settings = {"max_new_tokens": 3, "do_sample": False}
    plain = model.generate(ids, **inputs, **settings)
    with hf.prune(model, "vanilla"):
        assert torch.equal(model.generate(ids, **inputs, **settings), plain)
