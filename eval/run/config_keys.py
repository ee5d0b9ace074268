"""Keys of config files: which are allowed, and changes from the command line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from llava_todre.errors import TodreError, unknown
from llava_todre.files import parse_yaml

_LONGEST_SHOWN = 80


def check_keys(
    where: str, config: Mapping[str, Any], allowed: Iterable[str], required: Iterable[str] = ()
) -> None:
    """Raise unless a config has only allowed keys and all required ones."""
    allowed = tuple(allowed)
    for key in config:
        if key not in allowed:
            raise unknown(f"{where}: key", key, allowed)
    for key in required:
        if config.get(key) is None:
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
