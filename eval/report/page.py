"""HTML that needs nothing but itself: no script, no request, pictures inside.

Text is escaped unless it is :class:`Html` already.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL import Image

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; background: #fff;
  max-width: 72rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #d0d7de; }
nav a { margin-right: 1rem; white-space: nowrap; }
.wide { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 0;
  font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #d0d7de; text-align: right;
  vertical-align: top; white-space: pre-line; }
.lines td { white-space: pre; }
th { background: #f6f8fa; } td.text, th.text { text-align: left; min-width: 6rem; }
td:first-child, th:first-child { position: sticky; min-width: 9rem; left: 0; background: #fff; }
th:first-child { background: #f6f8fa; }
.note { color: #57606a; font-size: .9rem; }
.right::before { content: "\\2713\\00a0"; color: #00644b; font-weight: bold; }
.wrong { color: #a03800; } .wrong::before { content: "\\2717\\00a0"; font-weight: bold; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); gap: 1rem;
  margin-bottom: 1rem; }
.charts img { width: 100%; min-width: 46rem; max-width: 58rem; }
.charts { display: grid; gap: 1.5rem; grid-template-columns: minmax(0, 1fr); }
figure { margin: 0; } figcaption { font-size: .9rem; color: #57606a; }
img { max-width: 100%; height: auto; display: block; }
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class Html(str):
    """Text that is HTML already."""


def text(value: object) -> Html:
    """Return a value as HTML."""
    return value if isinstance(value, Html) else Html(escape(str(value)))


def heading(value: object) -> Html:
    """Return a heading within a section."""
    return Html(f"<h3>{text(value)}</h3>")


def paragraph(value: object, kind: str = "") -> Html:
    """Return a paragraph; ``kind`` is a class of the style above, e.g. note."""
    return Html(f'<p class="{kind}">{text(value)}</p>' if kind else f"<p>{text(value)}</p>")


def mark(answer: str, right: bool) -> Html:
    """Return an answer marked as right or wrong, for eyes and for screen readers."""
    word = "right" if right else "wrong"
    return Html(f'<span class="{word}" title="{word}">{text(answer or "(nothing)")}</span>')


def table(
    header: Sequence[object],
    rows: Sequence[Sequence[object]],
    left: int = 1,
    wraps: bool = True,
) -> Html:
    """Return a table that scrolls sideways by itself.

    Args:
        header: of the columns.
        rows: of as many cells; a line break in a cell stays one.
        left: columns of text; the others hold numbers.
        wraps: whether long text may take several lines.
    """

    def row(cells: Sequence[object], tag: str) -> str:
        kinds = [' class="text"' if index < left else "" for index in range(len(cells))]
        inner = "".join(
            f"<{tag}{kind}>{text(cell)}</{tag}>" for cell, kind in zip(cells, kinds, strict=True)
        )
        return f"<tr>{inner}</tr>"

    body = "\n".join(row(cells, "td") for cells in rows)
    kind = "" if wraps else ' class="lines"'
    return Html(
        f'<div class="wide"><table{kind}>\n<thead>{row(header, "th")}</thead>\n'
        f"<tbody>{body}</tbody>\n</table></div>"
    )


def picture(image: Image.Image, caption: object, alt: str) -> Html:
    """Return a picture with its caption."""
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return _figure("image/png", stream.getvalue(), caption, alt)


def drawing(svg: bytes, caption: object, alt: str) -> Html:
    """Return a drawing in SVG with its caption; where it is wider than the screen it scrolls."""
    return _figure("image/svg+xml", svg, caption, alt, "wide")


def _figure(kind: str, content: bytes, caption: object, alt: str, box: str = "") -> Html:
    source = f"data:{kind};base64,{base64.b64encode(content).decode()}"
    image = f'<img src="{source}" alt="{escape(alt)}">'
    if box:
        image = f'<div class="{box}">{image}</div>'
    return Html(f"<figure>{image}<figcaption>{text(caption)}</figcaption></figure>")


def grid(parts: Sequence[Html], kind: str) -> Html:
    """Return parts side by side where there is room; ``kind``: cards or charts."""
    return Html(f'<div class="{kind}">' + "\n".join(parts) + "</div>")


def folded(summary: object, *parts: Html) -> Html:
    """Return parts that show when asked for."""
    return Html(f"<details><summary>{text(summary)}</summary>" + "\n".join(parts) + "</details>")


def page(title: str, lead: object, sections: Sequence[tuple[str, Sequence[Html]]]) -> str:
    """Return the file.

    Args:
        title: of the page.
        lead: what a reader must know first.
        sections: (heading, parts), in order; one without parts is left out.
    """
    shown = [(f"part-{index}", *each) for index, each in enumerate(sections) if each[1]]
    links = "".join(f'<a href="#{key}">{text(name)}</a>' for key, name, _ in shown)
    body = "\n".join(
        f'<section id="{key}"><h2>{text(name)}</h2>' + "\n".join(parts) + "</section>"
        for key, name, parts in shown
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{text(title)}</title><link rel="icon" href="data:,">'
        f"<style>{_STYLE}</style></head>\n<body><h1>{text(title)}</h1>{paragraph(lead)}\n"
        f"<nav>{links}</nav>\n<main>{body}</main></body></html>\n"
    )
