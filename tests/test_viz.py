"""Boxes of tokens in the image, checked by looking at what the tower is shown."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava_todre.model.images import process_images
from llava_todre.stage1.anyres import NEWLINE, anyres_grid_shape, merge_slots
from llava_todre.stats import ImageStats
from llava_todre.viz import draw_kept, token_boxes

TILE, SIDE = 56, 8
PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
PROCESSOR = CLIPImageProcessorPil(
    size={"shortest_edge": TILE},
    crop_size={"height": TILE, "width": TILE},
    image_mean=[0.0] * 3,
    image_std=[1.0] * 3,
)


def layout(size: tuple[int, int], mode: str) -> tuple[SimpleNamespace, ImageStats]:
    config = SimpleNamespace(image_aspect_ratio=mode, image_grid_pinpoints=PINPOINTS)
    grid, views = None, 1
    if mode == "anyres":
        grid = anyres_grid_shape(size, PINPOINTS, TILE)
        views = 1 + grid[0] * grid[1]
    slots = merge_slots(views, SIDE, grid, size, "spatial_unpad")
    patches = slots[slots != NEWLINE]
    return config, ImageStats(patches, SIDE, torch.arange(len(patches)))


@pytest.mark.parametrize("mode", ["anyres", "pad", "square"])
@pytest.mark.parametrize("size", [(112, 112), (120, 80), (64, 150), (200, 60), (40, 30)])
def test_a_token_sees_the_colour_that_its_box_covers(size: tuple[int, int], mode: str) -> None:
    width, height = size
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    image = Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))
    config, stats = layout(size, mode)
    views = process_images([image], PROCESSOR, config)[0].view(-1, 3, TILE, TILE)
    patches = views.unfold(2, TILE // SIDE, TILE // SIDE).unfold(3, TILE // SIDE, TILE // SIDE)
    seen = patches.mean((-1, -2)).permute(0, 2, 3, 1).reshape(-1, 3)[stats.patches] * 255
    compared = 0
    for box, colour in zip(token_boxes(stats, size, config, TILE), seen, strict=True):
        left, top, right, bottom = box
        if left < 0 or top < 0 or right > width + 0.01 or bottom > height + 0.01:
            continue  # part of it is padding
        middle = ((left + right) / 2 / width * 255, (top + bottom) / 2 / height * 255)
        assert colour[0] == pytest.approx(middle[0], abs=9)
        assert colour[1] == pytest.approx(middle[1], abs=9)
        compared += 1
    assert compared >= len(seen) // 4


def test_only_kept_tokens_stay_bright() -> None:
    size = (112, 112)
    config, stats = layout(size, "anyres")
    kept = ImageStats(stats.patches, SIDE, torch.tensor([SIDE**2]))  # first token of a crop
    image = Image.new("RGB", size, "white")
    picture = np.asarray(draw_kept(image, token_boxes(stats, size, config, TILE), kept))
    assert (picture[:7, :7] == 255).all()
    assert picture[20:, 20:].max() < 120
