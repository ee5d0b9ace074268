"""From an image file to the pixel tensor the vision tower reads. Sizes are (width, height).

Symbols: S side of one tile in pixels (336 for CLIP-L), V views of one image.

AnyRes ("anyres"): choose the canvas among ``image_grid_pinpoints`` that shows most of the image,
fit and centre the image on it, cut it into tiles of S x S, and put a squeezed thumbnail first.
"pad": extend to a square with the mean colour. "square": the processor's resize and crop.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError

from llava_todre.errors import TodreError
from llava_todre.model.rgb import to_rgb
from llava_todre.model.sources import called, open_source
from llava_todre.stage1.anyres import Size, parse_pinpoints, select_best_resolution
from llava_todre.video import is_video_file

ASPECT_RATIOS = ("anyres", "pad", "square")

# What one image may grow to on its way to the tower; Pillow's own limit for a file.
MAX_PIXELS = 2 * 89_478_485

MAX_FILE_PIXELS = 64_000_000
"""Of an image that is decoded here; checked before any of it is."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF", "JPEG2000", "PPM", "QOI")
"""Pixels that begin with a signature. Some others are programs to run, or name files to open."""
Picture = Image.Image | str | os.PathLike[str]
"""A PIL image, a file, or a data URI."""


def load_image(source: str | os.PathLike[str], *, allow_urls: bool = False) -> Image.Image:
    """Read an image as it is shown: upright, on white, 8-bit RGB; see :func:`to_rgb`.

    Args:
        source: a file (``~`` is the home directory), a data URI, or an http(s) URL.
        allow_urls: whether a URL is fetched.

    Raises:
        TodreError: nothing there, a directory, a pipe or a device, not a (whole) image in one of
            the :data:`FORMATS`, more than :data:`MAX_FILE_PIXELS`, or too large to be fetched.
    """
    name, file = called(source), open_source(source, allow_urls)
    try:
        return decode_image(file, name)
    except UnidentifiedImageError:
        is_video = isinstance(file, Path) and is_video_file(file)
        found = "a video (in a shell --video, else read_clip)" if is_video else "another file"
        raise TodreError(
            f"image {name} must be one of {', '.join(FORMATS)}, got {found}."
        ) from None


def open_picture(picture: object) -> Image.Image:
    """Return a picture as it is shown, whichever way it is given.

    Args:
        picture: a :data:`Picture`; anything else is refused.

    Raises:
        TodreError: see :func:`load_image` and :func:`to_rgb`.
    """
    if isinstance(picture, (str, os.PathLike)):
        return load_image(picture)
    if not isinstance(picture, Image.Image):
        raise TodreError(f"image must be a PIL image or a path, got {type(picture).__name__}.")
    return to_rgb(picture)


def decode_image(
    file: Path | BytesIO,
    name: str,
    formats: Sequence[str] = FORMATS,
    max_pixels: int = MAX_FILE_PIXELS,
) -> Image.Image:
    """Decode an image file as it is shown.

    Args:
        file: to read.
        name: what messages call it.
        formats: those of Pillow to try.
        max_pixels: of the image; larger ones are refused before they are decoded.

    Raises:
        UnidentifiedImageError: none of these formats.
        TodreError: damaged, or too many pixels.
    """
    try:
        with _opened(file, formats) as image:
            if math.prod(image.size) > max_pixels:
                raise TodreError(
                    f"image must have at most {max_pixels / 1e6:g} million pixels, got "
                    f"{image.width} x {image.height}."
                )
            return to_rgb(image)
    except UnidentifiedImageError:
        raise
    except TodreError as error:
        raise TodreError(f"image {name} {str(error).removeprefix('image ')}") from None
    except Image.DecompressionBombError as error:
        raise TodreError(f"image {name} has too many pixels: {error}") from None
    except Exception as error:  # Pillow's decoders raise whatever wrong bytes lead them to
        reason = " ".join(str(error).split()).replace(str(file), name)
        raise TodreError(f"image {name} is damaged or unreadable: {reason}") from error


def is_image_file(path: str | os.PathLike[str]) -> bool:
    """Return whether a file is in one of the :data:`FORMATS`, as far as its first bytes tell."""
    try:
        with _opened(Path(path), FORMATS):
            return True
    except UnidentifiedImageError:
        return False
    except Exception:  # one that is damaged, or too large
        return True


def _opened(file: Path | BytesIO, formats: Sequence[str]) -> Image.Image:
    Image.init()
    return Image.open(file, formats=[each for each in formats if each in Image.OPEN])


def picture_digest(picture: Image.Image) -> str:
    """Return a hash of what a picture shows, whatever it is made of."""
    shown = to_rgb(picture)
    return hashlib.blake2b(repr(shown.size).encode() + shown.tobytes(), digest_size=12).hexdigest()


def process_images(
    images: Sequence[Image.Image], image_processor: Any, config: Any
) -> torch.Tensor | list[torch.Tensor]:
    """Turn images into pixels the way ``config.image_aspect_ratio`` says.

    Args:
        images: PIL images; see :func:`to_rgb`, whose ``size`` goes into ``image_sizes``.
        image_processor: CLIP's, on its PIL back end.
        config: has ``image_aspect_ratio`` and, for anyres, ``image_grid_pinpoints``.

    Returns:
        One tensor when all images give the same shape, else a list with one per image. Shapes:
        anyres (images, V, 3, S, S), thumbnail first, then tiles row by row; others
        (images, 3, S, S).
    """
    images = [to_rgb(image) for image in images]
    if not images:
        raise TodreError("images must hold at least one image, got none.")
    mode = checked_aspect_ratio(getattr(config, "image_aspect_ratio", None))
    if mode == "anyres":
        tile = image_processor.crop_size["height"]
        sizes = parse_pinpoints(getattr(config, "image_grid_pinpoints", None), tile)
        views = [_views(image, image_processor, sizes) for image in images]
        return _stacked([_pixels(item, image_processor) for item in views])
    edge = image_processor.size["shortest_edge"]
    for image in images:
        check_elongation(image.size, edge, mode)
    if mode == "pad":
        colour = tuple(int(mean * 255) for mean in image_processor.image_mean)
        images = [_expand_to_square(image, colour) for image in images]
    return _pixels(images, image_processor)


def checked_aspect_ratio(mode: Any) -> str:
    """Return ``image_aspect_ratio`` of a config, "square" where it has none; raise if unknown."""
    mode = "square" if mode is None else mode
    if mode not in ASPECT_RATIOS:
        raise TodreError(
            f"image_aspect_ratio must be one of {', '.join(ASPECT_RATIOS)}, got {mode!r}."
        )
    return str(mode)


def _stacked(pixels: list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
    same = all(item.shape == pixels[0].shape for item in pixels)
    return torch.stack(pixels) if same else pixels


def check_elongation(size: Size, edge: int, mode: str) -> None:
    """Refuse a shape whose square, or whose resize by its short side, fills the memory.

    Args:
        size: of the image.
        edge: pixels that its short side becomes.
        mode: "pad" for a square.
    """
    longest, shortest = max(size), min(size)
    pixels = longest**2 if mode == "pad" else edge**2 * longest // shortest
    if pixels > MAX_PIXELS:
        raise TodreError(
            f"image size {size} is too elongated: preparing it must take at most "
            f"{MAX_PIXELS:,} pixels, got {pixels:,}."
        )


def _pixels(images: list[Image.Image], image_processor: Any) -> torch.Tensor:
    """Resize, crop and normalise: (images, 3, S, S)."""
    return image_processor.preprocess(images, return_tensors="pt")["pixel_values"]


def _views(image: Image.Image, image_processor: Any, sizes: list[Size]) -> list[Image.Image]:
    """Return the thumbnail and then the tiles of the best canvas, row by row."""
    tile, edge = image_processor.crop_size["height"], image_processor.size["shortest_edge"]
    width, height = select_best_resolution(image.size, sizes)
    canvas = _fit_on_canvas(image, (width, height))
    corners = [(x, y) for y in range(0, height, tile) for x in range(0, width, tile)]
    tiles = [canvas.crop((x, y, x + tile, y + tile)) for x, y in corners]
    return [image.resize((edge, edge)), *tiles]


def fitted_size(size: Size, canvas: Size) -> Size:
    """Return the size of an image scaled to fit inside ``canvas``, the loose side rounded up."""
    width, height = canvas
    scale_x, scale_y = width / size[0], height / size[1]
    if scale_x < scale_y:
        return width, min(math.ceil(size[1] * scale_x), height)
    return min(math.ceil(size[0] * scale_y), width), height


def _fit_on_canvas(image: Image.Image, size: Size) -> Image.Image:
    """Scale to fit inside ``size`` and centre on black."""
    width, height = fitted_size(image.size, size)
    canvas = Image.new("RGB", size)
    canvas.paste(image.resize((width, height)), ((size[0] - width) // 2, (size[1] - height) // 2))
    return canvas


def _expand_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
