"""Nine kinds of questions in the spirit of the papers' benchmarks, with exact answers.

`ask` draws one question about a scene, or gives None where the scene does not determine a
unique answer. Yes and no are equally likely; most "no" questions name a colour and a shape that
are both in the picture, only not on one object, as POPE's adversarial negatives do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from eval.mini.scenes import Scene, SceneObject
from eval.mini.shapes import COLOURS, SHAPES

TASKS = ("exist", "colour", "shape", "count", "where", "relation", "digit", "read", "choice")
PLACE = "place"
"""Asked in training only: the row or column (of eight) of an object. It teaches location finely
enough for `where` and `relation`, which alone give one or two bits per question."""
YES_NO = "yes_no"
"""Asked in training only: a relation as a yes-or-no question. Its answer is a parity of the word
asked about and the true side, and a parity shows no gradient until both are known: it stayed at
chance until `relation`, which is answered with the side itself, had been learnt."""
ORDER = "order"
"""Asked in training only: `relation` in two wordings, one of which is nearly that of `yes_no`."""

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven")
ORDINALS = ("first", "second", "third")
LETTERS = ("A", "B", "C", "D")
PLURALS = {name: name + ("es" if name == "cross" else "s") for name in SHAPES}
WHERE_MARGIN = 0.08
"""Share of the side that an object must be away from both middle lines to have a quadrant."""
RELATION_MARGIN = 0.1
"""Share of the side by which two centres must differ along the axis that is asked about."""
ADVERSARIAL_SHARE = 0.6


@dataclass(frozen=True)
class Question:
    """`text` as a user would type it; `answer` in the words of the model."""

    task: str
    text: str
    answer: str


def _name(item: SceneObject) -> str:
    return f"{item.colour} {item.shape}"


def _singles(scene: Scene) -> list[SceneObject]:
    """Objects whose colour-shape pair occurs once."""
    counts = Counter(_name(item) for item in scene.objects)
    return [item for item in scene.objects if counts[_name(item)] == 1]


def _exist(rng: np.random.Generator, scene: Scene) -> tuple[str, str] | None:
    present = {(item.colour, item.shape) for item in scene.objects}
    if rng.random() < 0.5 and scene.objects:
        item = scene.objects[int(rng.integers(len(scene.objects)))]
        colour, shape, answer = item.colour, item.shape, "yes"
    else:
        absent = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in present]
        if rng.random() < ADVERSARIAL_SHARE:
            colours, shapes = {c for c, _ in present}, {s for _, s in present}
            mixed = [(c, s) for c, s in absent if c in colours and s in shapes]
            absent = mixed or absent
        colour, shape = absent[int(rng.integers(len(absent)))]
        answer = "no"
    article = "an" if colour[0] in "aeiou" else "a"
    return f"Is there {article} {colour} {shape}?", answer


def _attribute(rng: np.random.Generator, scene: Scene, kind: str) -> tuple[str, str] | None:
    """What colour a shape has, or what shape a colour, where only one object fits."""
    given = "shape" if kind == "colour" else "colour"
    counts = Counter(getattr(item, given) for item in scene.objects)
    unique = [item for item in scene.objects if counts[getattr(item, given)] == 1]
    if not unique:
        return None
    item = unique[int(rng.integers(len(unique)))]
    if kind == "colour":
        return f"What color is the {item.shape}?", item.colour
    return f"What shape is the {item.colour} object?", item.shape


def _colour(rng: np.random.Generator, scene: Scene) -> tuple[str, str] | None:
    return _attribute(rng, scene, "colour")


def _shape(rng: np.random.Generator, scene: Scene) -> tuple[str, str] | None:
    return _attribute(rng, scene, "shape")


def _choice(rng: np.random.Generator, scene: Scene) -> tuple[str, str] | None:
    """An attribute question with four options; two wrong ones are taken from the scene."""
    kind = ("colour", "shape")[int(rng.integers(2))]
    asked = _attribute(rng, scene, kind)
    if asked is None:
        return None
    text, answer = asked
    others = [name for name in (COLOURS if kind == "colour" else SHAPES) if name != answer]
    others = [others[i] for i in rng.permutation(len(others))]
    seen = {getattr(item, kind) for item in scene.objects}
    options = [name for name in others if name in seen][:2]
    options += [name for name in others if name not in options][: 3 - len(options)]
    options = [options[i] for i in rng.permutation(3)]
    place = int(rng.integers(4))
    options.insert(place, answer)
    listed = " ".join(f"{k}. {name}" for k, name in zip(LETTERS, options, strict=True))
    return f"{text} {listed}", LETTERS[place]


def _count(rng: np.random.Generator, scene: Scene) -> tuple[str, str] | None:
    """How many of a colour or shape; 0, 1, 2 and more are equally likely where possible."""
    by_colour = bool(rng.integers(2))
    names = COLOURS if by_colour else SHAPES
    found = Counter(item.colour if by_colour else item.shape for item in scene.objects)
    wanted = int(rng.integers(4))
    fitting = [name for name in names if min(found[name], 3) == wanted]
    fitting = fitting or [name for name in names if found[name]]
    if not fitting:
        return None
    name = fitting[int(rng.integers(len(fitting)))]
    things = f"{name} objects" if by_colour else PLURALS[name]
    return f"How many {things} are there?", NUMBERS[found[name]]


def _where(rng: np.random.Generator, scene: Scene) -> tuple[str, str] | None:
    middle, margin = scene.side / 2, WHERE_MARGIN * scene.side
    clear = [item for item in _singles(scene) if all(abs(v - middle) > margin for v in item.centre)]
    if not clear:
        return None
    item = clear[int(rng.integers(len(clear)))]
    x, y = item.centre
    answer = f"{'lower' if y > middle else 'upper'} {'right' if x > middle else 'left'}"
    return f"Where is the {_name(item)}?", answer


def _apart(rng: np.random.Generator, scene: Scene) -> tuple[SceneObject, SceneObject, int] | None:
    """Two uniquely named objects and an axis (0: x, 1: y) along which they clearly differ."""
    singles = _singles(scene)
    pairs = [
        (a, b, axis)
        for a in singles
        for b in singles
        for axis in (0, 1)
        if abs(a.centre[axis] - b.centre[axis]) > RELATION_MARGIN * scene.side
    ]
    return pairs[int(rng.integers(len(pairs)))] if pairs else None


def _side(a: SceneObject, b: SceneObject, axis: int) -> tuple[str, str]:
    """The end of a question for the side of `b` on which `a` is, and its answer."""
    sides = (("left", "right"), ("above", "below"))[axis]
    end = f"{sides[0]} or {sides[1]}{(' of', '')[axis]} the {_name(b)}?"
    return end, sides[int(a.centre[axis] > b.centre[axis])]


def _relation(rng: np.random.Generator, scene: Scene) -> tuple[str, str] | None:
    apart = _apart(rng, scene)
    if apart is None:
        return None
    end, answer = _side(*apart)
    return f"Where is the {_name(apart[0])}, {end}", answer


def _order(rng: np.random.Generator, scene: Scene) -> tuple[str, str] | None:
    apart = _apart(rng, scene)
    if apart is None:
        return None
    end, answer = _side(*apart)
    name = _name(apart[0])
    start = f"Where is the {name}," if rng.random() < 0.5 else f"Is the {name}"
    return f"{start} {end}", answer


def _yes_no(rng: np.random.Generator, scene: Scene) -> tuple[str, str] | None:
    apart = _apart(rng, scene)
    if apart is None:
        return None
    a, b, axis = apart
    second = int(rng.integers(2))
    word = (("left of", "right of"), ("above", "below"))[axis][second]
    is_before = a.centre[axis] < b.centre[axis]
    answer = "yes" if is_before == (second == 0) else "no"
    return f"Is the {_name(a)} {word} the {_name(b)}?", answer


def _digit(rng: np.random.Generator, scene: Scene) -> tuple[str, str] | None:
    if scene.sign is None:
        return None
    slot = int(rng.integers(len(scene.sign.digits)))
    return f"What is the {ORDINALS[slot]} digit?", str(scene.sign.digits[slot])


def _read(rng: np.random.Generator, scene: Scene) -> tuple[str, str] | None:
    if scene.sign is None:
        return None
    return "What does the sign say?", " ".join(str(digit) for digit in scene.sign.digits)


def _place(rng: np.random.Generator, scene: Scene) -> tuple[str, str] | None:
    singles = _singles(scene)
    if not singles:
        return None
    item = singles[int(rng.integers(len(singles)))]
    axis = int(rng.integers(2))
    cell = int(item.centre[axis] * len(NUMBERS) // scene.side)
    return f"Which {('column', 'row')[axis]} is the {_name(item)} in?", NUMBERS[cell]


_ASKERS: dict[str, Callable[[np.random.Generator, Scene], tuple[str, str] | None]] = {
    "exist": _exist,
    "colour": _colour,
    "shape": _shape,
    "count": _count,
    "where": _where,
    "relation": _relation,
    "digit": _digit,
    "read": _read,
    "choice": _choice,
    PLACE: _place,
    YES_NO: _yes_no,
    ORDER: _order,
}


def ask(rng: np.random.Generator, scene: Scene, task: str) -> Question | None:
    """One question of `task`, or None where the scene does not determine its answer."""
    asked = _ASKERS[task](rng, scene)
    return None if asked is None else Question(task, *asked)
