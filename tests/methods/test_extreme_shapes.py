"""Every method on images of which little or nothing is left beside the thumbnail."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_todre import PRUNERS, TodreError, create_pruner, load_pretrained_model
from llava_todre.vlm import Request, answer

GOLDEN = Path(__file__).parents[1] / "golden"
SIZES = [(400, 20), (20, 400), (10, 2000), (1, 1), (300, 1)]
"""(width, height); of all but one, the AnyRes canvas shows no patch once its padding is removed."""
BUDGETS: list[dict[str, Any]] = [{"retain_tokens": 1}, {"retain_ratio": 0.5}]


@functools.cache
def loaded(name: str) -> tuple[Any, Any]:
    tokenizer, model, *_ = load_pretrained_model(str(GOLDEN / name))
    return tokenizer, model


def picture(size: tuple[int, int]) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.mark.parametrize("method", PRUNERS)
@pytest.mark.parametrize("mode", ["anyres", "pad"])
def test_every_budget_is_met(method: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, model = loaded("llava-v1.6-tiny" if mode == "anyres" else "llava-v1.5-tiny")
    monkeypatch.setattr(model.config, "image_aspect_ratio", mode)
    images = [picture(size) for size in (SIZES if mode == "anyres" else SIZES[-2:])]
    for knobs in BUDGETS:
        try:
            pruner = create_pruner(method, **knobs)
        except TodreError:  # it has a budget of another kind
            pruner = create_pruner(method)
        model.set_pruner(pruner)
        requests = [Request("what", [image]) for image in images]
        for given in answer(model, tokenizer, requests, max_new_tokens=1):
            (shown,) = given.stats.images
            if pruner.selects and method != "downsample":  # a grid has not every size
                assert len(shown.keep_idx) == pruner.num_keep(shown.num_tokens)
