"""Anti-aliased alpha masks of the six shapes and the ten digits, drawn once per process.

The masks are float32 arrays in [0, 1]; the renderer blends a colour through them.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan")
COLOUR_RGB = np.array(
    [
        [220, 40, 40],
        [40, 175, 60],
        [45, 80, 230],
        [240, 220, 50],
        [150, 50, 190],
        [245, 135, 25],
        [60, 210, 220],
    ],
    np.float32,
)
OBJECT_SIZES = tuple(range(30, 41, 2))
"""Side of an object's box in pixels. A narrow range, so that size does not disturb counting."""

GLYPH_WIDTH, GLYPH_HEIGHT = 11, 17
CELL_WIDTH, CELL_HEIGHT = 14, 20
SIGN_MARGIN = 3
SIGN_DIGITS = 3
SIGN_WIDTH = SIGN_DIGITS * CELL_WIDTH + 2 * SIGN_MARGIN
SIGN_HEIGHT = CELL_HEIGHT + 2 * SIGN_MARGIN

_OVERSAMPLING = 4
_FONT_5X7 = (
    "01110100011001110101110011000101110",
    "00100011000010000100001000010001110",
    "01110100010000100110010001000011111",
    "11111000100010000010000011000101110",
    "00010001100101010010111110001000010",
    "11111100001111000001000011000101110",
    "00110010001000011110100011000101110",
    "11111000010001000100010000100001000",
    "01110100011000101110100011000101110",
    "01110100011000101111000010001001100",
)


def _draw(draw: ImageDraw.ImageDraw, shape: str, n: float) -> None:
    """Draw `shape` in white into a square of side `n` pixels."""
    margin = n * 0.04
    outer = [margin, margin, n - margin, n - margin]
    if shape == "circle":
        draw.ellipse(outer, fill=255)
    elif shape == "square":
        draw.rectangle([n * 0.1, n * 0.1, n * 0.9, n * 0.9], fill=255)
    elif shape == "triangle":
        draw.polygon([(n / 2, margin), (n - margin, n * 0.92), (margin, n * 0.92)], fill=255)
    elif shape == "ring":
        draw.ellipse(outer, fill=255)
        draw.ellipse([n * 0.28, n * 0.28, n * 0.72, n * 0.72], fill=0)
    elif shape == "cross":
        draw.rectangle([n * 0.36, margin, n * 0.64, n - margin], fill=255)
        draw.rectangle([margin, n * 0.36, n - margin, n * 0.64], fill=255)
    else:
        radii = [0.49 if i % 2 == 0 else 0.21 for i in range(10)]
        angles = [-math.pi / 2 + i * math.pi / 5 for i in range(10)]
        draw.polygon(
            [
                (n / 2 + n * r * math.cos(a), n / 2 + n * r * math.sin(a))
                for r, a in zip(radii, angles, strict=True)
            ],
            fill=255,
        )


@functools.cache
def shape_mask(shape: str, size: int) -> np.ndarray:
    """Alpha mask (size, size) of one of `SHAPES`."""
    canvas = Image.new("L", (size * _OVERSAMPLING,) * 2, 0)
    _draw(ImageDraw.Draw(canvas), shape, size * _OVERSAMPLING)
    small = canvas.resize((size, size), Image.Resampling.BOX)
    return np.asarray(small, np.float32) / 255


@functools.cache
def digit_mask(digit: int) -> np.ndarray:
    """Alpha mask (17, 11) of a digit: a 5x7 bitmap font, smoothly enlarged."""
    bitmap = np.array([int(bit) for bit in _FONT_5X7[digit]], np.uint8).reshape(7, 5) * 255
    large = Image.fromarray(bitmap).resize((GLYPH_WIDTH, GLYPH_HEIGHT), Image.Resampling.BILINEAR)
    return np.clip(np.asarray(large, np.float32) / 255 * 1.5, 0, 1)
