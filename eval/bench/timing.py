"""Timing in turns, and the numbers it is reported in."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TypeVar

import torch

T = TypeVar("T")


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
    """Return median, 20th and 80th percentile and count."""
    cuts = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else [*values]
    return {
        "median": statistics.median(values),
        "p20": cuts[0],
        "p80": cuts[-1],
        "count": len(values),
    }


def ratios(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Return percentiles of above / below, turn by turn."""
    return percentiles([a / b for a, b in zip(above, below, strict=True)])
