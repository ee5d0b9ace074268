"""Two runs on the same items: how far apart they are, and how much of that may be luck.

Items are drawn with replacement, the same draw for both runs (paired bootstrap); an interval holds
the middle 95 % of the resampled values. Where several items ask about one image, images are drawn,
with all of their items: what makes an image hard is no news the second time. Benchmarks with the
same items share a draw, others are drawn apart. For hits and misses there is McNemar's exact test
as well: if the runs were equally good, each item that only one of them gets right would be a fair
coin.

Symbols: R resamples, T benchmarks, N items, G images or single items, C columns.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.results.files import read_run
from llava_todre.errors import TodreError
from llava_todre.intervals import LEVEL, RESAMPLES, SEED, Interval, relative_average

Items = Sequence[tuple[int, float]]
"""(doc_id, score) of every item, ascending doc_id; scores as fractions 0..1."""
Pair = tuple[Items, Items]
"""The same benchmark in two runs."""
Groups = Mapping[int, int]
"""doc_id -> number of its image."""
_Array = NDArray[np.float64]
UNKNOWN = "items, of unknown images"
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


def groups_of(*stored: Mapping[str, Any]) -> Groups | None:
    """Return which items of a benchmark ask about the same image; None where none do.

    Args:
        stored: parts of runs with the same items; the first that knows of images is believed.
    """
    for each in stored:
        if each.get("groups"):
            groups = dict(zip((doc_id for doc_id, _ in each["items"]), each["groups"], strict=True))
            return groups if len({*groups.values()}) < len(groups) else None
    return None


def drawn_over(*stored: Mapping[str, Any]) -> str:
    """Return what the bootstrap of a benchmark draws: images, or items; or that it cannot know."""
    if not any(each.get("groups") for each in stored):
        return UNKNOWN
    return "items" if groups_of(*stored) is None else "images"


def mean_interval(items: Items, groups: Groups | None = None) -> Interval:
    """Return the 95 % interval of the mean score, in percent."""
    ordered = sorted(items)
    scores = np.array([[score] for _, score in ordered], dtype=np.float64)
    means = _resampled_means(scores, _numbers(ordered, groups), np.random.RandomState(SEED))
    return _middle(100 * means)


def difference_interval(
    pairs: Sequence[Pair], groups: Sequence[Groups | None] | None = None
) -> Interval:
    """Return the 95 % interval of first - second, mean over benchmarks, in percent."""
    means = paired_means(pairs, groups)
    return _middle(100 * (means[..., 0] - means[..., 1]).mean(-1))


def relative_interval(
    pairs: Sequence[Pair], groups: Sequence[Groups | None] | None = None
) -> Interval:
    """Return the 95 % interval of the relative average, in percent.

    Args:
        pairs: per benchmark the items of a run, and those of the unpruned run.
        groups: per benchmark the images of its items.
    """
    means = paired_means(pairs, groups)
    return _middle(100 * relative_average(means[..., 0], means[..., 1]))


def paired_means(pairs: Sequence[Pair], groups: Sequence[Groups | None] | None = None) -> _Array:
    """Return the (R, T, 2) mean scores of both runs on every resample.

    Raises:
        TodreError: the runs of a pair did not score the same items.
    """
    shared: dict[tuple[Any, ...], list[int]] = {}
    images = groups or [None] * len(pairs)
    for index, (first, second) in enumerate(pairs):
        require_same_items(first, second)
        ids = tuple(sorted(doc_id for doc_id, _ in first))
        of_image = images[index]
        key = (ids, None if of_image is None else tuple(of_image[doc_id] for doc_id in ids))
        shared.setdefault(key, []).append(index)
    stream = np.random.RandomState(SEED)
    means = np.empty((RESAMPLES, len(pairs), 2))
    for members in shared.values():
        both = [sorted(items) for index in members for items in pairs[index]]
        columns = np.array([[score for _, score in items] for items in both], dtype=np.float64)
        drawn = _resampled_means(columns.T, _numbers(both[0], images[members[0]]), stream)
        means[:, members] = drawn.reshape(RESAMPLES, len(members), 2)
    return means


def _numbers(ordered: Items, groups: Groups | None) -> list[int] | None:
    """Return the image of every item, in order."""
    return None if groups is None else [groups[doc_id] for doc_id, _ in ordered]


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


def _resampled_means(
    scores: _Array, images: Sequence[int] | None, stream: np.random.RandomState
) -> _Array:
    """Return the means (R, C) of the columns of ``scores`` (N, C), rows drawn with replacement.

    Rows with equal scores are drawn together: how often each distinct row turns up is multinomial,
    and there are few of them (four for the hits of two runs). Of images, the sums of their items
    are drawn, with how many they are.
    """
    sums = np.column_stack([scores, np.ones(len(scores))])  # (N, C + 1)
    if images is not None:
        _, place = np.unique(images, return_inverse=True)
        of_items, sums = sums, np.zeros((place.max() + 1, sums.shape[1]))  # (G, C + 1)
        np.add.at(sums, place, of_items)
    rows, counts = np.unique(sums, axis=0, return_counts=True)
    at_once = max(1, _CELLS // len(counts))
    parts = []
    for start in range(0, RESAMPLES, at_once):
        size = min(at_once, RESAMPLES - start)
        drawn = stream.multinomial(len(sums), counts / len(sums), size)
        parts.append(drawn @ rows[:, :-1] / (drawn @ rows[:, -1:]))
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
    """Return what was drawn for the intervals, and what p stands on."""
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
