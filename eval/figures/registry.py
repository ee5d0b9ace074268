"""All figures by name, one line each."""

from __future__ import annotations

from collections.abc import Callable
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


class FigureSpec:
    """A figure: what it shows, how its data come about, and how they are drawn."""

    def __init__(self, shows: str, module: Any, live: bool = False, **options: Any) -> None:
        """Take ``gather`` and ``draw`` of a module."""
        self.shows, self.live = shows, live
        self.gather: Callable[[Sources], Data] = partial(module.gather, **options)
        self.draw: Callable[[Data], Any] = partial(module.draw, **options)


FIGURES = {
    "framework": FigureSpec("how ToDRE works, on a real question (Figure 4)", framework, True),
    "kept": FigureSpec("tokens that methods keep of one image (Figure 1)", kept, True),
    "scenes": FigureSpec("attention against diversity on several images (Figure 7)", scenes, True),
    "video": FigureSpec("tokens kept over the frames of a video", video, True),
    "layers": FigureSpec(
        "attention between text and image per layer, prefill (Figure 2)", layers, True
    ),
    "decoding": FigureSpec("where generated tokens look, per layer (Figure 5)", decoding, True),
    "radar": FigureSpec("methods over benchmarks (Figure 3)", radar),
    "pareto": FigureSpec("accuracy against tokens and against time, all methods", pareto),
    "sweep_tau": FigureSpec("accuracy and cost over the threshold tau", sweeps, table="5"),
    "sweep_layers": FigureSpec("accuracy and cost over the probe layers", sweeps, table="6"),
    "time": FigureSpec("where the time goes, before and after", times),
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
