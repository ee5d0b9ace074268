"""What a drawing is made of: text, boxes, arrows and images at places in inches."""

from __future__ import annotations

from typing import Any

from PIL import Image

from eval.figures.style import BLACK, DARK, GREY, SMALL

Point = tuple[float, float]
"""x and y, from the lower left corner."""


def write(axes: Any, left: float, bottom: float, text: str, **style: Any) -> None:
    """Write a text; ``style`` as matplotlib takes it, and ``colour``."""
    colour = style.pop("colour", BLACK)
    axes.text(left, bottom, text, **{"fontsize": SMALL - 0.3, "color": colour, **style})


def write_line(figure: Any, left: float, top: float, text: str, **style: Any) -> None:
    """Write a line whose foot is ``top`` inches below the upper edge; ``style`` as above."""
    width, height = figure.get_size_inches()
    colour = style.pop("colour", BLACK)
    style = {"fontsize": SMALL, "va": "baseline", "color": colour, **style}
    figure.text(left / width, 1 - top / height, text, **style)


def panel(figure: Any, left: float, top: float, side: float, image: Image.Image) -> None:
    """Show an image, pixel by pixel, in a square panel; inches from the upper left corner."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes((left / width, 1 - (top + side) / height, side / width, side / height))
    extent = (0, 1, 0, image.height / image.width)
    axes.imshow(image, interpolation="nearest", extent=extent)
    axes.set_axis_off()


def place_image(axes: Any, image: Image.Image, corner: Point, side: float) -> None:
    """Draw a square image, pixel by pixel."""
    left, bottom = corner
    extent = left, left + side, bottom, bottom + side
    axes.imshow(image, extent=extent, interpolation="nearest", aspect="auto", zorder=2)


def box(
    axes: Any,
    corner: Point,
    size: Point,
    colour: str,
    edge: str = GREY,
    width: float = 0.6,
    rounded: bool = True,
    hatch: str = "",
) -> None:
    """Draw a box; one that is not filled, or has sharp corners, lies over images."""
    from matplotlib.patches import FancyBboxPatch

    shape = FancyBboxPatch(
        corner,
        *size,
        boxstyle="round,pad=0,rounding_size=0.04" if rounded else "square,pad=0",
        facecolor=colour,
        edgecolor=edge,
        linewidth=width,
        hatch=hatch,
    )
    shape.set_zorder(3 if colour == "none" or not rounded else 1)
    axes.add_patch(shape)


def arrow(axes: Any, start: Point, end: Point, colour: str = DARK) -> None:
    """Draw an arrow."""
    style = {"arrowstyle": "-|>", "linewidth": 0.9, "color": colour, "mutation_scale": 7}
    axes.annotate("", end, start, arrowprops={**style, "shrinkA": 0, "shrinkB": 0}, zorder=5)
