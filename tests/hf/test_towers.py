"""Towers that a family's models may have, but that cannot be measured: refused when attached."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
import transformers
from conftest import randomise

from llava_todre import hf
from llava_todre.errors import TodreError
from llava_todre.pruners import PRUNERS, create_pruner

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
}
TOWERS = {
    "siglip_vision_model": ("SiglipVisionConfig", {"vision_use_head": False}),
    "pixtral": ("PixtralVisionConfig", {}),
    "dinov2": ("Dinov2Config", {}),
}
ASKS = {name: create_pruner(name).needs - {"text_embeds", "resized"} for name in PRUNERS}


def build(family: str, tower: str) -> Any:
    name, options = TOWERS[tower]
    model = f"{tiny._MODELS[family]}ForConditionalGeneration"
    config = tiny._llava(family, "llama", {})
    config["vision_config"] = getattr(transformers, name)(**VISION, **options)
    whole = getattr(transformers, model.replace("ForConditionalGeneration", "Config"))(**config)
    built = getattr(transformers, model)(whole).eval()
    randomise(built, 0)
    built.generation_config.eos_token_id = None
    return built


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_next_video"])
@pytest.mark.parametrize("tower", TOWERS)
def test_what_a_tower_cannot_give_is_refused_in_one_line(family: str, tower: str) -> None:
    model = build(family, tower)
    for name in (name for name, asks in ASKS.items() if asks):
        with pytest.raises(TodreError, match=f"a tower of type {tower} does not give") as caught:
            hf.attach(model, name)
        assert "\n" not in str(caught.value) and "clip_vision_model" in str(caught.value), name
    for name in (name for name, asks in ASKS.items() if not asks and name != "downsample"):
        hf.attach(model, name)
        hf.detach(model)


def test_methods_that_ask_nothing_of_it_work_on_another_tower() -> None:
    model = build("llava", "dinov2")
    ids = torch.tensor([[1, 5, *[tiny.IMAGE_ID] * 16, 7, 8]])
    with hf.prune(model, "divprune", retain_ratio=0.25):
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=torch.randn(1, 3, 56, 56),
            max_new_tokens=1,
            do_sample=False,
        )
        assert hf.last_stats(model)[0].kept_tokens == 4
