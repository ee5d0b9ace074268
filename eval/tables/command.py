"""``python -m eval table``: a table of the papers, or all runs, from folders of results."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.results.files import StoredRun, load_runs
from eval.results.lookup import model_key
from eval.results.published import TABLES, VERSIONS
from eval.tables.all_runs import as_flat_table, as_tables
from eval.tables.efficiency import efficiencies, load_benches
from eval.tables.paper import sheets, unshown
from eval.tables.render import RENDERERS, Drawn, Table, as_csv, stacked, wide
from llava_todre.errors import TodreError

ALL = "all"
OUTPUTS = Path("outputs")


def add_parser(commands: Any) -> None:
    """Add ``table`` to the commands of ``python -m eval``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "table",
        help="a table of the papers, our results next to the published numbers; or all runs",
        description="all: every run once, with method, options, cost, scores and intervals.",
    )
    parser.add_argument("table", choices=[*TABLES, ALL])
    parser.add_argument(
        "--results",
        type=Path,
        nargs="+",
        help="folders with run JSONs; for table 3 also with results of the bench (default: every"
        f" folder of {OUTPUTS})",
    )
    parser.add_argument("--suite", help="only runs of this suite, e.g. mini")
    parser.add_argument("--model", help="only this model, e.g. llava_next_7b")
    parser.add_argument("--version", choices=VERSIONS, help="only this version of the paper")
    parser.add_argument("--format", choices=RENDERERS, default="text")
    parser.add_argument("--out", type=Path, help="write here instead of printing")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write all numbers here as well")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    folders = options.results or _folders()
    drawn, flat, notes = (_all_runs if options.table == ALL else _filled)(options, folders)
    text = as_csv(flat) if options.format == "csv" else "\n".join(drawn)
    if options.csv is not None:
        _write(options.csv, "csv", as_csv(flat))
    if options.out is None:
        print(text, end="")
    else:
        _write(options.out, "out", text)
    for note in notes:
        print(note, file=sys.stderr)
    return 0


def _folders() -> list[Path]:
    """Return the folders below the usual one that hold results."""
    found = sorted({file.parent for file in OUTPUTS.glob("*/*.json")})
    if not found:
        raise TodreError(f"no results below {str(OUTPUTS)!r}; give folders with --results.")
    return found


def _write(file: Path, key: str, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise TodreError(f"{key} {str(file)!r} cannot be written: {error.strerror}.") from None


_Found = tuple[list[str], Table, list[str]]
"""Tables in the requested format, all numbers in one, and further notes."""


def _all_runs(options: argparse.Namespace, folders: Sequence[Path]) -> _Found:
    """Return every run once."""
    runs = _chosen(load_runs(folders), options)
    if not runs:
        raise TodreError(f"results {_named(folders)!r} hold no such runs.")
    style = RENDERERS[options.format]
    return [style(table) for table in as_tables(runs)], as_flat_table(runs), []


def _chosen(runs: list[StoredRun], options: argparse.Namespace) -> list[StoredRun]:
    return [
        run
        for run in runs
        if options.suite in (None, run["config"]["suite"])
        and options.model in (None, model_key(run))
    ]


def _filled(options: argparse.Namespace, folders: Sequence[Path]) -> _Found:
    """Return the tables of runs, and for Table 3 of the bench before them."""
    runs = load_runs(folders)
    benches = load_benches(folders) if options.table == "3" else {}
    found: list[Drawn] = [*efficiencies(benches, options.model)]
    notes = []
    if not runs and not found:
        if options.suite is not None:
            named = _named(folders)
            raise TodreError(f"results {named!r} hold no runs; allowed: a folder with run JSONs.")
        notes.append(f"no runs in {_named(folders)}: published numbers only")
    if runs or not found:
        filled = sheets(options.table, runs, options.suite, options.model, options.version)
        left = len(unshown(filled, _chosen(runs, options)))
        if left:
            line = f"{left} runs fit no row (python -m eval table all shows them)."
            filled[-1].remark(line)
            notes += [line] * (options.format == "csv")
        found += filled
    drawn = (
        [] if options.format == "csv" else [RENDERERS[options.format](stacked(s)) for s in found]
    )
    return drawn, wide(found), notes


def _named(folders: Sequence[Path]) -> str:
    return ", ".join(map(str, folders))
