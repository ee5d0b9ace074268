"""Cells and notes of tables, as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eval.results.bootstrap import Interval
from eval.results.files import StoredRun


def mixed_settings(runs: Sequence[StoredRun]) -> list[str]:
    """Return a line about the settings in which runs differ, if they do."""
    settings: dict[str, set[str]] = {}
    for run in runs:
        others = {"seed": run["config"].get("seed"), "suite_digest": run.get("suite_digest")}
        for key, value in {**run["config"]["model"], **others}.items():
            settings.setdefault(key, set()).add(str(value))
    mixed = [f"{k} {' | '.join(sorted(v))}" for k, v in settings.items() if len(v) > 1]
    return [f"These runs differ in: {'; '.join(mixed)}."] if mixed else []


def time_of(run: StoredRun) -> float | None:
    """Return the seconds of a run that other work on the machine does not decide.

    On a GPU by the clock, as a run has it for itself. None on a CPU, where even the CPU time of
    runs one after the other depends on what else runs: there only interleaved times compare.
    """
    on_cpu = str(run.get("device")).endswith(" cores")
    seconds: float | None = None if on_cpu else run.get("seconds")
    return seconds


def clock(seconds: float | None) -> str:
    """Return minutes:seconds."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"


def with_spread(value: float, spread: float | None) -> str:
    """Return a mean with its standard deviation over seeds, if there were several."""
    return f"{value:.1f}" + ("" if spread is None else f" ± {spread:.1f}")


def watched(stored: Mapping[str, Any]) -> str:
    """Return how often the watched answer was given, "" where none is watched."""
    found = stored.get("watched_answer")
    return f"{found['share']:.0%} {found['answer']}" if found else ""


def shown(interval: Interval) -> str:
    """Return an interval in brackets."""
    return f"[{interval[0]:.1f}, {interval[1]:.1f}]"
