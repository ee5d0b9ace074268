"""Images that show which visual tokens a method keeps.

Every token stands for a rectangle of the image. Kept tokens of the crops (or of the only view) show
their pixels, everything else is dimmed; kept tokens of the AnyRes thumbnail, which see the whole
image coarsely, are outlined.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageFont
from torch import Tensor

from llava_todre.model.images import Picture, fitted_size, open_picture
from llava_todre.stage1.anyres import anyres_grid_shape
from llava_todre.stats import ImageStats, PruneStats

Box = tuple[float, float, float, float]

THUMBNAIL_COLOUR = (255, 214, 0)
_TITLE_HEIGHT = 26
_GAP = 10
_MIN_WIDTH = 420
MAX_SIDE = 1600
"""Longest side in pixels at which one image of a prompt is drawn."""


def token_boxes(stats: ImageStats, size: tuple[int, int], config: Any, tile: int) -> list[Box]:
    """Return what part of the image each patch token sees.

    Args:
        stats: of one image (not a video).
        size: (width, height) of the image in pixels.
        config: the model's, with ``image_aspect_ratio`` and ``image_grid_pinpoints``.
        tile: side of a view in pixels.

    Returns:
        One (left, top, right, bottom) per patch token, in pixels of the image; parts of a token
        that see padding lie outside the image.
    """
    width, height = size
    side = stats.side
    left, top, scale, columns = _canvas(size, config, tile)
    crop_step = tile / side / scale
    squeezed = config.image_aspect_ratio == "anyres"  # the thumbnail ignores the aspect ratio
    square = max(size) if config.image_aspect_ratio == "pad" else min(size)
    several = int(stats.patches.max()) >= side**2
    boxes: list[Box] = []
    for patch in stats.patches.tolist():
        view, row, column = patch // side**2, patch % side**2 // side, patch % side
        if view > 0 and several:
            crop_row, crop_column = divmod(view - 1, columns)
            x = (crop_column * side + column) * crop_step - left / scale
            y = (crop_row * side + row) * crop_step - top / scale
            box = (x, y, x + crop_step, y + crop_step)
        elif squeezed:
            dx, dy = width / side, height / side
            box = (column * dx, row * dy, (column + 1) * dx, (row + 1) * dy)
        else:
            step = square / side
            x, y = (width - square) / 2 + column * step, (height - square) / 2 + row * step
            box = (x, y, x + step, y + step)
        boxes.append(box)
    return boxes


def _canvas(size: tuple[int, int], config: Any, tile: int) -> tuple[float, float, float, int]:
    """Return left and top padding of the AnyRes canvas, its scale, and its columns of crops."""
    if config.image_aspect_ratio != "anyres":
        return 0.0, 0.0, 1.0, 1
    columns, rows = anyres_grid_shape(size, config.image_grid_pinpoints, tile)
    fitted = fitted_size(size, (columns * tile, rows * tile))
    left, top = (columns * tile - fitted[0]) // 2, (rows * tile - fitted[1]) // 2
    return left, top, fitted[0] / size[0], columns


def draw_kept(
    image: Image.Image, boxes: Sequence[Box], stats: ImageStats, scale: float = 1.0
) -> Image.Image:
    """Return the image with dropped tokens dimmed and kept thumbnail tokens outlined.

    Args:
        image: RGB.
        boxes: from :func:`token_boxes`.
        stats: which tokens were kept.
        scale: size of the result relative to the image.
    """
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    bright = image.resize(size, Image.Resampling.NEAREST if scale >= 2 else None)
    if len(stats.keep_idx) == stats.num_tokens:
        return bright
    faded = ImageEnhance.Color(bright).enhance(0.25)
    result = Image.blend(faded, Image.new("RGB", size, (24, 26, 32)), 0.72)
    several = int(stats.patches.max()) >= stats.side**2
    is_thumbnail: Tensor = (stats.patches < stats.side**2) & torch.tensor(several)
    outlines = []
    for index in stats.keep_idx.tolist():
        left, top, right, bottom = (round(edge * scale) for edge in boxes[index])
        box = (max(left, 0), max(top, 0), min(right, size[0]), min(bottom, size[1]))
        if box[0] >= box[2] or box[1] >= box[3]:
            continue  # sees padding only
        if is_thumbnail[index]:
            outlines.append(box)
        else:
            result.paste(bright.crop(box), box[:2])
    draw = ImageDraw.Draw(result)
    for left, top, right, bottom in outlines:
        draw.rectangle((left, top, right - 1, bottom - 1), outline=THUMBNAIL_COLOUR, width=2)
    return result


def kept_picture(
    image: Picture, stats: ImageStats, model: Any, scale: float | None = None
) -> Image.Image:
    """Return one image of a prompt with dropped tokens dimmed.

    Args:
        image: as given to the model; drawn as it is shown.
        stats: of that image.
        model: of our class, for its config and the size of its views.
        scale: size of the result relative to the image; about 448 pixels when None, and never more
            than :data:`MAX_SIDE`.
    """
    tile = model.get_vision_tower().config.image_size
    shown = open_picture(image)
    longest = max(shown.size)
    if scale is None:
        scale = max(1, round(448 / longest)) if longest < MAX_SIDE else MAX_SIDE / longest
    return draw_kept(shown, token_boxes(stats, shown.size, model.config, tile), stats, scale)


def picture_of(images: Sequence[Picture], stats: PruneStats, model: Any) -> Image.Image:
    """Return what a model saw of the images of one prompt, side by side.

    Args:
        images: as given to the model, in order.
        stats: of that prompt.
        model: for its config and the size of its views.
    """
    cells = []
    for image, kept in zip(images, stats.images, strict=True):
        title = f"{len(kept.keep_idx)} of {kept.num_tokens} tokens"
        cells.append((title, kept_picture(image, kept, model)))
    return contact_sheet([cells], "Visual tokens kept before the decoder")


def contact_sheet(rows: Sequence[Sequence[tuple[str, Image.Image]]], caption: str) -> Image.Image:
    """Return titled images in a grid, with a caption above."""
    cell_width = max(picture.width for row in rows for _, picture in row)
    cell_height = max(picture.height for row in rows for _, picture in row)
    columns = max(len(row) for row in rows)
    width = max(_MIN_WIDTH, _GAP + columns * (cell_width + _GAP))
    height = _GAP + _TITLE_HEIGHT + len(rows) * (cell_height + _TITLE_HEIGHT + _GAP)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, _GAP // 2), caption, fill="black", font=ImageFont.load_default(18))
    font = ImageFont.load_default(15)
    for r, row in enumerate(rows):
        y = _GAP + _TITLE_HEIGHT + r * (cell_height + _TITLE_HEIGHT + _GAP)
        for c, (title, picture) in enumerate(row):
            x = _GAP + c * (cell_width + _GAP)
            draw.text((x, y), title, fill="black", font=font)
            sheet.paste(picture, (x, y + _TITLE_HEIGHT))
    return sheet
