"""An image as it is meant to be seen: turned upright, on white where transparent, 8-bit RGB.

Everything that reads an image calls :func:`to_rgb`, so a photo of a phone, a 16-bit scan or a
palette with transparency is the same image whichever way it came in. Pixels of a still image are
taken for square, as browsers do, and for sRGB: colour profiles are not applied.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import ExifTags, Image

from llava_todre.errors import TodreError

_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # of TIFF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What to do for each EXIF orientation but 1."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Return the image as it is shown, as 8-bit RGB; a new object that says nothing else.

    The EXIF orientation is applied, so the size may be turned too. Transparent pixels become white
    (the original shows the colour hidden below them, mostly black, which swallows dark text). Grey
    of more than 8 bits is scaled by what its format calls white; where the format does not say,
    values up to 255 are taken for 8 bits and larger ones up to 65535 for 16.

    Raises:
        TodreError: no PIL image, an empty, closed or damaged one, or grey values whose range is
            not known: negative, not finite, above 65535, or none above 1.
    """
    if not isinstance(image, Image.Image):
        raise TodreError(f"image must be a PIL image, got {type(image).__name__}.")
    if min(image.size) < 1:
        raise TodreError(f"image size must be at least 1 x 1 pixel, got {image.size}.")
    try:
        image.load()
        shown = _as_rgb(_upright(image))
    except TodreError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever wrong bytes lead them to
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TodreError(f"image is closed, damaged or unreadable: {reason}") from error
    shown.info = {}  # turning it again must do nothing
    return shown


def _upright(image: Image.Image) -> Image.Image:
    """Return the image turned as its EXIF orientation says; as it is if that cannot be read.

    Not ``ImageOps.exif_transpose``: that writes all of the EXIF anew, and fails where any of it is
    broken.
    """
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # as above
        return image
    return image if turn is None else image.transpose(turn)


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return _from_deep_grey(image)
    if image.mode == "La":
        image = image.convert("LA")  # the only mode that Pillow makes of it
    return _on_white(image) if image.has_transparency_data else image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    colour = image.info.get("transparency")
    if isinstance(colour, tuple) and max(colour) > 255:
        # Pillow cuts 16-bit colours to their high bytes, but not the one that stands for nothing.
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in colour)
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _from_deep_grey(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    scale = 256 / (_white(image, values) + 1)
    grey = (values.astype(np.float32) * np.float32(scale)).astype(np.uint8)
    if _tag(image, _PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = 255 - grey
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey = np.where(values == transparent, np.uint8(255), grey)
    return Image.fromarray(grey).convert("RGB")


def _white(image: Image.Image, values: Any) -> int:
    """Return the value that stands for white: 255, 4095 or 65535."""
    low, high = values.min(), values.max()
    problem = None
    if image.mode.startswith("I;16"):
        bits = _tag(image, _BITS_PER_SAMPLE)
        return (1 << int(bits[0])) - 1 if bits else 65535
    if not (np.isfinite(low) and np.isfinite(high)):
        problem = "values that are not finite"
    elif low < 0 or high > 65535:
        problem = f"values from {low:g} to {high:g}, of which black and white are unknown"
    elif image.mode == "F" and high <= 1:
        problem = "none above 1, which would be black"
    if problem:
        raise TodreError(
            f"image of mode {image.mode!r} must hold values from 0 to 255, or 0 to 65535, "
            f"got {problem}."
        )
    # Pillow scales the whole numbers of PPM to 16 bits, but not the others.
    is_16_bit = high > 255 or (image.format == "PPM" and image.mode != "F")
    return 65535 if is_16_bit else 255


def _tag(image: Image.Image, number: int) -> Any:
    """Return a tag of a TIFF; None for other images."""
    return getattr(image, "tag_v2", {}).get(number)
