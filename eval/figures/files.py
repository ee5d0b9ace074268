"""Figures as files: JSON of what is shown, PNG and SVG, the same bytes from the same data."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from eval.figures.registry import FIGURES, drawn
from eval.figures.sources import Data, rounded
from eval.figures.style import few_colours, styled
from llava_todre.errors import TodreError
from llava_todre.files import write_whole

DPI = 200
_COLOURS = 192
KEY = "Data-SHA256"
"""Where a PNG says what it was drawn from; an SVG says it in its description."""


def as_json(data: Data) -> str:
    """Return the data as they are stored: numbers cut to what can be seen."""
    return json.dumps(rounded(data)) + "\n"


def digest(text: str) -> str:
    """Return the fingerprint of stored data."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def png(figure: Any, mark: str = "") -> bytes:
    """Return the figure as PNG of few colours."""
    buffer = io.BytesIO()
    with styled():
        figure.savefig(buffer, format="png", dpi=DPI)
    buffer.seek(0)
    few = few_colours(Image.open(buffer).convert("RGB"), _COLOURS)
    info = PngInfo()
    info.add_text(KEY, mark)
    out = io.BytesIO()
    few.save(out, "png", optimize=True, pnginfo=info)
    return out.getvalue()


def svg(figure: Any, mark: str = "") -> str:
    """Return the figure as SVG, without a date, so that the same data give the same text."""
    buffer = io.StringIO()
    with styled():
        figure.savefig(
            buffer, format="svg", metadata={"Date": None, "Description": f"{KEY} {mark}"}
        )
    return buffer.getvalue()


def store(name: str, data: Data, out: Path) -> list[Path]:
    """Write ``data/NAME.json``, ``NAME.png`` and ``NAME.svg``; returns the two pictures' places."""
    text = as_json(data)
    figure = drawn(name, json.loads(text))
    made = {
        out / "data" / f"{name}.json": text.encode(),
        out / f"{name}.png": png(figure, digest(text)),
        out / f"{name}.svg": svg(figure, digest(text)).encode(),
    }
    for file, content in made.items():
        _write(file, content)
    return list(made)[1:]


def _write(file: Path, content: bytes) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, content)
    except OSError as error:
        raise TodreError(f"out {str(file)!r} cannot be written: {error.strerror}.") from None


def write_index(out: Path) -> Path:
    """Write README.md: every figure that is in the folder, with what it shows."""
    lines = [
        "Written by `python -m eval figure`; `make figures` draws everything again, also as SVG,"
        " which is not",
        "in git. What a figure was made from stands below it, the numbers in it are in `data/`.",
    ]
    for name, spec in FIGURES.items():
        if (out / f"{name}.png").exists():
            lines += ["", f"## {name}: {spec.shows}", "", f"![{spec.shows}]({name}.png)", ""]
            lines.append(f"[data](data/{name}.json)")
    page = out / "README.md"
    _write(page, ("\n".join(lines) + "\n").encode())
    return page


def stored(name: str, out: Path) -> Data:
    """Return the data of a figure that was made before."""
    file = out / "data" / f"{name}.json"
    try:
        found: Data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise TodreError(
            f"{str(file)!r} is missing or damaged; make it with `python -m eval figure {name}`."
        ) from None
    return found
