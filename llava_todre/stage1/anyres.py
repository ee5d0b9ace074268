"""AnyRes: into which crops an image is cut, and where their patches stand in the prompt.

Symbols: V views of one image, P patches per view, R x R = P, S tokens of the image in the prompt
    (patch tokens, and the newline tokens between them).

Merging only ever re-orders tokens, drops padding and inserts newlines, so it is written once as a
list of indices.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence

import torch
from torch import Tensor

from llava_todre.errors import TodreError

Size = tuple[int, int]

NEWLINE = -1
MERGE_TYPES = ("flat", "spatial", "spatial_unpad")


def parse_pinpoints(pinpoints: str | Sequence[Sequence[int]] | None, tile: int) -> list[Size]:
    """Return ``image_grid_pinpoints`` as a list of (width, height), each a multiple of ``tile``."""
    try:
        raw = ast.literal_eval(pinpoints) if isinstance(pinpoints, str) else pinpoints
        sizes = [(int(width), int(height)) for width, height in raw or ()]
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        sizes = []
    if not sizes or any(side < tile or side % tile for size in sizes for side in size):
        raise TodreError(
            "image_grid_pinpoints must be a list of (width, height) pairs, each side a multiple of "
            f"the tile size {tile}, got {pinpoints!r}."
        )
    return sizes


def select_best_resolution(size: Size, resolutions: Sequence[Size]) -> Size:
    """Return the canvas that shows most pixels of the image, then the one with least waste.

    Args:
        size: (width, height) of the image.
        resolutions: canvases to choose from, (width, height); the first of equals wins.
    """
    width, height = _checked(size)

    def fit(canvas: Size) -> tuple[int, int]:
        scale = min(canvas[0] / width, canvas[1] / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - canvas[0] * canvas[1]

    return max(resolutions, key=fit)


def anyres_grid_shape(
    size: Size, pinpoints: str | Sequence[Sequence[int]], tile: int
) -> tuple[int, int]:
    """Return (columns, rows) of tiles into which an image of ``size`` is cut."""
    width, height = select_best_resolution(size, parse_pinpoints(pinpoints, tile))
    return width // tile, height // tile


def unpad_bounds(grid_hw: tuple[int, int], original_size_wh: Size) -> tuple[int, int, int, int]:
    """Return which rows and columns of a feature canvas show the image and not its padding.

    Rounds as the original ``unpad_image`` does (truncation; transformers' own classes differ for
    one size in 20,000). For extremely long images the range can be empty, as there.

    Args:
        grid_hw: (height, width) of the canvas in features.
        original_size_wh: (width, height) of the image in pixels.

    Returns:
        (top, bottom, left, right); rows ``top:bottom`` and columns ``left:right`` remain.
    """
    height, width = grid_hw
    original_width, original_height = _checked(original_size_wh)
    if original_width / original_height > width / height:
        shown = int(original_height * (width / original_width))
        pad = (height - shown) // 2
        return pad, height - pad, 0, width
    shown = int(original_width * (height / original_height))
    pad = (width - shown) // 2
    return 0, height, pad, width - pad


def merge_slots(
    num_views: int, side: int, grid: tuple[int, int] | None, size: Size | None, merge_type: str
) -> Tensor:
    """Return which patch stands where in the visual part of a prompt.

    Args:
        num_views: V.
        side: R, patches per row of a view.
        grid: (columns, rows) of crops on the canvas; None for a video or an image without crops.
        size: (width, height) of the image in pixels, needed for unpadding.
        merge_type: ``flat`` (views one after the other), ``spatial`` (thumbnail, then the canvas
            row by row) or ``spatial_unpad`` (the same without padding, and a newline token after
            every row).

    Returns:
        (S,) int64: index into the V * P patches, or :data:`NEWLINE`.
    """
    if merge_type not in MERGE_TYPES:
        raise TodreError(
            f"mm_patch_merge_type must be one of {', '.join(MERGE_TYPES)}, got {merge_type!r}."
        )
    patches = torch.arange(num_views * side * side)
    if merge_type == "flat" or grid is None:
        return patches
    newline = torch.tensor([NEWLINE])
    if num_views == 1:
        return torch.cat([patches, newline]) if merge_type == "spatial_unpad" else patches
    columns, rows = grid
    if columns * rows != num_views - 1:
        raise TodreError(
            f"image must have {columns * rows + 1} views ({columns} x {rows} crops and a "
            f"thumbnail), got {num_views}."
        )
    thumbnail, crops = patches[: side * side], patches[side * side :]
    canvas = (
        crops.view(rows, columns, side, side).transpose(1, 2).reshape(rows * side, columns * side)
    )
    if merge_type == "spatial_unpad":
        assert size is not None, "unpadding needs the size of the image"
        top, bottom, left, right = unpad_bounds((rows * side, columns * side), size)
        canvas = canvas[top:bottom, left:right]
        canvas = torch.cat([canvas, newline.expand(len(canvas), 1)], dim=1)
    return torch.cat([thumbnail, canvas.flatten()])


def _checked(size: Size) -> Size:
    if len(size) != 2 or min(size) < 1:
        raise TodreError(f"image size must be (width, height) from 1 pixel on, got {tuple(size)}.")
    return size
