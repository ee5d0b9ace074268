"""How all figures look: sizes, fonts, colours that colour-blind readers and grey print tell apart.

matplotlib is imported when a figure is drawn, not before: everything else of ``eval`` does without.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from PIL import Image

from llava_todre.errors import TodreError

COLUMN, PAGE = 3.5, 7.0
"""Widths in inches: one column of a paper, and both."""
TEXT, SMALL, NOTE = 7.0, 6.0, 5.2
"""Font sizes in points: labels, what stands in a panel, and where the numbers come from."""

# Okabe and Ito (2008), "Color Universal Design".
BLACK, DARK, GREY = "#000000", "#404040", "#7F7F7F"
ORANGE, SKY, GREEN = "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
PALE = "#E8E8E8"

LOOKS: dict[str, tuple[str, str]] = {
    # unpruned, and the controls
    "vanilla": (BLACK, "*"),
    "random": (GREY, "o"),
    "uniform": (GREY, "s"),
    "pooling": (GREY, "^"),
    "downsample": (GREY, "v"),
    # ToDRE
    "todre": (VERMILION, "o"),
    "todre_v1": (VERMILION, "s"),
    # diverse tokens
    "divprune": (BLUE, "^"),
    "cdpruner": (BLUE, "v"),
    "trimtokenator": (BLUE, "D"),
    "dart": (BLUE, "P"),
    # attention of the vision tower
    "fastervlm": (GREEN, "o"),
    "globalcom2": (GREEN, "s"),
    "visionzip": (GREEN, "^"),
    "vispruner": (GREEN, "v"),
    "prumerge": (GREEN, "D"),
    "prumerge_plus": (GREEN, "P"),
    "holov": (GREEN, "X"),
    "hiprune": (GREEN, "p"),
    # attention inside the decoder
    "fastv": (PURPLE, "o"),
    "sparsevlm": (PURPLE, "s"),
    "sparsevlm_plus": (PURPLE, "^"),
    "pyramiddrop": (PURPLE, "v"),
    "vtw": (PURPLE, "D"),
}
"""Colour, by what a method goes by, and marker of every method of the registry."""
_OTHERS = [(colour, marker) for marker in "hd<>8H" for colour in (SKY, ORANGE, BLACK)]

_SETTINGS = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture everywhere
    "font.size": TEXT,
    "axes.titlesize": TEXT,
    "axes.labelsize": TEXT,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "legend.handlelength": 2.4,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "axes.grid": True,
    "grid.color": PALE,
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "errorbar.capsize": 1.5,
    "hatch.linewidth": 0.5,
    "svg.hashsalt": "llava_todre",  # else the ids of an SVG change from run to run
    "svg.fonttype": "none",  # text that can be searched
    "image.composite_image": False,  # else an SVG has one picture, over everything between them
    "figure.dpi": 200,
}


def matplotlib() -> Any:
    """Return the package, which the core of this project does without.

    Raises:
        TodreError: it is not installed.
    """
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError:
        raise TodreError(
            "matplotlib is not installed, figures need it; run `pip install 'matplotlib>=3.8'`."
        ) from None
    return matplotlib


def styled() -> Any:
    """Return a context in which matplotlib draws in the style of the project."""
    return matplotlib().rc_context({**matplotlib().rcParamsDefault, **_SETTINGS})


def new_figure(width: float, height: float, note: str) -> Any:
    """Return a figure with a note below that says what it was made from.

    Panels added to it are laid out above the note, without overlap.
    """
    figure = matplotlib().figure.Figure(figsize=(width, height))
    lines = textwrap.wrap(note, round(width * 24.5))
    space = (len(lines) * NOTE * 1.25 + 3) / 72 / height
    figure.text(
        0.01, 0.006, "\n".join(lines), fontsize=NOTE, color=DARK, va="bottom", linespacing=1.2
    )
    figure.set_layout_engine("constrained", rect=(0, space, 1, 1 - space), w_pad=0.03, h_pad=0.03)
    return figure


def few_colours(picture: Image.Image, count: int) -> Image.Image:
    """Return an RGB picture with a palette of few colours, which compresses several times better.

    What is small and bright keeps its colour, which cutting at medians would lose.
    """
    method = Image.Quantize.MAXCOVERAGE
    return picture.quantize(count, method=method, kmeans=2, dither=Image.Dither.NONE)


def look_of(methods: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Return colour and marker by method; methods outside the registry get those left over."""
    strangers = [method for method in methods if method not in LOOKS]
    given = {name: _OTHERS[place % len(_OTHERS)] for place, name in enumerate(strangers)}
    return {method: LOOKS.get(method) or given[method] for method in methods}


def some(layers: Sequence[int]) -> list[int]:
    """Return the layers to name on an axis: all of a dozen, every fourth or so of more."""
    return list(layers[:: max(1, round(len(layers) / 9))])


def letter(axes: Any, text: str) -> None:
    """Put a title on the left over a panel, as papers do."""
    axes.set_title(text, loc="left", fontsize=TEXT, pad=4)


def bands(
    axes: Any, series: Any, look: tuple[str, str, str, str], alpha: float, **style: Any
) -> None:
    """Draw a mean per layer with a band from the 10th to the 90th percentile.

    Args:
        axes: the panel.
        series: per layer ``mean``, ``p10`` and ``p90``.
        look: label, colour, marker and line.
        alpha: of the band.
        style: of the line, as matplotlib takes it.
    """
    label, colour, marker, line = look
    mean, low, high = ([layer[key] for layer in series] for key in ("mean", "p10", "p90"))
    axes.fill_between(range(len(mean)), low, high, color=colour, alpha=alpha, linewidth=0)
    axes.plot(range(len(mean)), mean, line, color=colour, marker=marker, label=label, **style)


def legend_above(figure: Any, axes: Any, **style: Any) -> None:
    """Put the legend of a panel above all of them."""
    handles, labels = axes.get_legend_handles_labels()
    style = {"ncols": len(labels), **style}
    figure.legend(handles, labels, loc="outside upper center", **style)
