"""``python -m eval table``: a table of the papers, filled from folders of results."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from eval.drawing import RENDERERS, Drawn, render
from eval.efficiency import efficiencies, load_benches
from eval.published import TABLES, VERSIONS
from eval.results import load_runs
from eval.tables import sheets
from llava_todre.errors import TodreError


def add_parser(commands: Any) -> None:
    """Add ``table`` to the commands of ``python -m eval``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "table", help="a table of the papers: our results beside the published numbers"
    )
    parser.add_argument("table", choices=TABLES)
    parser.add_argument(
        "--results",
        type=Path,
        nargs="+",
        required=True,
        help="folders with run JSONs; for table 3 also with results of the bench",
    )
    parser.add_argument("--suite", help="only runs of this suite, e.g. mini")
    parser.add_argument("--model", help="only this model, e.g. llava_next_7b")
    parser.add_argument("--version", choices=VERSIONS, help="only this version of the paper")
    parser.add_argument("--format", choices=RENDERERS, default="text")
    parser.add_argument("--out", type=Path, help="write here instead of printing")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    text = render(_found(options), options.format)
    if options.out is None:
        print(text, end="")
        return 0
    try:
        options.out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise TodreError(f"out {str(options.out)!r} cannot be written: {error.strerror}.") from None
    return 0


def _found(options: argparse.Namespace) -> list[Drawn]:
    """Return the tables: of runs, and for Table 3 of the bench before them."""
    runs = load_runs(options.results)
    benches = load_benches(options.results) if options.table == "3" else {}
    found: list[Drawn] = [*efficiencies(benches, options.model)]
    if not runs and not found:
        folders = ", ".join(map(str, options.results))
        if options.suite is not None:
            raise TodreError(f"results {folders!r} hold no runs; allowed: a folder with run JSONs.")
        print(f"no runs in {folders}: published numbers only", file=sys.stderr)
    if runs or not found:
        found += sheets(options.table, runs, options.suite, options.model, options.version)
    return found
