"""Scenes and questions: deterministic, disjoint, balanced, and true."""

import hashlib
import itertools
import re
from collections import Counter

import numpy as np
import pytest

from eval.mini import TASKS, held_out
from eval.mini.data import DRAWN
from eval.mini.heldout import held_out_samples
from eval.mini.questions import ask
from eval.mini.scenes import (
    IMAGE_LAYOUT,
    TILE_LAYOUT,
    SeedFamily,
    sample_scene,
    stream,
)
from eval.mini.shapes import SIGN_HEIGHT, SIGN_WIDTH

NUMBERS = "zero one two three four five six seven".split()


@pytest.fixture(scope="module")
def scenes():
    rng = stream(SeedFamily.VALIDATION, 5)
    return [sample_scene(rng, IMAGE_LAYOUT) for _ in range(300)]


def brute_force(scene, text):
    """Answer a question by reading the list of objects, independently of the generator."""
    things = [(o.colour, o.shape, o.left + o.size / 2, o.top + o.size / 2) for o in scene.objects]
    words = re.findall(r"\w+", text)
    if text.startswith("Is there"):
        return "yes" if any(words[-2:] == [c, s] for c, s, _, _ in things) else "no"
    if " A. " in text:
        question, options = text.split("? ")
        answer = brute_force(scene, question + "?")
        listed = re.findall(r"(\w)\. (\w+)", options)
        return next(letter for letter, word in listed if word == answer)
    if text.startswith("What color"):
        (answer,) = [c for c, s, _, _ in things if s == words[-1]]
        return answer
    if text.startswith("What shape"):
        (answer,) = [s for c, s, _, _ in things if c == words[-2]]
        return answer
    if text.startswith("How many"):
        if words[3] == "objects":
            return NUMBERS[sum(c == words[2] for c, _, _, _ in things)]
        return NUMBERS[sum(s in (words[2][:-1], words[2][:-2]) for _, s, _, _ in things)]
    if text.startswith("What is the"):
        return str(scene.sign.digits[["first", "second", "third"].index(words[3])])
    if text.startswith("What does"):
        return "{} {} {}".format(*scene.sign.digits)

    def position(colour, shape):
        (where,) = [(x, y) for c, s, x, y in things if (c, s) == (colour, shape)]
        return where

    if text.startswith("Where") and "," not in text:
        x, y = position(*words[-2:])
        half = scene.side / 2
        return ("upper " if y < half else "lower ") + ("left" if x < half else "right")
    if text.startswith("Which"):
        x, y = position(words[4], words[5])
        return NUMBERS[int((x if words[1] == "column" else y) / (scene.side / 8))]
    if " or " in text:
        start = 3 if words[0] == "Where" else 2
        (ax, ay), (bx, by) = position(*words[start : start + 2]), position(*words[-2:])
        return (
            ("left" if ax < bx else "right") if "left" in words else "above" if ay < by else "below"
        )
    (ax, ay), (bx, by) = position(words[2], words[3]), position(*words[-2:])
    truth = {"left": ax < bx, "right": ax > bx, "above": ay < by, "below": ay > by}
    return "yes" if truth[words[4]] else "no"


@pytest.mark.parametrize("task", [*TASKS, "place", "order", "yes_no"])
def test_answers_are_true(scenes, task):
    rng = stream(SeedFamily.VALIDATION, 6)
    questions = [(scene, ask(rng, scene, task)) for scene in scenes]
    asked = [(scene, question) for scene, question in questions if question is not None]
    assert len(asked) > 100
    for scene, question in asked:
        assert question.task == task
        assert brute_force(scene, question.text) == question.answer, (scene, question)


@pytest.mark.parametrize("task", ["exist", "yes_no"])
def test_yes_and_no_are_balanced(scenes, task):
    rng = stream(SeedFamily.VALIDATION, 7)
    asked = [ask(rng, scene, task) for scene in scenes for _ in range(5)]
    answers = Counter(question.answer for question in asked if question is not None)
    assert set(answers) == {"yes", "no"}
    assert abs(answers["yes"] / answers.total() - 0.5) < 0.05


def test_options_are_balanced_and_distinct(scenes):
    rng = stream(SeedFamily.VALIDATION, 8)
    asked = [ask(rng, scene, "choice") for scene in scenes for _ in range(3)]
    found = [question for question in asked if question is not None]
    answers = Counter(question.answer for question in found)
    assert set(answers) == set("ABCD") and max(answers.values()) < 0.35 * answers.total()
    for question in found:
        assert len(set(re.findall(r"\. (\w+)", question.text))) == 4


def test_most_negatives_are_adversarial(scenes):
    rng = stream(SeedFamily.VALIDATION, 9)
    adversarial = []
    for scene in scenes:
        question = ask(rng, scene, "exist")
        if question is not None and question.answer == "no":
            colour, shape = re.findall(r"\w+", question.text)[-2:]
            both = {o.colour for o in scene.objects} & {colour}
            adversarial.append(bool(both) and any(o.shape == shape for o in scene.objects))
    assert 0.4 < np.mean(adversarial) < 0.8


@pytest.mark.parametrize("layout", [IMAGE_LAYOUT, TILE_LAYOUT])
def test_nothing_overlaps_or_leaves_the_picture(layout):
    rng = stream(SeedFamily.VALIDATION, 10)
    for _ in range(50):
        scene = sample_scene(rng, layout)
        boxes = [(o.left, o.top, o.left + o.size, o.top + o.size) for o in scene.objects]
        if scene.sign is not None:
            left, top = scene.sign.left, scene.sign.top
            boxes.append((left, top, left + SIGN_WIDTH, top + SIGN_HEIGHT))
            assert left // 112 == (left + SIGN_WIDTH - 1) // 112
            assert top // 112 == (top + SIGN_HEIGHT - 1) // 112
        assert all(min(box) >= 0 and max(box) <= layout.side for box in boxes)
        for a, b in itertools.combinations(boxes, 2):
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_held_out_is_deterministic_and_complete():
    first, again = held_out(3), held_out(2)
    for a, b in zip(first, again, strict=False):
        assert a.questions == b.questions and a.scene == b.scene
        np.testing.assert_array_equal(np.asarray(a.image), np.asarray(b.image))
    for sample in first:
        assert sample.image.size == (224, 224) and sample.image.mode == "RGB"
        assert [question.task for question in sample.questions] == list(TASKS)
        for question in sample.questions:
            assert brute_force(sample.scene, question.text) == question.answer
        assert 0.05 < sample.foreground.mean() < 0.4
        for item in sample.objects:
            box = sample.foreground[item.top :, item.left :][: item.size, : item.size]
            assert box.mean() > 0.25


def test_seed_families_share_nothing():
    drawn = [held_out_samples(family, 20260, 1)[0] for family in SeedFamily]
    pixels = [np.asarray(sample.image, np.float32) for sample in drawn]
    for (a, x), (b, y) in itertools.combinations(zip(drawn, pixels, strict=True), 2):
        assert a.scene != b.scene
        assert np.abs(x - y).mean() > 10
    corner = [stream(family, 0).integers(0, 2**62, 100) for family in SeedFamily]
    assert len(set(np.concatenate(corner).tolist())) == 300


def test_what_is_drawn_has_a_name():
    """A change here needs a new ``eval.mini.data.DRAWN``: answers in results are about these."""
    digest = hashlib.sha256()
    for sample in held_out(12):
        digest.update(sample.image.tobytes() + repr(sample.questions).encode())
    assert (DRAWN, digest.hexdigest()[:16]) == ("682a27b03c7362ed", "b65bc78fc1e29535")
