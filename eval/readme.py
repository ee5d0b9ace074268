"""Put the stored results of the demo into the README."""

from __future__ import annotations

import json
from pathlib import Path

from llava_todre.table import as_markdown

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "docs" / "results" / "demo_mini.json"
BEGIN, END = "<!-- demo table: make readme -->", "<!-- end of demo table -->"


def render() -> str:
    """Return the README with the table of the stored results."""
    text = README.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    table = as_markdown(json.loads(RESULTS.read_text()), per_task=False)
    return f"{before}{BEGIN}\n{table}{END}{after}"


def write_readme() -> int:
    """Write the table; returns the exit status."""
    README.write_text(render())
    return 0


def check_readme() -> int:
    """Return 1 and say so when the table is not the one the results give."""
    if render() == README.read_text():
        return 0
    print("README.md is stale: run `make readme`.")
    return 1
