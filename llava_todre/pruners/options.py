"""Options that declare themselves: default, range and help are written once, where they are read.

Checks, the method's YAML file and the table of bad values in the tests are made from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from llava_todre.errors import TodreError, unknown


@dataclass(frozen=True)
class Option:
    """What an option of a method may be; for a list, what each of its numbers may be."""

    help: str
    kind: type
    """float, int, bool, str (one of ``choices``) or tuple (a list of numbers)."""
    low: float | None = None
    high: float | None = None
    above: float | None = None
    """Like ``low``, but not the bound itself."""
    below: float | None = None
    choices: tuple[str, ...] = ()
    optional: bool = False
    """Whether None is allowed as well."""

    def allowed(self, key: str) -> str:
        """Return in words what ``key`` may be."""
        if self.choices:
            return " or ".join([", ".join(self.choices[:-1]), self.choices[-1]])
        if self.kind is bool:
            return "true or false"
        name = "each" if self.kind is tuple else key
        low, sign = (self.low, "<=") if self.above is None else (self.above, "<")
        high, under = (self.high, "<=") if self.below is None else (self.below, "<")
        bounds = ""
        if low is not None and high is not None:
            bounds = f", {low:g} {sign} {name} {under} {high:g}"
        elif low is not None:
            bounds = f", {name} {sign.replace('<', '>')} {low:g}"
        words = {float: "a number", int: "a whole number", tuple: "a list of numbers"}
        return words[self.kind] + bounds + (", or null" if self.optional else "")

    def check(self, key: str, value: Any) -> None:
        """Raise a TodreError unless ``value`` is allowed."""
        if self.choices:
            if value not in self.choices:
                raise unknown(key, value, self.choices)
        elif not (self._fits(value) or (self.optional and value is None)):
            shown = list(value) if isinstance(value, tuple) else value
            raise TodreError(f"{key} must be {self.allowed(key)}, got {shown!r}.")

    def _fits(self, value: Any) -> bool:
        if self.kind is tuple:
            return isinstance(value, tuple) and all(self._in_range(one, float) for one in value)
        return type(value) is bool if self.kind is bool else self._in_range(value, self.kind)

    def _in_range(self, value: Any, kind: type) -> bool:
        if type(value) is not int and not (kind is float and isinstance(value, float)):
            return False
        return bool(
            value == value  # not NaN
            and (self.low is None or self.low <= value)
            and (self.above is None or self.above < value)
            and (self.high is None or value <= self.high)
            and (self.below is None or value < self.below)
        )


def option(default: Any, help: str, *, choices: Sequence[str] = (), **bounds: float) -> Any:
    """Declare a field of a method as an option, of the kind of its default.

    Args:
        default: a number, whole number, flag, one of ``choices``, or a tuple of numbers; None for
            a whole number that need not be given.
        help: one sentence or two.
        choices: the names allowed.
        bounds: ``low``, ``high``, ``above`` (not the bound itself) or ``below``.
    """
    kind = int if default is None else type(default)
    declared = Option(help, kind, choices=tuple(choices), optional=default is None, **bounds)
    return field(default=default, metadata={"option": declared})


def options_of(method: type) -> dict[str, Option]:
    """Return the declared options of a method; a new default keeps the base's declaration."""
    found = {}
    for each in fields(method):
        for base in method.__mro__:
            mine = vars(base).get("__dataclass_fields__", {}).get(each.name)
            if mine is not None and "option" in mine.metadata:
                found[each.name] = mine.metadata["option"]
                break
    return found
