"""Figures as files: JSON of what is shown, PNG and SVG, the same bytes from the same data."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from eval.figures.registry import FIGURES, drawn
from eval.figures.sources import Data, rounded
from eval.figures.style import few_colours, styled
from llava_todre.errors import TodreError
from llava_todre.files import write_whole

DPI = 200
_COLOURS = 192
_PICTURE = re.compile(r"data:image/png;base64,([A-Za-z0-9+/=\s]+)")
_PLACE = re.compile(r'\b[dxy]="[^"]*"|translate\([^)]*\)')
_NUMBER = re.compile(r"-?\d+\.\d{3,}")
_GROUP_ID = re.compile(r'<g id="[^"]*">')
_FONTS = "'DejaVu Sans', Verdana, sans-serif"
"""The widest comes first: with another font text takes less room than it has."""
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
    """Return the figure as SVG: no date, coordinates to hundredths of a point, text as text."""
    buffer = io.StringIO()
    told = {"Date": None, "Creator": None, "Description": f"{KEY} {mark}"}
    with styled():
        figure.savefig(buffer, format="svg", metadata=told)
    text = _PICTURE.sub(_with_palette, buffer.getvalue())
    text = _PLACE.sub(lambda found: _NUMBER.sub(_hundredths, found[0]), text)
    text = _GROUP_ID.sub("<g>", text)  # nothing refers to groups
    text = text.replace("'DejaVu Sans'", _FONTS)
    return "\n".join(line.strip() for line in text.splitlines()) + "\n"


def _with_palette(found: re.Match[str]) -> str:
    """Store an embedded picture with a palette instead of four numbers per pixel."""
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(found[1]))).convert("RGBA"))
    colours, places = np.unique(pixels.reshape(-1, 4), axis=0, return_inverse=True)
    if len(colours) > 256 or colours[:, 3].min() < 255:
        return found[0]
    few = Image.fromarray(places.reshape(pixels.shape[:2]).astype(np.uint8))
    few.putpalette(colours[:, :3].tobytes())
    buffer = io.BytesIO()
    few.save(buffer, "png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _hundredths(found: re.Match[str]) -> str:
    """Round a coordinate to hundredths of a point."""
    return f"{float(found[0]):.2f}".rstrip("0").rstrip(".")


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
        "Written by `python -m eval figure`; `make figures` draws everything again. What a figure",
        "was made from stands below it, the numbers in it are in `data/`.",
    ]
    for name, spec in FIGURES.items():
        if (out / f"{name}.png").exists():
            lines += ["", f"## {name}: {spec.shows}", "", f"![{spec.shows}]({name}.png)", ""]
            lines.append(f"[{name}.svg]({name}.svg), [data](data/{name}.json)")
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
