"""Config files: typed by a dataclass, checked by jsonargparse, changed from the command line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import MISSING, fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt

from llava_todre.errors import TodreError, unknown
from llava_todre.files import parse_yaml

T = TypeVar("T")
_LONGEST_SHOWN = 80
_WORDS = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    PositiveInt: "a whole number, 1 or more",
    NonNegativeInt: "a whole number, 0 or more",
    PositiveInt | PositiveFloat: "a number above 0",
    NoneType: "null",
    dict: "'key: value' lines",
    list: "a list of names",
    tuple: "a list of names",
}
"""What messages call a type."""
_FLOATS = (float, PositiveFloat, Any)
_KEY = re.compile(r'key "(\w+)')


def parsed(cls: type[T], content: Any, where: str, **derived: Any) -> T:
    """Return a config as its dataclass.

    Args:
        cls: a dataclass with the keys of the config and their types.
        content: as read from a file.
        where: what messages begin with.
        derived: fields that are no keys of the config.

    Raises:
        TodreError: it is no mapping, has an unknown key, lacks one, or a value is of another type.
    """
    own = [field for field in fields(cls) if field.name not in derived]  # type: ignore[arg-type]
    hints, names = get_type_hints(cls), [field.name for field in own]
    check_keys(where, content, names)
    # jsonargparse lets null pass everywhere: where it is not allowed, the key counts as missing.
    given = {k: v for k, v in content.items() if v is not None or NoneType in get_args(hints[k])}
    required = [field.name for field in own if field.default is MISSING]
    check_keys(where, given, names, dict.fromkeys([*required, *content]))
    for key, value in given.items():  # it would read a text as YAML
        is_whole = isinstance(value, float) and not any(_has(kind, hints[key]) for kind in _FLOATS)
        if is_whole or (isinstance(value, str) and not _has(str, hints[key])):
            raise _wrong(where, key, value, hints[key])
    parser = _parser(cls)  # type: ignore[arg-type]  # a class is hashable
    try:
        found = vars(parser.instantiate(parser.parse_object(deepcopy({**content, **derived}))))
    except ArgumentError as error:
        match = _KEY.search(str(error))
        if match is None or match[1] not in hints:
            raise TodreError(f"{where}: {error}") from None
        raise _wrong(where, match[1], content.get(match[1]), hints[match[1]]) from None
    # jsonargparse reads texts as YAML; those stay as they are.
    texts = {k: v for k, v in content.items() if isinstance(v, str) or _has(Any, hints[k])}
    return cls(**found | texts)


def _has(kind: Any, hint: Any) -> bool:
    """Return whether a type, or a part of it, is of a kind; ``Any`` and literals are texts, too."""
    is_text = kind is str and (hint is Any or get_origin(hint) is Literal)
    return hint is kind or is_text or any(_has(kind, part) for part in get_args(hint))


@cache
def _parser(cls: type) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, None)
    return parser


def _wrong(where: str, key: str, value: Any, hint: Any) -> TodreError:
    return TodreError(f"{where}: {key} must be {' or '.join(_words(hint))}, got {value!r}.")


def _words(hint: Any) -> list[str]:
    """Return what messages call the kinds of value that a type allows."""
    kinds = get_args(hint)
    if get_origin(hint) is Literal:
        return list(map(repr, kinds))
    if get_origin(hint) in (UnionType, Union) and hint not in _WORDS:
        return [word for kind in kinds for word in _words(kind)]
    return [_WORDS[hint if hint in _WORDS else get_origin(hint)]]


def check_keys(
    where: str, config: Any, allowed: Iterable[str], required: Iterable[str] = ()
) -> None:
    """Raise unless a config is a mapping with only allowed keys and all required ones."""
    allowed = tuple(allowed)
    if not isinstance(config, Mapping):
        raise TodreError(f"{where} must hold 'key: value' lines.")
    for key in config:
        if key not in allowed:
            raise unknown(f"{where}: key", key, allowed)
    for key in required:
        if key not in config:
            raise TodreError(f"{where}: key {key!r} is missing; allowed: {', '.join(allowed)}.")


@contextmanager
def within(where: str) -> Iterator[None]:
    """Let every TodreError inside begin with where it happened."""
    try:
        yield
    except TodreError as error:
        text = str(error)
        raise TodreError(text if where in text else f"{where}: {text}") from None


def with_changes(config: Mapping[str, Any], changes: Iterable[str]) -> dict[str, Any]:
    """Return the config with ``key=value`` lines applied; dots lead into nested mappings.

    Args:
        config: as read from a file; not changed.
        changes: e.g. ``"options.tau=0.05"``; values are YAML.
    """
    changed: dict[str, Any] = dict(config)
    for line in changes:
        path, equals, text = line.partition("=")
        if not equals or not path:
            raise TodreError(f"set {line!r} is not of the form KEY=VALUE.")
        value = parse_yaml(text, f"set {line[:_LONGEST_SHOWN]!r}: the value")
        *parents, key = path.split(".")
        level = changed
        for parent in parents:
            inner = level.get(parent)
            if isinstance(inner, str) and parent == "model":
                inner = {"key": inner}  # a setting of a named model: keep its others
            if inner is not None and not isinstance(inner, Mapping):
                raise TodreError(f"set {line!r}: {parent!r} is {inner!r}, which has no keys.")
            level[parent] = dict(inner or {})
            level = level[parent]
        level[key] = value
    return changed
