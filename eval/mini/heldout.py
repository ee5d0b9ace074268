"""Held-out pictures with at least one question of every task each.

The three seed families share neither scenes nor backgrounds nor noise. `held_out` gives the test
family, on which nothing was ever tuned.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from PIL import Image

from eval.mini.questions import TASKS, Question, ask
from eval.mini.render import Renderer
from eval.mini.scenes import (
    IMAGE_LAYOUT,
    Layout,
    Scene,
    SceneObject,
    SeedFamily,
    sample_scene,
    stream,
)
from llava_todre.errors import TodreError

TEST_SEED = 27182
_MOST_IMAGES = 10_000
"""What is drawn at once stays in memory, 150 kB each."""
_NUM_BACKGROUNDS = 48
_MAX_DRAWS = 20


@dataclass(frozen=True, eq=False)
class Sample:
    """A picture and what is asked about it.

    Fields:
        image: RGB, 224x224.
        questions: at least one of every task, in the order of `TASKS`.
        scene: where everything is, in pixels.
        foreground: bool (224, 224), true on shapes and on the sign.
    """

    image: Image.Image
    questions: tuple[Question, ...]
    scene: Scene
    foreground: np.ndarray

    @property
    def objects(self) -> tuple[SceneObject, ...]:
        """The scene's coloured shapes."""
        return self.scene.objects


@functools.lru_cache(maxsize=4)
def _renderer(family: SeedFamily, seed: int) -> Renderer:
    return Renderer(stream(family, seed, 0), _NUM_BACKGROUNDS)


def _distinct(
    rng: np.random.Generator, scene: Scene, task: str, count: int
) -> tuple[Question, ...]:
    """Up to `count` different questions of one task; none where the scene allows none."""
    found: dict[str, Question] = {}
    for _ in range(_MAX_DRAWS):
        question = ask(rng, scene, task)
        if question is not None:
            found.setdefault(question.text, question)
        if len(found) == count:
            break
    return tuple(found.values())


def held_out_samples(
    family: SeedFamily,
    seed: int,
    num_images: int,
    questions_per_task: int = 1,
    layout: Layout = IMAGE_LAYOUT,
) -> list[Sample]:
    """Samples of any family and layout. Image i is the same however many are asked for."""
    samples = []
    for index in range(num_images):
        rng = stream(family, seed, 1, index)
        while True:
            scene = sample_scene(rng, layout)
            asked = [_distinct(rng, scene, task, questions_per_task) for task in TASKS]
            if all(asked):
                break
        pixels, ids = _renderer(family, seed).render(rng, scene)
        questions = tuple(question for group in asked for question in group)
        samples.append(Sample(Image.fromarray(pixels), questions, scene, ids > 0))
    return samples


def held_out(num_images: int, seed: int = TEST_SEED, questions_per_task: int = 1) -> list[Sample]:
    """Test pictures, each with `questions_per_task` questions of every task.

    A few tasks have fewer distinct questions than asked for (a sign can be read in one way only);
    then there are as many as there can be.
    """
    check_num_images(num_images)
    return held_out_samples(SeedFamily.TEST, seed, num_images, questions_per_task)


def check_num_images(num_images: int) -> None:
    """Raise a TodreError unless so many pictures can be drawn."""
    if not 1 <= num_images <= _MOST_IMAGES:
        raise TodreError(
            f"num_images {num_images} is out of range; allowed: 1 to {_MOST_IMAGES:,}."
        )
