"""Runs as the runner stores them, with scores of one's choice."""

from __future__ import annotations

import random
from typing import Any

from eval.results.published import table_spec

IMAGE = table_spec("1").benchmarks
FULL = dict(zip(IMAGE, (1500.0, 70.0, 60.0, 80.0, 65.0, 55.0, 50.0, 75.0), strict=True))
LESS = dict(zip(IMAGE, (1350.0, 63.0, 54.0, 72.0, 58.5, 49.5, 45.0, 60.0), strict=True))


def scored(score: float | None, num_samples: int = 100, **changes: Any) -> dict[str, Any]:
    """Return a benchmark's part of a run."""
    return {
        "task": "some_task",
        "metric": "exact_match",
        "score": score,
        "scale": "percent",
        "num_samples": num_samples,
        "status": "complete",
        "note": None,
        "submission": None,
        "items": None,
    } | changes


def hits(percent: int, seed: int = 0, num_items: int = 100) -> dict[str, Any]:
    """Return a benchmark with items of which so many are right."""
    right = [1] * (percent * num_items // 100)
    right += [0] * (num_items - len(right))
    random.Random(seed).shuffle(right)
    return scored(float(percent), num_items, items=[[i, hit] for i, hit in enumerate(right)])


def planted(
    method: str,
    options: dict[str, Any] | None = None,
    scores: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    suite: str = "image",
    limit: int | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Return a run; a plain number among the scores is a benchmark of 100 samples."""
    benchmarks = {
        key: scored(value) if isinstance(value, float) else value
        for key, value in (scores or {}).items()
    }
    name = "_".join([method, *map(str, (options or {}).values()), suite, str(limit)])
    return {
        "format": 1,
        "name": name,
        "status": "complete",
        "error": None,
        "config": {
            "model": {"key": "llava_next_7b", "protocol": "paper"} if model is None else model,
            "method": method,
            "options": options or {},
            "suite": suite,
            "limit": limit,
            "seed": 0,
            "batch_size": 1,
        },
        "benchmarks": benchmarks,
        "seconds": 4390.2,
        "items_per_second": 2.5,
        "tokens": {"prefill_flops": 6.5e12},
        "peak_memory_mib": 14336.0,
        "time_utc": "2026-11-01T10:00:00+00:00",
        "git_commit": "0123456789abcdef",
        "git_dirty": False,
        "versions": {"python": "3.11", "torch": "2.13.0", "transformers": "5.23.0"},
        "device": "a device",
    } | changes


def pruned(ratio: float = 0.10, method: str = "todre", **given: Any) -> dict[str, Any]:
    return planted(method, {"retain_ratio": ratio}, **{"scores": LESS} | given)
