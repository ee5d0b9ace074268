"""What the renderer knows about every patch: the targets of the vision tower's phase.

B images, V views, N = 64 patches per view. -100 means "not trained": patches that an object or
a digit only grazes, and digits in the thumbnail, which are too small to be read there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eval.mini.render import DIGIT_ID
from eval.mini.scenes import IMAGE_SIDE, TILE_SIDE, Scene
from eval.mini.shapes import COLOURS, SHAPES, SIGN_DIGITS

IGNORE = -100
GRID = 8
"""Patches per side of one view."""
HEAD_SIZES = {
    "shape": len(SHAPES) + 1,
    "colour": len(COLOURS) + 1,
    "digit": 11,
    "slot": SIGN_DIGITS + 1,
    "row": GRID,
    "column": GRID,
    "centre": 2,
    "thumbnail": 2,
}
"""Classes of every per-patch label, in the order of the tower's dense head."""
NUM_PAIRS = len(COLOURS) * len(SHAPES)
CLS_SIZE = NUM_PAIRS + 1 + 10 * SIGN_DIGITS
"""[CLS] targets: colour-shape pairs, a sign, and each digit in each place of the sign."""

_OBJECT_AREA, _DIGIT_AREA, _GRAZED_AREA = 0.12, 0.3, 0.02


@dataclass(frozen=True)
class TileLabels:
    """`dense`: name to int64 (B * V, N); `cls`: float32 (B * V, 73), NaN where not trained."""

    dense: dict[str, Tensor]
    cls: Tensor


def _threshold(label: np.ndarray, share: np.ndarray, enough: float) -> np.ndarray:
    """The label where it covers enough of the patch, ignored where it grazes it, else 0."""
    return np.where(share >= enough, label, np.where(share > _GRAZED_AREA, IGNORE, 0))


def _object_codes(scenes: list[Scene]) -> tuple[np.ndarray, np.ndarray]:
    """Colour and shape indices from 1, each (B, most objects)."""
    most = max(1, max(len(scene.objects) for scene in scenes))
    colour = np.zeros((len(scenes), most), np.int64)
    shape = np.zeros((len(scenes), most), np.int64)
    for i, scene in enumerate(scenes):
        for k, item in enumerate(scene.objects):
            colour[i, k] = COLOURS.index(item.colour) + 1
            shape[i, k] = SHAPES.index(item.shape) + 1
    return colour, shape


def _patch_labels(ids: np.ndarray, scenes: list[Scene], cells: int) -> dict[str, np.ndarray]:
    """Labels (B, cells, cells) on a grid of `cells` x `cells` over whole pictures."""
    num_images, side = ids.shape[:2]
    patch = side // cells
    blocks = ids.reshape(num_images, cells, patch, cells, patch)
    colour, shape = _object_codes(scenes)
    digits = np.array([scene.sign.digits if scene.sign else (0, 0, 0) for scene in scenes])
    area = float(patch * patch)
    covered = [(blocks == k + 1).sum((2, 4)) / area for k in range(colour.shape[1])]
    written = [(blocks == DIGIT_ID + k).sum((2, 4)) / area for k in range(SIGN_DIGITS)]
    object_share, digit_share = np.stack(covered, -1), np.stack(written, -1)
    item, slot = object_share.argmax(-1), digit_share.argmax(-1)
    image = np.arange(num_images)[:, None, None]
    object_share, digit_share = object_share.max(-1), digit_share.max(-1)
    centre = np.zeros((num_images, cells, cells), np.int64)
    for i, scene in enumerate(scenes):
        for entry in scene.objects:
            x, y = entry.centre
            centre[i, int(y) // patch, int(x) // patch] = 1
    return {
        "shape": _threshold(shape[image, item], object_share, _OBJECT_AREA),
        "colour": _threshold(colour[image, item], object_share, _OBJECT_AREA),
        "digit": _threshold(digits[image, slot] + 1, digit_share, _DIGIT_AREA),
        "slot": _threshold(slot + 1, digit_share, _DIGIT_AREA),
        "centre": centre,
    }


def _dense(ids: np.ndarray, scenes: list[Scene]) -> dict[str, np.ndarray]:
    """Labels (B * V, N) in the order of `views.views`."""
    num_images, side = ids.shape[:2]
    patches = GRID * GRID
    fine = _patch_labels(ids, scenes, side * GRID // TILE_SIDE)
    if side == TILE_SIDE:
        return {name: label.reshape(num_images, patches) for name, label in fine.items()}
    coarse = _patch_labels(ids, scenes, GRID)
    for name in ("digit", "slot"):
        coarse[name] = np.where(coarse[name] > 0, IGNORE, coarse[name])
    dense = {}
    for name, label in fine.items():
        crops = label.reshape(num_images, 2, GRID, 2, GRID).transpose(0, 1, 3, 2, 4)
        thumbnail = coarse[name].reshape(num_images, 1, patches)
        both = np.concatenate([thumbnail, crops.reshape(num_images, 4, patches)], 1)
        dense[name] = both.reshape(-1, patches)
    return dense


def _cls(ids: np.ndarray, scenes: list[Scene]) -> np.ndarray:
    """(B * V, 73): what is in each view. A cut object counts where at least half of it is."""
    num_images, side = ids.shape[:2]
    grid = side // TILE_SIDE
    crops = np.zeros((num_images, grid, grid, CLS_SIZE), np.float32)
    for i, scene in enumerate(scenes):
        for k, item in enumerate(scene.objects):
            pair = COLOURS.index(item.colour) * len(SHAPES) + SHAPES.index(item.shape)
            mine = (ids[i] == k + 1).reshape(grid, TILE_SIDE, grid, TILE_SIDE).sum((1, 3))
            crops[i, ..., pair] = np.maximum(crops[i, ..., pair], mine * 2 >= max(mine.sum(), 1))
        if scene.sign is not None:
            tile = crops[i, scene.sign.top // TILE_SIDE, scene.sign.left // TILE_SIDE]
            tile[NUM_PAIRS] = 1
            for slot, digit in enumerate(scene.sign.digits):
                tile[NUM_PAIRS + 1 + slot * 10 + digit] = 1
    crops = crops.reshape(num_images, grid * grid, CLS_SIZE)
    if grid == 1:
        return crops[:, 0]
    thumbnail = np.zeros((num_images, 1, CLS_SIZE), np.float32)
    for i, scene in enumerate(scenes):
        for item in scene.objects:
            pair = COLOURS.index(item.colour) * len(SHAPES) + SHAPES.index(item.shape)
            thumbnail[i, 0, pair] = 1
        thumbnail[i, 0, NUM_PAIRS] = scene.sign is not None
    thumbnail[..., NUM_PAIRS + 1 :] = np.nan
    return np.concatenate([thumbnail, crops], 1).reshape(-1, CLS_SIZE)


def tile_labels(ids: np.ndarray, scenes: list[Scene]) -> TileLabels:
    """Targets for a batch of rendered pictures; `ids` is uint8 (B, side, side)."""
    dense = {k: torch.from_numpy(v.astype(np.int64)) for k, v in _dense(ids, scenes).items()}
    num_tiles = len(dense["shape"])
    index = torch.arange(GRID * GRID)
    dense["row"] = (index // GRID).expand(num_tiles, -1)
    dense["column"] = (index % GRID).expand(num_tiles, -1)
    view = torch.arange(num_tiles) % 5 == 0
    is_thumbnail = view if ids.shape[1] == IMAGE_SIDE else torch.zeros_like(view)
    dense["thumbnail"] = is_thumbnail.long()[:, None].expand(-1, GRID * GRID)
    ordered = {name: dense[name] for name in HEAD_SIZES}
    return TileLabels(ordered, torch.from_numpy(_cls(ids, scenes)))
