"""Write the generated parts of README.md, and the tables of the stored runs."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path

from eval import ROOT
from eval.pages.fill import between
from eval.results.files import load_runs
from eval.tables.demo import as_markdown
from eval.tables.paper import sheets
from eval.tables.render import render
from llava_todre.catalogue import where
from llava_todre.pruners import PRUNERS

README = ROOT / "README.md"
RESULTS = ROOT / "docs" / "results" / "demo_mini.json"
REPRODUCED = ROOT / "docs" / "results" / "reproduce_mini"
TABLES = REPRODUCED / "README.md"
_PLACES = {
    "both": "Both stages",
    "before": "Before the decoder",
    "inside": "Inside the decoder",
    "-": "Nothing, for comparison",
}


def readme() -> str:
    """Return the README with the stored table of the demo and the list of methods."""
    table = as_markdown(json.loads(RESULTS.read_text()), per_task=False)
    return between(README.read_text(), {"demo table": table, "methods": _methods()})


def _methods() -> str:
    """Return the methods with links to their papers, by where they drop tokens."""
    lines = []
    for place, words in _PLACES.items():
        names = [_linked(name) for name, method in PRUNERS.items() if where(method) == place]
        line = f"- {words}: {', '.join(names)}."
        lines += textwrap.wrap(line, 120, subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(lines) + "\n"


def _linked(name: str) -> str:
    paper = re.search(r"arXiv (\S+)", PRUNERS[name].about.paper)
    return f"[`{name}`](https://arxiv.org/abs/{paper[1]})" if paper else f"`{name}`"


def tables() -> str:
    """Return the tables that ``make reproduce-mini`` prints, of the stored runs, in Markdown."""
    runs = load_runs([REPRODUCED])
    shown = (("1", None), ("4", None), ("5", "v2"), ("6", "v2"))  # as scripts/reproduce_mini.sh
    drawn = [
        render(sheets(table, runs, suite="mini", version=version), "md") for table, version in shown
    ]
    head = "What `make reproduce-mini` made of the runs in this folder; written by `make readme`."
    return "\n".join([f"{head}\n", *drawn])


def pages() -> dict[Path, str]:
    """Return the README and the tables."""
    return {README: readme(), TABLES: tables()}
