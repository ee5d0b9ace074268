"""One row of the demo's table per method and ratio."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from eval.demo.plan import Run
from eval.mini import TASKS
from eval.results.bootstrap import intervals, relative_average


def rows_of(
    scored: Sequence[dict[str, Any]], speed: dict[str, dict[str, dict[str, float]]]
) -> list[dict[str, Any]]:
    """Return one row per (method, ratio), draws averaged, relative to the first row."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for result in scored:
        run = result["run"]
        groups.setdefault((run["method"], run["retain_ratio"]), []).append(result)
    rows: list[dict[str, Any]] = []
    for (method, ratio), results in groups.items():
        accuracy = {
            task: statistics.fmean(hit for result in results for hit in result["hits"][task])
            for task in TASKS
        }
        full = rows[0]["accuracy"] if rows else accuracy
        relative = relative_average(np.array([*accuracy.values()]), np.array([*full.values()]))
        spread = intervals([result["hits"] for result in results], scored[0]["hits"])
        mean = {
            key: statistics.fmean(result[key] for result in results)
            for key in results[0]
            if key not in ("hits", "answers", "run", "version")
        }
        rows.append(
            {
                "method": method,
                "retain_ratio": ratio,
                "draws": len(results),
                "accuracy": accuracy,
                "average": statistics.fmean(accuracy.values()),
                "average_interval": list(spread["average"]),
                "relative_average": float(relative),
                "relative_interval": list(spread["relative"]),
                **mean,
                "flops_share": mean["prefill_flops"] / (rows or [mean])[0]["prefill_flops"],
                "prefill_speedup": speed[Run(method, ratio).name]["prefill"],
                "first_token_speedup": speed[Run(method, ratio).name]["first_token"],
            }
        )
    return rows
