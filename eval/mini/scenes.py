"""Where things are: a scene is a few coloured shapes and one sign with three digits.

Scenes are pure data. `render.py` draws them, `questions.py` asks about them. Everything is a
function of a `SeedFamily` and a seed, and the three families can never share a random stream.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np

from eval.mini.shapes import (
    COLOURS,
    OBJECT_SIZES,
    SHAPES,
    SIGN_DIGITS,
    SIGN_HEIGHT,
    SIGN_WIDTH,
)

TILE_SIDE = 112
"""Side in pixels of what the vision tower sees at once."""
IMAGE_SIDE = 224
"""Side in pixels of a full scene: a 2x2 raster of tiles."""


class SeedFamily(enum.IntEnum):
    """Disjoint random streams: what is trained on, tuned on, and reported."""

    TRAIN = 1
    VALIDATION = 2
    TEST = 3


def stream(family: SeedFamily, seed: int, *path: int) -> np.random.Generator:
    """Random stream named by `(family, seed, *path)`; two different names are independent."""
    return np.random.default_rng([int(family), seed, *path])


@dataclass(frozen=True)
class SceneObject:
    """One coloured shape; `left`, `top` and `size` of its square box are in pixels."""

    colour: str
    shape: str
    left: int
    top: int
    size: int

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y) in pixels."""
        return self.left + self.size / 2, self.top + self.size / 2


@dataclass(frozen=True)
class Sign:
    """A white sign; `left` and `top` in pixels, three digits read from left to right."""

    left: int
    top: int
    digits: tuple[int, ...]


@dataclass(frozen=True)
class Scene:
    """A square picture of `side` pixels; `sign` is None where there is none."""

    side: int
    objects: tuple[SceneObject, ...]
    sign: Sign | None


@dataclass(frozen=True)
class Layout:
    """What kind of scenes to draw: side in pixels, number of objects, how often a sign."""

    side: int
    min_objects: int
    max_objects: int
    sign_probability: float = 0.9


TILE_LAYOUT = Layout(TILE_SIDE, 1, 3)
IMAGE_LAYOUT = Layout(IMAGE_SIDE, 4, 7)

Box = tuple[int, int, int, int]


def _touches(a: Box, b: Box) -> bool:
    """Whether two (left, top, right, bottom) boxes overlap or are closer than 2 pixels."""
    return a[0] <= b[2] + 1 and b[0] <= a[2] + 1 and a[1] <= b[3] + 1 and b[1] <= a[3] + 1


def _place_sign(rng: np.random.Generator, side: int) -> Sign:
    """A sign inside one tile: a number cut in two could be read from the thumbnail only."""
    left = int(rng.integers(1, TILE_SIDE - SIGN_WIDTH))
    top = int(rng.integers(1, TILE_SIDE - SIGN_HEIGHT))
    tile_x, tile_y = (int(v) for v in rng.integers(0, side // TILE_SIDE, 2))
    digits = tuple(int(d) for d in rng.integers(0, 10, SIGN_DIGITS))
    return Sign(left + tile_x * TILE_SIDE, top + tile_y * TILE_SIDE, digits)


def _palette(rng: np.random.Generator, names: tuple[str, ...]) -> tuple[str, ...]:
    """All names, or in half of the scenes only two or three, so that repeats exist to count."""
    if rng.random() < 0.5:
        return names
    return tuple(names[i] for i in rng.choice(len(names), int(rng.integers(2, 4)), replace=False))


def sample_scene(rng: np.random.Generator, layout: Layout) -> Scene:
    """Draw a scene; boxes never touch, and equal colour-shape pairs are made less likely."""
    side = layout.side
    sign = _place_sign(rng, side) if rng.random() < layout.sign_probability else None
    boxes: list[Box] = []
    if sign is not None:
        boxes.append((sign.left, sign.top, sign.left + SIGN_WIDTH, sign.top + SIGN_HEIGHT))
    colours, shapes = _palette(rng, COLOURS), _palette(rng, SHAPES)
    objects: list[SceneObject] = []
    pairs: set[tuple[str, str]] = set()
    for _ in range(int(rng.integers(layout.min_objects, layout.max_objects + 1))):
        for _attempt in range(25):
            size = OBJECT_SIZES[int(rng.integers(len(OBJECT_SIZES)))]
            left, top = (int(v) for v in rng.integers(0, side - size, 2))
            box = (left, top, left + size, top + size)
            if any(_touches(box, other) for other in boxes):
                continue
            pair = colours[rng.integers(len(colours))], shapes[rng.integers(len(shapes))]
            if pair in pairs and rng.random() < 0.6:
                continue
            pairs.add(pair)
            boxes.append(box)
            objects.append(SceneObject(*pair, left, top, size))
            break
    return Scene(side, tuple(objects), sign)
