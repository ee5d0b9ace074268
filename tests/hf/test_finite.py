"""A decoder that computes NaN or Inf is an error, not an empty answer: ours and stock ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_own_class import PROMPTS, SIZES
from tiny import FAMILIES, ONE, build, inputs_for
from torch import nn

from llava_todre import finite, hf
from llava_todre.errors import TodreError
from llava_todre.hf.capture import decoder_of
from llava_todre.model.load import load_pretrained_model
from llava_todre.vlm import ask

GOLDEN = Path(__file__).parents[1] / "golden"
SHORT = {"max_new_tokens": 4, "do_sample": False}


def nan_weight(model: Any) -> None:
    decoder_of(model).layers[3].mlp.down_proj.weight.data[5, 7] = torch.nan


def infinite_head(model: Any) -> None:
    model.lm_head.weight.data[9] = -torch.inf


def overflow(model: Any) -> None:
    model.to(torch.float16)
    for layer in decoder_of(model).layers:
        layer.mlp.up_proj.weight.data *= 1e4


def hidden_overflow(model: Any) -> None:
    """The square of the hidden states is infinite, and the last norm makes zeros of them."""
    decoder_of(model).layers[3].mlp.down_proj.weight.data.fill_(1e30)


def bad_norm(model: Any) -> None:
    decoder_of(model).norm.variance_epsilon = float("nan")


def bad_rope(model: Any) -> None:
    decoder_of(model).rotary_emb.inv_freq.fill_(torch.nan)


DAMAGES = [nan_weight, infinite_head, overflow, hidden_overflow, bad_norm, bad_rope]


def check(call: Callable[[], Any], model: nn.Module) -> None:
    with pytest.raises(TodreError, match="must be finite") as caught:
        call()
    assert "\n" not in str(caught.value)
    assert finite._STEP not in vars(model), "the model is as it was"


@pytest.mark.parametrize("method", ["vanilla", "fastervlm", "fastv", "todre", "todre_v1"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_ours(tiny_llava, damage, method):
    model = tiny_llava()
    knobs = {"probe_depths": (0.5,)} if method == "todre" else {}
    model.set_pruner(method, **({} if method == "vanilla" else {"retain_ratio": 0.25, **knobs}))
    damage(model)
    pixels = torch.randn(1, 5, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    shown = {"images": pixels, "image_sizes": SIZES[:1]}
    check(lambda: model.generate(torch.tensor(PROMPTS[:1]), **shown, **SHORT), model)
    if method == "vanilla" and damage in (nan_weight, infinite_head, bad_norm):  # of any prompt
        check(lambda: model.generate(torch.tensor([[1, 5]]), **SHORT), model)
        check(lambda: model.generate(torch.tensor([[1, 5]]), num_beams=2, **SHORT), model)


@pytest.mark.parametrize("method", ["vanilla", "fastv"])
@pytest.mark.parametrize("family", FAMILIES)
def test_stock(family, method):
    model = build(family)
    inputs = inputs_for(model, ONE)
    deep = {"layer": 5, "retain_ratio": 0.5} if method == "fastv" else {}
    nan_weight(model)
    with hf.prune(model, method, **deep):
        check(lambda: model.generate(**inputs, **SHORT), model)
        check(lambda: model.generate(torch.tensor([[7, 4]]), **SHORT), model)
    model.generate(**inputs, **SHORT)  # detached, it is transformers' own affair


@pytest.mark.parametrize("damage", DAMAGES)
def test_stock_damages(damage):
    model = build("llava_next")
    inputs = inputs_for(model, ONE)
    damage(model)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    with hf.prune(model, "todre", retain_ratio=0.25):
        check(lambda: model.generate(**inputs, **SHORT), model)


@pytest.mark.parametrize("method", ["vanilla", "todre"])
def test_pixels_of_stock_models(method):
    model = build("llava_next")
    inputs = inputs_for(model, ONE)
    inputs["pixel_values"][0, 1, 0, 3, 3] = torch.nan
    with hf.prune(model, method):
        check(lambda: model.generate(**inputs, **SHORT), model)


def test_one_look_per_prompt(tiny_llava, monkeypatch):
    looks: list[tuple[int, ...]] = []
    monkeypatch.setattr(finite, "require_finite", lambda logits: looks.append(logits.shape))
    model = tiny_llava()
    model.generate(torch.tensor([[1, 5], [1, 6]]), **SHORT)
    model.generate(torch.tensor([[1, 5]]), num_beams=3, **SHORT)
    other = build("llava_next")
    with hf.prune(other, "todre"):
        other.generate(**inputs_for(other, ONE), **SHORT)
    assert looks == [(2, 300), (3, 300), (1, 300)]


def test_a_message_says_how_many_prompts_and_which_type():
    logits = torch.arange(24, dtype=torch.float16).view(3, 8)
    finite.require_finite(logits)
    logits[1, 2] = torch.inf
    with pytest.raises(TodreError, match=r"logits of 1 of 3 prompts .* float16 overflows"):
        finite.require_finite(logits)


def test_answers_and_probes():
    tokenizer, model, _, _ = load_pretrained_model(GOLDEN / "llava-v1.6-tiny")
    image = Image.open(GOLDEN / "v16_0.png")
    model.set_pruner("todre_v1", retain_ratio=0.25)
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(TodreError, match=r"text_to_visual after decoder layer \d is nan"):
        ask(model, tokenizer, image, "what")
    model.set_pruner("vanilla")
    check(lambda: ask(model, tokenizer, image, "what"), model)
