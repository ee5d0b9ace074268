"""The average of a run relative to the unpruned one, over the benchmarks that both have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import stdev
from typing import Any

from eval.results.bootstrap import Interval, groups_of, relative_interval
from eval.results.compare import is_mean
from eval.results.files import StoredRun
from eval.results.published import relative_average
from eval.results.seeds import members

Stored = Mapping[str, Mapping[str, Any]]
"""Parts of a run's JSON, by benchmark."""


@dataclass(frozen=True)
class Relative:
    """Mean over benchmarks of score / unpruned score, in percent."""

    value: float
    keys: tuple[str, ...]
    """The benchmarks that it is over."""
    zeros: tuple[str, ...]
    """Left out: there the unpruned model scores 0."""


def score_of(part: Mapping[str, Any] | None) -> float | None:
    """Return the score of a benchmark, where there is one."""
    return part["score"] if part and part.get("status") == "complete" else None


def counts(part: Mapping[str, Any]) -> bool:
    """Return whether a benchmark counts in averages; MME's total does not, next to perception."""
    return bool(part.get("averaged", True))


def relative(ours: Stored, full: Stored, benchmarks: Sequence[str]) -> Relative | None:
    """Return the average over those of the benchmarks that both runs have; None without one."""
    both = [k for k in benchmarks if None not in (score_of(ours.get(k)), score_of(full.get(k)))]
    keys = [key for key in both if full[key]["score"] != 0]
    if not keys:
        return None
    value = relative_average(*([run[key]["score"] for key in keys] for run in (ours, full)))
    return Relative(value, tuple(keys), tuple(key for key in both if key not in keys))


def average_interval(ours: Stored, full: Stored, keys: Sequence[str]) -> Interval | None:
    """Return the 95 % interval of an average; None where a metric is no mean over its items.

    Raises:
        TodreError: the runs did not score the same items.
    """
    parts = [(ours[key], full[key]) for key in keys]
    if not all(is_mean(part) for pair in parts for part in pair):
        return None
    return relative_interval(
        [(run["items"], unpruned["items"]) for run, unpruned in parts],
        [groups_of(*pair) for pair in parts],
    )


def average_spread(run: StoredRun, full: Stored, keys: Sequence[str]) -> float | None:
    """Return the standard deviation over the seeds of a run's average; None of one seed."""
    parts = [relative(each["benchmarks"], full, keys) for each in members(run)]
    values = [part.value for part in parts if part is not None and set(part.keys) == set(keys)]
    return stdev(values) if len(values) > 1 else None
