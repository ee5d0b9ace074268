"""The figures of a report, drawn from the results it tells of."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from eval.figures.files import svg
from eval.figures.registry import drawn, gathered, spec_of
from eval.figures.sources import Sources
from eval.report.page import Html, drawing, grid, paragraph
from llava_todre.errors import TodreError


def of_demo(results: Path) -> list[Html]:
    """Return the figures of a demo's ``results.json``."""
    return _charts(["pareto", "radar"], Sources(methods=results))


def of_runs(folder: Path) -> list[Html]:
    """Return the figures of a folder of runs; of one that lacks runs, what is missing."""
    return _charts(["sweep_tau", "sweep_layers"], Sources(runs=folder))


def _charts(names: Iterable[str], sources: Sources) -> list[Html]:
    made, missing = [], []
    for name in names:
        spec = spec_of(name)
        try:
            data = gathered(name, sources)
        except TodreError as error:
            missing.append(paragraph(f"Not drawn: {spec.shows}. {error}", "note"))
            continue
        caption = f"{spec.shows[0].upper()}{spec.shows[1:]}."
        made.append(drawing(svg(drawn(name, data)).encode(), caption, caption))
    return [*([grid(made, "charts")] if made else []), *missing]
