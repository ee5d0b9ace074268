"""AnyRes views of a picture, exactly as LLaVA's own image code makes them for this geometry.

B images, V views per image. For 224 px and the single pinpoint (224, 224) LLaVA gives the whole
picture resized to 112 px (PIL bicubic) and then the four 112 px crops in raster order.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from eval.mini.scenes import TILE_SIDE

PIXEL_MEAN = 0.45
PIXEL_STD = 0.25


def views(images: np.ndarray) -> np.ndarray:
    """uint8 (B, side, side, 3) to uint8 (B, V, 112, 112, 3): V = 5 for 224 px, 1 for 112 px."""
    num_images, side = images.shape[:2]
    if side == TILE_SIDE:
        return images[:, None]
    thumbnails = np.stack(
        [np.asarray(Image.fromarray(image).resize((TILE_SIDE, TILE_SIDE))) for image in images]
    )
    grid = side // TILE_SIDE
    crops = images.reshape(num_images, grid, TILE_SIDE, grid, TILE_SIDE, 3)
    crops = crops.transpose(0, 1, 3, 2, 4, 5)
    crops = crops.reshape(num_images, grid * grid, TILE_SIDE, TILE_SIDE, 3)
    return np.concatenate([thumbnails[:, None], crops], 1)


def pixel_values(images: np.ndarray) -> Tensor:
    """uint8 (B, side, side, 3) to normalised float32 (B * V, 3, 112, 112)."""
    tiles = torch.from_numpy(np.ascontiguousarray(views(images))).flatten(0, 1)
    return (tiles.permute(0, 3, 1, 2).float() / 255 - PIXEL_MEAN) / PIXEL_STD
