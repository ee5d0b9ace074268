"""``python -m eval report``: one HTML file about a folder of results."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from eval.report import charts, demo, runs
from eval.results.files import checked_demo
from eval.results.schema import read_json
from llava_todre.errors import TodreError
from llava_todre.files import write_whole
from llava_todre.model.checkpoint import bundled_checkpoint
from llava_todre.model.load import load_pretrained_model

NAME = "report.html"


def add_parser(commands: Any) -> None:
    """Add ``report`` to the commands of ``python -m eval``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "report", help="one HTML file: tables, figures, answers and pictures of a folder of results"
    )
    parser.add_argument("folder", type=Path, help="of `todre demo`, or of `eval run` or `sweep`")
    parser.add_argument("--model", help="checkpoint for the images (default: the bundled one)")
    parser.add_argument("--out", type=Path, help=f"file to write (default: FOLDER/{NAME})")


def run(options: argparse.Namespace) -> int:
    """Write the report; returns the exit status."""
    out = options.out or options.folder / NAME
    text = report(options.folder, options.model)
    try:
        write_whole(out, text)
    except OSError as error:
        raise TodreError(f"out {str(out)!r} cannot be written: {error.strerror}.") from None
    print(f"{out}: {len(text) / 2**20:.1f} MiB, opens in any browser, offline")
    return 0


def report(folder: Path, model_path: str | None = None) -> str:
    """Return the page about a folder of results.

    Args:
        folder: what ``todre demo`` or a sweep wrote.
        model_path: the checkpoint with which pictures are drawn.

    Raises:
        TodreError: no such folder, nothing in it to report, or a damaged file.
    """
    if not folder.is_dir():
        raise TodreError(f"folder {str(folder)!r} is not a folder; allowed: one with results.")
    file = folder / "results.json"
    results = read_json(file) if file.is_file() else {}
    stored = [] if demo.is_demo(results) else runs.stored(folder)
    tokenizer, model, _, _ = load_pretrained_model(model_path or bundled_checkpoint())
    if not stored:
        return demo.report(checked_demo(results, file), model, tokenizer, charts.of_demo(file))
    return runs.report(stored, folder, model, tokenizer, charts.of_runs(folder))
