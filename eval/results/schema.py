"""Shapes of JSON: what stored results must look like, and the one line that says where they do not.

A shape is a :class:`Value`, :class:`Each`, or a mapping of key to shape, where a key that ends in
``?`` may be missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_todre import files
from llava_todre.errors import TodreError

_LARGEST = 1e300
_SHOWN = 60


@dataclass(frozen=True)
class Value:
    """A value that is not taken apart further."""

    is_right: Callable[[Any], bool]
    expected: str


@dataclass(frozen=True)
class Each:
    """A mapping, or with ``listed`` a list, whose values all have the same shape."""

    shape: Any
    listed: bool = False


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number that fits a float."""
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_real and -_LARGEST <= value <= _LARGEST  # false for NaN


def is_whole(value: Any, least: int = 0) -> bool:
    """Return whether a value is a whole number of at least so much."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= _LARGEST


def _is_text(value: Any) -> bool:
    """Return whether a value is text that can be written; half a surrogate pair cannot."""
    return isinstance(value, str) and not any(0xD800 <= ord(letter) < 0xE000 for letter in value)


def _is_items(value: Any) -> bool:
    """Return whether a value is null, or pairs of distinct ids and scores from 0 to 1."""
    if value is None:
        return True
    if not isinstance(value, list) or not all(isinstance(p, list) and len(p) == 2 for p in value):
        return False
    sound = all(is_whole(i) and is_number(score) and 0 <= score <= 1 for i, score in value)
    return sound and len({i for i, _ in value}) == len(value)


def one_of(*allowed: str) -> Value:
    """Return the shape of one of some words."""
    return Value(lambda value: isinstance(value, str) and value in allowed, " or ".join(allowed))


def or_null(kind: Value) -> Value:
    """Return a shape that may be null instead."""
    return Value(lambda v: v is None or kind.is_right(v), f"{kind.expected}, or null")


TEXT = Value(_is_text, "text")
TRUTH = Value(lambda value: isinstance(value, bool), "true or false")
NUMBER = Value(is_number, "a finite number")
WHOLE = Value(is_whole, "a whole number, 0 or more")
COUNT = Value(lambda value: is_whole(value, 1), "a whole number, 1 or more")
KEYS = Value(lambda value: isinstance(value, dict), "keys with values")
ITEMS = Value(_is_items, "null, or pairs of doc_id (each once) and score between 0 and 1")
GROUPS = Value(
    lambda value: value is None or (isinstance(value, list) and all(map(is_whole, value))),
    "null, or a whole number for each item",
)
NUMBERS = Value(
    lambda value: (
        isinstance(value, dict) and all(v is None or is_number(v) for v in value.values())
    ),
    "keys with numbers",
)
WATCHED = Value(
    lambda value: (
        isinstance(value, dict) and _is_text(value.get("answer")) and is_number(value.get("share"))
    ),
    "an answer and its share",
)
ABSENT = Value(lambda value: False, "no such key in a file")
HITS = Value(
    lambda value: isinstance(value, list) and all(hit in (0, 1) for hit in value),
    "a list of 0 and 1",
)


PERCENTILES = {"median": NUMBER, "p20": NUMBER, "p80": NUMBER, "count?": COUNT}


def read_json(file: Path) -> Any:
    """Return the JSON in a file, or raise a TodreError."""
    return files.read_json(file, "result")


def checked(value: Any, shape: Any, file: Path) -> Any:
    """Return a value that has a shape.

    Raises:
        TodreError: it has not; names file, key, value and what is expected.
    """
    _check(value, shape, "", f"result {str(file)!r}")
    return value


def _check(value: Any, shape: Any, path: str, where: str) -> None:
    if isinstance(shape, Value):
        if not shape.is_right(value):
            raise _wrong(where, path, value, shape.expected)
        return
    listed = isinstance(shape, Each) and shape.listed
    if not isinstance(value, list if listed else dict):
        raise _wrong(where, path, value, "a list" if listed else "keys with values")
    if isinstance(shape, Each):
        pairs: Iterable[tuple[Any, Any]] = enumerate(value) if listed else dict(value).items()
        for key, each in pairs:
            _check(each, shape.shape, f"{path}.{key}", where)
        return
    for name, inner in shape.items():
        key = name.removesuffix("?")
        if key in value:
            _check(value[key], inner, f"{path}.{key}", where)
        elif key == name:
            expected = inner.expected if isinstance(inner, Value) else "keys with values"
            raise TodreError(f"{where} has no {_named(f'{path}.{key}')}; expected: {expected}.")


def _wrong(where: str, path: str, value: Any, expected: str) -> TodreError:
    try:
        shown = repr(value)[:_SHOWN]
    except (ValueError, RecursionError):  # a number of thousands of digits, lists in lists
        shown = f"a {type(value).__name__}"
    return TodreError(f"{where} has {_named(path)} {shown}; expected: {expected}.")


def _named(path: str) -> str:
    text = path.removeprefix(".") or "content"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
