"""Two runs on the same items: how far apart they are, and how much of that may be luck.

Items are drawn with replacement, the same draw for both runs (paired bootstrap); an interval holds
the middle 95 % of the resampled values. Benchmarks with the same items share a draw, others are
drawn apart. For hits and misses there is McNemar's exact test as well: if the runs were equally
good, each item that only one of them gets right would be a fair coin.

Symbols: R resamples, T benchmarks, N items, U distinct rows of scores.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.results import read_run
from llava_todre.errors import TodreError
from llava_todre.intervals import LEVEL, RESAMPLES, SEED, Interval, relative_average

Items = Sequence[tuple[int, float]]
"""(doc_id, score) of every item, ascending doc_id; scores as fractions 0..1."""
Pair = tuple[Items, Items]
"""The same benchmark in two runs."""
_Array = NDArray[np.float64]
_CELLS = 4_000_000
"""Draws held in memory at once."""
_SHOWN_IDS = 3


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
    """Return the exact two-sided p value of McNemar's test.

    Args:
        only_first: items that only the first run gets right.
        only_second: items that only the second run gets right.
    """
    tosses = only_first + only_second
    ways, tail = 1, 0
    for heads in range(min(only_first, only_second) + 1):
        tail += ways
        ways = ways * (tosses - heads) // (heads + 1)
    return min(1.0, 2 * tail / 2**tosses)


def mean_interval(items: Items) -> Interval:
    """Return the 95 % interval of the mean score, in percent."""
    scores = np.array([[score] for _, score in items], dtype=np.float64)
    return _middle(100 * _resampled_means(scores, np.random.RandomState(SEED)))


def difference_interval(pairs: Sequence[Pair]) -> Interval:
    """Return the 95 % interval of first - second, mean over benchmarks, in percent."""
    means = paired_means(pairs)
    return _middle(100 * (means[..., 0] - means[..., 1]).mean(-1))


def relative_interval(pairs: Sequence[Pair]) -> Interval:
    """Return the 95 % interval of the relative average, in percent.

    Args:
        pairs: per benchmark the items of a run, and those of the unpruned run.
    """
    means = paired_means(pairs)
    return _middle(100 * relative_average(means[..., 0], means[..., 1]))


def paired_means(pairs: Sequence[Pair]) -> _Array:
    """Return the (R, T, 2) mean scores of both runs on every resample.

    Raises:
        TodreError: the runs of a pair did not score the same items.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, (first, second) in enumerate(pairs):
        require_same_items(first, second)
        groups.setdefault(tuple(sorted(doc_id for doc_id, _ in first)), []).append(index)
    stream = np.random.RandomState(SEED)
    means = np.empty((RESAMPLES, len(pairs), 2))
    for members in groups.values():
        both = (sorted(items) for index in members for items in pairs[index])
        columns = [[score for _, score in items] for items in both]
        drawn = _resampled_means(np.array(columns, dtype=np.float64).T, stream)
        means[:, members] = drawn.reshape(RESAMPLES, len(members), 2)
    return means


def require_same_items(first: Items, second: Items, benchmark: str = "") -> None:
    """Raise a TodreError unless both runs scored the same items, one or more."""
    ids, others = ({doc_id for doc_id, _ in items} for items in (first, second))
    if ids == others and len(first) == len(second) == len(ids) > 0:
        return
    odd = sorted(ids ^ others)
    shown = ", ".join(map(str, odd[:_SHOWN_IDS])) + (", ..." if len(odd) > _SHOWN_IDS else "")
    apart = f", {len(odd)} of them in one run only (doc_id {shown})" if odd else ""
    raise TodreError(
        f"items {benchmark and f'of {benchmark!r} '}differ: {len(first)} against {len(second)}"
        f"{apart}; allowed: two runs on the same items, each once."
    )


def _resampled_means(scores: _Array, stream: np.random.RandomState) -> _Array:
    """Return the means (R, C) of the columns of ``scores`` (N, C), rows drawn with replacement.

    Rows with equal scores are drawn together: how often each distinct row turns up is multinomial,
    and there are few of them (four for the hits of two runs).
    """
    rows, counts = np.unique(scores, axis=0, return_counts=True)
    at_once = max(1, _CELLS // len(counts))
    parts = []
    for start in range(0, RESAMPLES, at_once):
        size = min(at_once, RESAMPLES - start)
        drawn = stream.multinomial(len(scores), counts / len(scores), size)
        parts.append(drawn @ rows / len(scores))
    return np.concatenate(parts)


def _middle(values: _Array) -> Interval:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


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
    if not shared:
        raise TodreError(
            f"runs {first['name']!r} and {second['name']!r} have no benchmark in common of which "
            "both hold the scores of the items."
        )
    rows = [_compare(key, pair) for key, pair in shared.items()]
    if len(rows) > 1:
        mean = [float(np.mean([getattr(row, run) for row in rows])) for run in ("first", "second")]
        total = sum(row.num_items for row in rows)
        interval = difference_interval(list(shared.values()))
        rows.append(Comparison("mean", total, mean[0], mean[1], interval))
    return rows


def _items(run: dict[str, Any], benchmark: str) -> Items:
    stored = run["benchmarks"].get(benchmark) or {}
    return [(int(doc_id), float(score)) for doc_id, score in stored.get("items") or ()]


def _compare(benchmark: str, pair: Pair) -> Comparison:
    require_same_items(*pair, benchmark)
    first, second = (np.array([score for _, score in sorted(items)]) for items in pair)
    binary = bool(np.isin(np.concatenate([first, second]), (0, 1)).all())
    return Comparison(
        benchmark,
        len(first),
        100 * float(first.mean()),
        100 * float(second.mean()),
        difference_interval([pair]),
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
    lines += [
        "",
        f"Interval: paired bootstrap over items, {RESAMPLES:,} resamples. p: exact McNemar test,"
        " not corrected for several benchmarks.",
    ]
    left_out = sorted({*first["benchmarks"], *second["benchmarks"]} - {r.benchmark for r in rows})
    if left_out:
        lines.append(f"Not compared, as a run lacks their items: {', '.join(left_out)}.")
    compared = (row.benchmark for row in rows if row.benchmark in first["benchmarks"])
    odd = [key for key in compared if not is_mean(first["benchmarks"][key])]
    if odd:
        lines.append(f"The metric is not the mean of the items: {', '.join(odd)}.")
    return "\n".join(lines)


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
