"""The goals of the project for speed, and whether a result meets them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from eval.bench.dims import SIZES

Result = Mapping[str, Any]
Percentiles = Mapping[str, float]
Verdict = Literal["pass", "miss", "unclear", "not measured"]
"""Unclear: the median is on the wrong side, but so near that this machine's noise may be why."""
RATIO = 0.10


@dataclass(frozen=True)
class Bar:
    """One goal, a ratio taken in one process."""

    what: str
    limit: float
    at_most: bool
    unit: Literal["", "%", "x"]
    value: Callable[[Result], Percentiles | None]
    """What a result gives; None where it says nothing about this."""

    def verdict(self, found: Percentiles | None) -> Verdict:
        """Return whether the median is on the right side, and if not, whether that is certain."""
        if found is None:
            return "not measured"
        if self._holds(found["median"]):
            return "pass"
        nearest = found.get("low" if self.at_most else "high", found["median"])
        return "unclear" if self._holds(nearest) else "miss"

    def _holds(self, value: float) -> bool:
        return value <= self.limit if self.at_most else value >= self.limit

    def written(self, value: float | None) -> str:
        """Return a value, or the limit, with its unit."""
        if value is None:
            return "-"
        return f"{100 * value:.2f} %" if self.unit == "%" else f"{value:.2f}{self.unit}"


def judged(result: Result) -> list[dict[str, Any]]:
    """Return a row per goal."""
    made = []
    for bar in BARS:
        found = bar.value(result)
        value = None if found is None else found["median"]
        made.append(
            {
                "what": bar.what,
                "value": value,
                "written": bar.written(value),
                "goal": ("at most " if bar.at_most else "at least ") + bar.written(bar.limit),
                "verdict": bar.verdict(found),
            }
        )
    return made


def _row(result: Result) -> Result | None:
    """Return ToDRE at 10 %, if it was timed."""
    for row in result.get("methods", ()):
        found = row["method"] == "todre" and dict(row["options"]) == {"retain_ratio": RATIO}
        if found and row["measured"]:
            return row
    return None


def _of_limit(size: str) -> Callable[[Result], Percentiles | None]:
    def value(result: Result) -> Percentiles | None:
        row = _row(result)
        matches = result["decoder"] == SIZES[size].decoder.as_dict()
        matches = matches and (result["on_gpu"] or not SIZES[size].needs_gpu)
        return row["prefill_of_limit"] if row is not None and matches else None

    return value


def _selection(result: Result) -> Percentiles | None:
    row = _row(result)
    return None if row is None else row["selection_of_prefill"]


def _added(key: str, index: int | None = None) -> Callable[[Result], Percentiles | None]:
    """Return what a part adds: on a GPU the difference, on a CPU its own time, see ``overhead``."""

    def value(result: Result) -> Percentiles | None:
        found = result.get(key)
        if not found:
            return None
        part: Result = found if index is None else found[index]
        return part["added" if result["on_gpu"] else "inside"]

    return value


def _at(key: str, name: str) -> Callable[[Result], Percentiles | None]:
    return lambda result: result[key][name] if result.get(key) else None


BARS = (
    Bar(
        "prefill speed-up at 10 % / what FLOPs allow, 7B on a GPU",
        0.85,
        False,
        "",
        _of_limit("7b"),
    ),
    Bar("prefill speed-up at 10 % / what FLOPs allow, CPU size", 0.80, False, "", _of_limit("cpu")),
    Bar("selection / unpruned prefill", 0.02, True, "%", _selection),
    Bar("probing every layer L/2..L / unpruned prefill", 0.03, True, "%", _added("probe", 0)),
    Bar("probing every layer L/2..L / prefill at 10 %", 0.03, True, "%", _added("probe", 1)),
    Bar("attention row of [CLS] / vision tower", 0.01, True, "%", _added("cls_row")),
    Bar(
        "samples/s, 18 questions per picture, 10 % / unpruned",
        6,
        False,
        "x",
        _at("loads", "per_picture"),
    ),
    Bar(
        "samples/s, batch of 8, 10 % / unpruned one by one", 4, False, "x", _at("loads", "batched")
    ),
    Bar(
        "attached but off / untouched model, on top",
        0.01,
        True,
        "%",
        _at("attached_but_off", "added"),
    ),
    Bar(
        "samples/s of a stock model, 18 questions per picture, 10 % / unpruned",
        6,
        False,
        "x",
        _at("stock_loads", "per_picture"),
    ),
)
