"""Kept tokens of methods on a picture, run again for the report: selection draws nothing by chance
but what its seed says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image

from eval.report.page import Html, picture
from llava_todre.generate import Request, answer
from llava_todre.pruners import Pruner
from llava_todre.viz import draw_kept, token_boxes

_WIDTH = 320


def kept(
    model: Any, tokenizer: Any, image: Image.Image, question: str, pruners: Mapping[str, Pruner]
) -> list[Html]:
    """Return one picture per method, with how many tokens it keeps.

    Args:
        model: of our own class; it has the method it had before when this returns.
        tokenizer: of the model.
        image: RGB.
        question: methods that read it may keep other tokens for another one.
        pruners: label -> method.
    """
    before = model.pruner
    tile = model.get_vision_tower().config.image_size
    cards = []
    try:
        for label, pruner in pruners.items():
            model.set_pruner(pruner)
            (given,) = answer(model, tokenizer, [Request(question, [image])], max_new_tokens=8)
            stats = given.stats.images[0]
            boxes = token_boxes(stats, image.size, model.config, tile)
            drawn = draw_kept(image, boxes, stats, max(1.0, _WIDTH / image.width))
            entered = f"{len(stats.keep_idx)} of {stats.num_tokens} tokens enter the decoder"
            layers = f"{given.stats.mean_visual_tokens:.0f} per layer"
            alt = f"Visual tokens kept by {label}: {entered}"
            cards.append(picture(drawn, Html(f"<b>{label}</b><br>{entered}, {layers}"), alt))
    finally:
        model.set_pruner(before)
    return cards
