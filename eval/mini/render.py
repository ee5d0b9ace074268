"""From a scene to pixels: textured backgrounds, clutter, shapes, sign, noise.

About half a millisecond per image, so training renders on the fly and never repeats a picture.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from eval.mini.scenes import Scene
from eval.mini.shapes import (
    CELL_HEIGHT,
    CELL_WIDTH,
    COLOUR_RGB,
    COLOURS,
    GLYPH_HEIGHT,
    GLYPH_WIDTH,
    SIGN_HEIGHT,
    SIGN_MARGIN,
    SIGN_WIDTH,
    digit_mask,
    shape_mask,
)

DIGIT_ID = 20
"""Instance id of the sign's first digit cell; the next two follow."""
SIGN_ID = 30
"""Instance id of the rest of the sign. Object k has id k + 1, background is 0."""

_TEXTURE_SIDE = 288
_NOISE_SIDE = 300


def _strokes(rng: np.random.Generator, draw: ImageDraw.ImageDraw) -> None:
    """Muted clutter lines and arcs, so that edges alone do not mark an object."""
    for _ in range(int(rng.integers(10, 45))):
        grey = rng.uniform(40, 210)
        colour = tuple(int(np.clip(grey + rng.normal(0, 14), 0, 255)) for _ in range(3))
        x, y = rng.uniform(0, _TEXTURE_SIDE, 2)
        length, angle = rng.uniform(8, 70), rng.uniform(0, 2 * np.pi)
        if rng.random() < 0.7:
            end = (x + length * np.cos(angle), y + length * np.sin(angle))
            draw.line([(x, y), end], fill=colour, width=int(rng.integers(1, 4)))
        else:
            box = [x, y, x + length * 0.6, y + length * 0.6]
            sweep, width = int(rng.integers(60, 300)), int(rng.integers(1, 3))
            draw.arc(box, 0, sweep, fill=colour, width=width)


def _texture(rng: np.random.Generator) -> np.ndarray:
    """One uint8 (288, 288, 3) background: grey-muted noise at three scales, then strokes."""
    side = _TEXTURE_SIDE
    base = np.full((side, side, 3), rng.uniform(70, 180), np.float32)
    for cells, amplitude in ((5, 28), (14, 16), (48, 10)):
        noise = rng.normal(0, amplitude, (cells, cells, 1))
        noise = noise + rng.normal(0, amplitude * 0.35, (cells, cells, 3))
        coarse = Image.fromarray(np.clip(noise + 128, 0, 255).astype(np.uint8))
        base += np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), np.float32) - 128
    image = Image.fromarray(np.clip(base, 0, 255).astype(np.uint8))
    _strokes(rng, ImageDraw.Draw(image))
    return np.asarray(image)


class Renderer:
    """Draws scenes on a fixed stock of backgrounds.

    Arguments:
        rng: stream that the backgrounds and the noise field come from.
        num_backgrounds: size of the stock; crops, flips and shades of it vary per image.
    """

    def __init__(self, rng: np.random.Generator, num_backgrounds: int = 160) -> None:
        self._backgrounds = [_texture(rng) for _ in range(num_backgrounds)]
        self._noise = rng.normal(0, 5, (_NOISE_SIDE, _NOISE_SIDE, 3)).astype(np.float32)

    def _background(self, rng: np.random.Generator, side: int) -> np.ndarray:
        texture = self._backgrounds[rng.integers(len(self._backgrounds))]
        y, x = rng.integers(0, _TEXTURE_SIDE - side + 1, 2)
        crop = texture[y : y + side, x : x + side]
        if rng.random() < 0.5:
            crop = crop[::-1]
        if rng.random() < 0.5:
            crop = crop[:, ::-1]
        return crop.astype(np.float32)

    def render(self, rng: np.random.Generator, scene: Scene) -> tuple[np.ndarray, np.ndarray]:
        """Image uint8 (side, side, 3) and instance ids uint8 (side, side)."""
        side = scene.side
        pixels = self._background(rng, side)
        ids = np.zeros((side, side), np.uint8)
        for k, item in enumerate(scene.objects):
            alpha = shape_mask(item.shape, item.size)
            box = np.s_[item.top : item.top + item.size, item.left : item.left + item.size]
            shade = COLOUR_RGB[COLOURS.index(item.colour)] * rng.uniform(0.85, 1.1)
            shade = np.clip(shade + rng.normal(0, 6, 3), 0, 255).astype(np.float32)
            pixels[box] += alpha[..., None] * (shade - pixels[box])
            ids[box][alpha > 0.5] = k + 1
        if scene.sign is not None:
            self._draw_sign(rng, scene, pixels, ids)
        y, x = rng.integers(0, _NOISE_SIDE - side + 1, 2)
        pixels += self._noise[y : y + side, x : x + side]
        return np.clip(pixels, 0, 255).astype(np.uint8), ids

    @staticmethod
    def _draw_sign(
        rng: np.random.Generator, scene: Scene, pixels: np.ndarray, ids: np.ndarray
    ) -> None:
        sign = scene.sign
        assert sign is not None
        box = np.s_[sign.top : sign.top + SIGN_HEIGHT, sign.left : sign.left + SIGN_WIDTH]
        pixels[box] = rng.uniform(215, 250) + rng.normal(0, 5, 3)
        ink = np.float32(rng.uniform(0, 50))
        ids[box] = SIGN_ID
        for slot, digit in enumerate(sign.digits):
            top, left = sign.top + SIGN_MARGIN, sign.left + SIGN_MARGIN + slot * CELL_WIDTH
            ids[top : top + CELL_HEIGHT, left : left + CELL_WIDTH] = DIGIT_ID + slot
            glyph = np.s_[top + 1 : top + 1 + GLYPH_HEIGHT, left + 1 : left + 1 + GLYPH_WIDTH]
            pixels[glyph] += digit_mask(digit)[..., None] * (ink - pixels[glyph])
