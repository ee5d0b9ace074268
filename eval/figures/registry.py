"""All figures by name, one line each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from eval.figures import (
    decoding,
    framework,
    kept,
    layers,
    pareto,
    radar,
    scenes,
    sweeps,
    times,
    video,
)
from eval.figures.sources import Data, Sources
from eval.figures.style import styled
from llava_todre.errors import TodreError, unknown


@dataclass(frozen=True)
class FigureSpec:
    """A figure: what it shows, how its data come about, and how they are drawn."""

    shows: str
    gather: Callable[[Sources], Data]
    draw: Callable[[Data], Any]
    """From the data to a matplotlib Figure."""
    live: bool = False
    """Whether gathering runs a model; the others read stored results."""


FIGURES: dict[str, FigureSpec] = {
    "framework": FigureSpec(
        "how ToDRE works, on a real question (Figure 4)", framework.gather, framework.draw, True
    ),
    "kept": FigureSpec(
        "tokens that methods keep of one image (Figure 1)", kept.gather, kept.draw, True
    ),
    "scenes": FigureSpec(
        "attention against diversity on several images (Figure 7)",
        scenes.gather,
        scenes.draw,
        True,
    ),
    "video": FigureSpec("tokens kept over the frames of a video", video.gather, video.draw, True),
    "layers": FigureSpec(
        "attention between text and image per layer, prefill (Figure 2)",
        layers.gather,
        layers.draw,
        True,
    ),
    "decoding": FigureSpec(
        "where generated tokens look, per layer (Figure 5)", decoding.gather, decoding.draw, True
    ),
    "radar": FigureSpec("methods over benchmarks (Figure 3)", radar.gather, radar.draw),
    "pareto": FigureSpec(
        "accuracy against tokens and against time, all methods", pareto.gather, pareto.draw
    ),
    "sweep_tau": FigureSpec(
        "accuracy and cost over the threshold tau",
        partial(sweeps.gather, table="5"),
        partial(sweeps.draw, table="5"),
    ),
    "sweep_layers": FigureSpec(
        "accuracy and cost over the probe layers",
        partial(sweeps.gather, table="6"),
        partial(sweeps.draw, table="6"),
    ),
    "time": FigureSpec("where the time goes, before and after", times.gather, times.draw),
}


def spec_of(name: str) -> FigureSpec:
    """Return a figure by its name, or raise a TodreError that lists the names."""
    if name not in FIGURES:
        raise unknown("figure", name, [*FIGURES, "all"])
    return FIGURES[name]


def gathered(name: str, sources: Sources) -> Data:
    """Return what a figure shows.

    Raises:
        TodreError: a stored result is missing, or lacks what the figure shows.
    """
    spec = spec_of(name)
    try:
        return spec.gather(sources)
    except (KeyError, IndexError, TypeError) as error:
        if spec.live:
            raise
        raise TodreError(
            f"figure {name!r} cannot be made of the stored results ({type(error).__name__}:"
            f" {error}); allowed: whole ones of this version."
        ) from None


def drawn(name: str, data: Data) -> Any:
    """Return the matplotlib Figure of gathered data, in the style of the project."""
    try:
        with styled():
            return spec_of(name).draw(data)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise TodreError(
            f"figure {name!r} cannot be drawn from this data ({type(error).__name__}: {error}); "
            f"make it again with `python -m eval figure {name}`."
        ) from error
