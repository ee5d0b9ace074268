"""The figures of a report."""

from __future__ import annotations

from pathlib import Path

from eval.report.page import Html


def of_demo(results: Path) -> list[Html]:
    return []


def of_runs(folder: Path) -> list[Html]:
    return []
