"""Shapes of JSON: what stored results must look like, and the one line that says where they do not.

A shape is a type (:data:`_KINDS`), a :class:`Value`, a tuple of what a value may be (texts, None,
types), ``[shape]`` for a list, ``{...: shape}`` for keys with values of one shape, or a mapping of
key to shape, where a key that ends in ``?`` may be missing.
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


_KINDS: dict[Any, Value] = {
    str: Value(_is_text, "text"),
    bool: Value(lambda value: isinstance(value, bool), "true or false"),
    float: Value(is_number, "a finite number"),
    int: Value(is_whole, "a whole number, 0 or more"),
    dict: Value(lambda value: isinstance(value, dict), "keys with values"),
    list: Value(lambda value: isinstance(value, list), "a list"),
    None: Value(lambda value: value is None, "null"),
}
COUNT = Value(lambda value: is_whole(value, 1), "a whole number, 1 or more")
ABSENT = Value(lambda value: False, "no such key in a file")
PERCENTILES = {"median": float, "p20": float, "p80": float, "count?": COUNT}


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


def _as_value(shape: Any) -> Value:
    """Return a shape as what is looked at first."""
    if isinstance(shape, Value):
        return shape
    if isinstance(shape, str):
        return Value(lambda value: value == shape, shape)
    if isinstance(shape, tuple):
        each = [_as_value(part) for part in shape]
        words = [part.expected for part in each]
        text = " or ".join(words) if None not in shape else f"{' or '.join(words[:-1])}, or null"
        return Value(lambda value: any(part.is_right(value) for part in each), text)
    return _KINDS[type(shape) if isinstance(shape, (dict, list)) else shape]


def _check(value: Any, shape: Any, path: str, where: str) -> None:
    kind = _as_value(shape)
    if not kind.is_right(value):
        raise TodreError(f"{where} has {_named(path)} {_shown(value)}; expected: {kind.expected}.")
    if isinstance(shape, list) or (isinstance(shape, dict) and ... in shape):
        listed = isinstance(shape, list)
        place: Any = 0 if listed else ...
        pairs: Iterable[tuple[Any, Any]] = enumerate(value) if listed else value.items()
        for key, each in pairs:
            _check(each, shape[place], f"{path}.{key}", where)
    elif isinstance(shape, dict):
        for name, part in shape.items():
            key = name.removesuffix("?")
            if key in value:
                _check(value[key], part, f"{path}.{key}", where)
            elif key == name:
                text = _as_value(part).expected
                raise TodreError(f"{where} has no {_named(f'{path}.{key}')}; expected: {text}.")


def _shown(value: Any) -> str:
    try:
        return repr(value)[:_SHOWN]
    except (ValueError, RecursionError):  # a number of thousands of digits, lists in lists
        return f"a {type(value).__name__}"


def _named(path: str) -> str:
    text = path.removeprefix(".") or "content"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
