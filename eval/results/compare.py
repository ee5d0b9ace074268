"""Two runs on the same items: how far apart they are, and how much of that may be luck.

Differences have intervals by paired bootstrap. For hits and misses there is McNemar's exact test
as well: if the runs were equally good, each item that only one of them gets right would be a fair
coin.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.results.bootstrap import (
    RESAMPLES,
    Groups,
    Interval,
    Items,
    Pair,
    difference_interval,
    groups_of,
    require_same_items,
)
from eval.results.files import read_run
from llava_todre.errors import TodreError

UNKNOWN = "items, of unknown images"


@dataclass(frozen=True)
class Comparison:
    """One benchmark; scores, difference and interval in percent."""

    benchmark: str
    num_items: int
    first: float
    """Mean item score of the first run."""
    second: float
    interval: Interval
    """Of ``first - second``."""
    only_first: int | None = None
    """Items that only the first run gets right; None where scores are not just 0 and 1."""
    only_second: int | None = None

    @property
    def p_value(self) -> float | None:
        """McNemar's exact p value, two-sided; None where scores are not just 0 and 1."""
        if self.only_first is None or self.only_second is None:
            return None
        return mcnemar(self.only_first, self.only_second)


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the exact two-sided p value of McNemar's test."""
    tosses = only_first + only_second
    ways, tail = 1, 0
    for heads in range(min(only_first, only_second) + 1):
        tail += ways
        ways = ways * (tosses - heads) // (heads + 1)
    return min(1.0, 2 * tail / 2**tosses)


def drawn_over(*stored: Mapping[str, Any]) -> str:
    """Return what the bootstrap of a benchmark draws: images, or items; or that it cannot know."""
    if not any(each.get("groups") for each in stored):
        return UNKNOWN
    return "items" if groups_of(*stored) is None else "images"


def compare(first: dict[str, Any], second: dict[str, Any]) -> list[Comparison]:
    """Return one comparison per benchmark whose items both runs hold, then their mean.

    Raises:
        TodreError: a run failed, no benchmark in common, or different items.
    """
    for run in (first, second):
        if run["status"] != "complete":
            raise TodreError(f"run {run['name']!r} failed ({run['error']}); allowed: complete.")
    shared = {
        key: (_items(first, key), _items(second, key))
        for key in first["benchmarks"]
        if _items(first, key) and _items(second, key)
    }
    groups = {key: groups_of(*_both(first, second, key)) for key in shared}
    if not shared:
        raise TodreError(
            f"runs {first['name']!r} and {second['name']!r} have no benchmark in common of which "
            "both hold the scores of the items."
        )
    rows = [_compare(key, pair, groups[key]) for key, pair in shared.items()]
    if len(rows) > 1:
        mean = [float(np.mean([getattr(row, run) for row in rows])) for run in ("first", "second")]
        total = sum(row.num_items for row in rows)
        interval = difference_interval(list(shared.values()), list(groups.values()))
        rows.append(Comparison("mean", total, mean[0], mean[1], interval))
    return rows


def _items(run: dict[str, Any], benchmark: str) -> Items:
    stored = run["benchmarks"].get(benchmark) or {}
    return [(int(doc_id), float(score)) for doc_id, score in stored.get("items") or ()]


def _both(first: Mapping[str, Any], second: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    return [run["benchmarks"][key] for run in (first, second)]


def _compare(benchmark: str, pair: Pair, groups: Groups | None) -> Comparison:
    require_same_items(*pair, benchmark)
    first, second = (np.array([score for _, score in sorted(items)]) for items in pair)
    binary = bool(np.isin(np.concatenate([first, second]), (0, 1)).all())
    return Comparison(
        benchmark,
        len(first),
        100 * float(first.mean()),
        100 * float(second.mean()),
        difference_interval([pair], [groups]),
        int((first > second).sum()) if binary else None,
        int((first < second).sum()) if binary else None,
    )


def render(first: dict[str, Any], second: dict[str, Any]) -> str:
    """Return the comparison as lines of text."""
    rows = compare(first, second)
    width = max(len(row.benchmark) for row in rows + [Comparison("benchmark", 0, 0, 0, (0, 0))])
    lines = [
        f"A = {first['name']}, B = {second['name']}; mean item scores in percent",
        f"{'benchmark':<{width}}  {'items':>7}  {'A':>6}  {'B':>6}  {'A - B [95 %]':>22}"
        f"  {'only A':>7}  {'only B':>7}  {'p':>8}",
    ]
    for row in rows:
        low, high = row.interval
        lead = f"{row.first - row.second:+.1f} [{low:+.1f}, {high:+.1f}]"
        blank = row.p_value is None
        counts = ["", "", ""] if blank else [row.only_first, row.only_second, f"{row.p_value:.2g}"]
        lines.append(
            f"{row.benchmark:<{width}}  {row.num_items:>7}  {row.first:>6.1f}  {row.second:>6.1f}"
            f"  {lead:>22}  {counts[0]:>7}  {counts[1]:>7}  {counts[2]:>8}".rstrip()
        )
    lines += ["", *_how_drawn(first, second, [row.benchmark for row in rows])]
    left_out = sorted({*first["benchmarks"], *second["benchmarks"]} - {r.benchmark for r in rows})
    if left_out:
        lines.append(f"Not compared, as a run lacks their items: {', '.join(left_out)}.")
    compared = (row.benchmark for row in rows if row.benchmark in first["benchmarks"])
    odd = [key for key in compared if not is_mean(first["benchmarks"][key])]
    if odd:
        lines.append(f"The metric is not the mean of the items: {', '.join(odd)}.")
    return "\n".join(lines)


def _how_drawn(first: dict[str, Any], second: dict[str, Any], shown: Sequence[str]) -> list[str]:
    """Return what was drawn for the intervals, and what p is based on."""
    kinds: dict[str, list[str]] = {}
    for key in (key for key in shown if key in first["benchmarks"]):
        kinds.setdefault(drawn_over(*_both(first, second, key)), []).append(key)
    drawn = over_what(kinds)
    independent = " It takes items about one image for independent." if "images" in kinds else ""
    return [
        f"Interval: paired bootstrap over {drawn}, {RESAMPLES:,} resamples. p: exact McNemar test,"
        f" not corrected for several benchmarks.{independent}"
    ]


def over_what(kinds: Mapping[str, Sequence[str]]) -> str:
    """Return in words what :func:`drawn_over` found, by kind the benchmarks of it."""
    words = {UNKNOWN: "items (whether they share images is not on record)"}
    if len(kinds) == 1:
        return "".join(words.get(kind, kind) for kind in kinds)
    return "; over ".join(
        f"{words.get(kind, kind)}: {', '.join(keys)}" for kind, keys in sorted(kinds.items())
    )


def is_mean(stored: Mapping[str, Any]) -> bool:
    """Return whether a benchmark's score is the mean of its items, as F1 and MME points are not."""
    if not stored.get("items") or stored["score"] is None or stored["scale"] != "percent":
        return False
    mean = 100 * float(np.mean([score for _, score in stored["items"]]))
    return abs(mean - stored["score"]) < 0.05  # a score may be stored rounded


def add_parser(commands: Any) -> None:
    """Add ``compare`` to the commands of ``python -m eval``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "compare", help="difference of two runs on the same items: interval and McNemar test"
    )
    parser.add_argument("first", type=Path, help="JSON of a run")
    parser.add_argument("second", type=Path, help="JSON of another run")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    print(render(read_run(options.first), read_run(options.second)))
    return 0
