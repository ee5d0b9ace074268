"""Put the stored results of the demo and the names of the methods into the README."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path

from llava_todre.pruners import PRUNERS
from llava_todre.table import as_markdown

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "docs" / "results" / "demo_mini.json"
TABLE = "<!-- demo table: make readme -->", "<!-- end of demo table -->"
OTHERS = "<!-- other methods: make readme -->", "<!-- end of other methods -->"


def render() -> str:
    """Return the README with the table of the stored results and the names of all methods."""
    text = README.read_text()
    table = as_markdown(json.loads(RESULTS.read_text()), per_task=False)
    explained = set(re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE))
    others = [f"`{name}`" for name in PRUNERS if name not in explained]
    line = textwrap.fill(f"Also: {', '.join(others)}.", 100) + "\n" if others else ""
    return _between(*OTHERS, line, _between(*TABLE, table, text))


def _between(begin: str, end: str, new: str, text: str) -> str:
    """Return the text with what stands between two marks replaced."""
    before, rest = text.split(begin)
    after = rest.split(end)[1]
    return f"{before}{begin}\n{new}{end}{after}"


def write_readme() -> int:
    """Write the README; returns the exit status."""
    README.write_text(render())
    return 0


def check_readme() -> int:
    """Return 1 and say so when the README is not what results and registry give."""
    if render() == README.read_text():
        return 0
    print("README.md is stale: run `make readme`.")
    return 1
