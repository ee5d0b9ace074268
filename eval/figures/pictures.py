"""Kept tokens as pictures: thumbnail and crops of an image, each by itself; frames of a video.

A figure's JSON holds which tokens were kept, not pixels: the held-out pictures are drawn again from
their seed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import SimpleNamespace

import torch
from PIL import Image, ImageFilter

from eval.demo.plan import Run
from eval.figures.sources import Data
from eval.figures.style import GREEN, VERMILION, few_colours
from llava_todre.model.llava import LlavaLlamaForCausalLM
from llava_todre.pruners import Pruner
from llava_todre.stats import ImageStats
from llava_todre.viz import draw_kept, token_boxes
from llava_todre.vlm import Answer

MAX_NEW_TOKENS = 8
_COLOURS = 24


def method_at(method: str, ratio: float, picture: int) -> Pruner:
    """Return a method as the demo would run it on a picture: random draws belong to the picture."""
    return Run(method, ratio).pruner(picture)


def geometry(model: LlavaLlamaForCausalLM, stats: ImageStats) -> Data:
    """Return what it takes to find the place of a patch token in its image."""
    config = model.config
    return {
        "image_aspect_ratio": config.image_aspect_ratio,
        "image_grid_pinpoints": config.image_grid_pinpoints,
        "tile": model.get_vision_tower().config.image_size,
        "side": stats.side,
        "patches": stats.patches.tolist(),
    }


def cell(method: str, given: Answer, expected: str) -> Data:
    """Return what a method kept of an image or video and what came of it."""
    return {
        "method": method,
        "keep_idx": given.stats.images[0].keep_idx.tolist(),
        "answer": given.text,
        "right": given.text.strip().lower() == expected.strip().lower(),
    }


def views_of(
    image: Image.Image, place: Data, keep_idx: Sequence[int]
) -> tuple[Image.Image, Image.Image | None]:
    """Return the thumbnail and the crops put together, each with the dropped tokens dimmed.

    Args:
        image: RGB.
        place: from :func:`geometry`.
        keep_idx: indices into ``place["patches"]``.

    Returns:
        The thumbnail is as small as the tower sees it. An image that is one view has no second
        picture.
    """
    patches = torch.tensor(place["patches"])
    kept = torch.zeros(len(patches), dtype=torch.bool)
    kept[list(keep_idx)] = True
    side = place["side"]
    boxes = token_boxes(
        ImageStats(patches, side, kept.nonzero()[:, 0]),
        image.size,
        SimpleNamespace(**place),
        place["tile"],
    )
    is_thumbnail = patches < side**2
    scale = place["tile"] / max(image.size)
    pictures: list[Image.Image] = []
    for chosen, factor in ((is_thumbnail, scale), (~is_thumbnail, 1.0)):
        if bool(chosen.any()):
            part = ImageStats(patches[chosen], side, kept[chosen].nonzero()[:, 0])
            seen = image.resize((round(image.width * factor), round(image.height * factor)))
            inside = [
                tuple(edge * factor for edge in boxes[index])
                for index in chosen.nonzero()[:, 0].tolist()
            ]
            pictures.append(draw_kept(simplified(seen), inside, part))
    return pictures[0], pictures[1] if len(pictures) > 1 else None


def counts(place: Data, keep_idx: Sequence[int]) -> tuple[int, int, int, int]:
    """Return tokens kept and present in the thumbnail, then those of the crops."""
    per_view = place["side"] ** 2
    patches = place["patches"]
    small = sum(patch < per_view for patch in patches)
    kept = sum(patches[index] < per_view for index in keep_idx)
    return kept, small, len(keep_idx) - kept, len(patches) - small


def frame_of(frame: Image.Image, side: int, keep_idx: Sequence[int]) -> Image.Image:
    """Return a frame of a video with its dropped tokens dimmed.

    Args:
        frame: RGB, square.
        side: tokens per row and column.
        keep_idx: row * side + column of the kept ones.
    """
    stats = ImageStats(torch.arange(side**2), side, torch.tensor(keep_idx, dtype=torch.int64))
    config = SimpleNamespace(image_aspect_ratio="square")
    return draw_kept(simplified(frame), token_boxes(stats, frame.size, config, frame.width), stats)


def simplified(image: Image.Image) -> Image.Image:
    """Return the picture smoothed and in few colours.

    Its noise is not what a figure shows, and would make a megabyte of an SVG.
    """
    return _simplified(image.size, image.tobytes())


@functools.lru_cache(maxsize=32)
def _simplified(size: tuple[int, int], pixels: bytes) -> Image.Image:
    smooth = Image.frombytes("RGB", size, pixels).filter(ImageFilter.MedianFilter(3))
    return few_colours(smooth, _COLOURS).convert("RGB")


def verdict(given: Data) -> tuple[str, str]:
    """Return an answer with a mark, and the colour to write it in."""
    mark = "\u2713" if given["right"] else "\u2717"
    return f"{mark} {given['answer'] or '(nothing)'}", GREEN if given["right"] else VERMILION
