"""Timing in turns, and the numbers it is reported in.

Two clocks: :func:`seconds` shows what a user waits for, and that other work on the machine makes
longer; :func:`computing` shows what a call costs, whatever else goes on.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from math import comb
from typing import TypeVar

import torch

T = TypeVar("T")
CLOCK, COMPUTING = "clock", "computing"


def say(text: str) -> None:
    """Tell how far we are, on stderr."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def seconds(run: Callable[[], object]) -> float:
    """Return how long a call takes, with everything it started on the device."""
    synchronise()
    start = time.perf_counter()
    run()
    synchronise()
    return time.perf_counter() - start


def computing(run: Callable[[], object]) -> float:
    """Return the seconds that the processors work for a call; on a GPU, what the clock shows.

    Threads that wait for each other work as well, so it is measured within :func:`one_thread`.
    """
    if _has_gpu():
        return seconds(run)
    start = time.process_time()
    run()
    return time.process_time() - start


def kind_of_time() -> str:
    """Return what :func:`computing` measures here."""
    return CLOCK if _has_gpu() else COMPUTING


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread, in which a quiet machine's clock and computing time are the same."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def synchronise() -> None:
    """Wait for the accelerator, if there is one."""
    if _has_gpu():
        torch.cuda.synchronize()


@cache
def _has_gpu() -> bool:
    """Ask once: asking takes microseconds, of which some timed calls have few."""
    return torch.cuda.is_available()


def in_turns(
    runs: Mapping[str, Callable[[], T]], repeats: int, warm: bool = False
) -> dict[str, list[T]]:
    """Return what each run gave in each turn.

    Every turn runs all of them, every other turn backwards, so that what drifts favours none. A
    turn before the first warms up and is not kept, unless all have run before.

    Args:
        runs: by name.
        repeats: number of turns kept.
        warm: whether all have run before.
    """
    results: dict[str, list[T]] = {name: [] for name in runs}
    for turn in range(0 if warm else -1, repeats):
        names = list(runs) if turn % 2 else list(runs)[::-1]
        for name in names:
            result = runs[name]()
            if turn >= 0:
                results[name].append(result)
    return results


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return median, 20th and 80th percentile, count, and the median's 95 % interval.

    ``low`` and ``high`` are found by ranks, whatever the noise looks like; of few values they are
    the least and the most.
    """
    cuts = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else [*values]
    ordered, rank = sorted(values), _rank(len(values))
    return {
        "median": statistics.median(values),
        "p20": cuts[0],
        "p80": cuts[-1],
        "low": ordered[rank],
        "high": ordered[-1 - rank],
        "count": len(values),
    }


def _rank(count: int) -> int:
    """Return how many values there may be below an end of the interval of the median.

    Of the sign test: as many as lie on one side of it in 2.5 of 100 cases, at most.
    """
    rank, cases = 0, 1
    while cases + comb(count, rank + 1) <= 0.025 * 2**count:
        rank += 1
        cases += comb(count, rank)
    return rank


def ratios(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Return percentiles of above / below, turn by turn."""
    return percentiles([a / b for a, b in zip(above, below, strict=True)])
