"""Put stored results and the names of the methods into the README and the tables next to them."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path

from eval import ROOT
from eval.pages.fill import between
from eval.pages.models import overview
from eval.results.files import load_runs
from eval.results.published import AVERAGE
from eval.tables.demo import as_markdown
from eval.tables.paper import sheets
from eval.tables.render import markdown_lines, name_of, render
from llava_todre.pruners import PRUNERS

README = ROOT / "README.md"
RESULTS = ROOT / "docs" / "results" / "demo_mini.json"
REPRODUCED = ROOT / "docs" / "results" / "reproduce_mini"
TABLES = REPRODUCED / "README.md"


def readme() -> str:
    """Return the README with the tables of the stored results and the names of all methods."""
    text = README.read_text()
    table = as_markdown(json.loads(RESULTS.read_text()), per_task=False)
    explained = set(re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE))
    others = [f"`{name}`" for name in PRUNERS if name not in explained]
    line = textwrap.fill(f"Also: {', '.join(others)}.", 100) + "\n" if others else ""
    parts = {
        "other methods": line,
        "demo table": table,
        "lmms-eval table": _evaluated(),
        "families": overview(),
    }
    return between(text, parts)


def tables() -> str:
    """Return what ``make reproduce-mini`` prints, of the stored runs, in Markdown."""
    runs = load_runs([REPRODUCED])
    shown = (("1", None), ("4", None), ("5", "v2"), ("6", "v2"))  # as scripts/reproduce_mini.sh
    drawn = [
        render(sheets(table, runs, suite="mini", version=version), "md") for table, version in shown
    ]
    head = "What `make reproduce-mini` made of the runs in this folder; written by `make readme`."
    return "\n".join([f"{head}\n", *drawn])


def _evaluated() -> str:
    """Return the stored runs in the shape of Table 1, one line for each method."""
    (sheet,) = sheets("1", load_runs([REPRODUCED]), suite="mini")
    lines = [["method", *map(name_of, sheet.columns)]]
    for row, cells, _ in sheet.rows:
        average = cells[AVERAGE]
        scores = [cells[column].ours for column in sheet.columns if column != AVERAGE]
        lines.append([row.label, *scores, f"{average.ours} {average.interval}".strip()])
    notes = " ".join(note.removesuffix(".") + "." for note in sheet.notes)
    drawn = "\n".join(markdown_lines(lines, left=1))
    return f"{drawn}\n\nBundled mini model, not evidence about 7B models. {notes}\n"


def pages() -> dict[Path, str]:
    """Return the README and the tables."""
    return {README: readme(), TABLES: tables()}
