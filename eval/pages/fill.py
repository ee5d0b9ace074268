"""Put generated text into templates of docs/ and between the marks of README.md."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from eval import ROOT


def template(name: str) -> str:
    """Return the text of ``eval/pages/NAME.template.md``."""
    return (Path(__file__).parent / f"{name}.template.md").read_text()


def filled(name: str, parts: Mapping[str, str]) -> str:
    """Return a template with ``{{key}}`` replaced by each part."""
    page = template(name)
    for key, text in parts.items():
        page = page.replace("{{" + key + "}}", text)
    return page


def between(text: str, parts: Mapping[str, str]) -> str:
    """Return a text with the parts between their marks replaced."""
    for name, new in parts.items():
        begin, end = f"<!-- {name}: make readme -->", f"<!-- end of {name} -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{new}{end}{rest.split(end)[1]}"
    return text


def write(pages: Mapping[Path, str]) -> int:
    """Write pages; returns the exit status."""
    for page, text in pages.items():
        page.write_text(text)
    return 0


def check(pages: Mapping[Path, str], command: str) -> int:
    """Print which pages are not current; returns 1 if there are any."""
    stale = [page for page, text in pages.items() if not page.exists() or page.read_text() != text]
    for page in stale:
        shown = page.relative_to(ROOT) if page.is_relative_to(ROOT) else page
        print(f"{shown} is stale: run `{command}`.")
    return 1 if stale else 0
