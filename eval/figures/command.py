"""``python -m eval figure``: draw the figures, from live runs or from stored results."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from eval.figures.files import store, stored, write_index
from eval.figures.registry import FIGURES, gathered, spec_of
from eval.figures.sources import Sources
from eval.figures.style import matplotlib

OUT = Path("docs/figures")


def add_parser(commands: Any) -> None:
    """Add ``figure`` to the commands of ``python -m eval``."""
    width = max(map(len, FIGURES))
    names = [f"  {name:{width}}  {spec.shows}" for name, spec in FIGURES.items()]
    parser: argparse.ArgumentParser = commands.add_parser(
        "figure",
        help="draw a figure of the papers, or all: PNG, SVG and the numbers in them",
        description="Draw figures as PNG and SVG, and store what they show as JSON next to them.",
        epilog="\n".join(["figures:", *names]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = Sources()
    add = parser.add_argument
    add("names", nargs="+", metavar="NAME", help="figures, or all")
    add("--out", type=Path, default=OUT, help=f"folder of the files (default: {OUT})")
    add("--model", help="checkpoint for live runs (default: the bundled one)")
    add("--samples", type=int, metavar="N", help="held-out pictures of attention figures")
    add("--methods", type=Path, default=default.methods, help="results.json of a demo")
    add("--runs", type=Path, default=default.runs, help="folder with run JSONs")
    add("--bench", type=Path, default=default.bench, help="a result of the bench")
    add(
        "--redraw",
        action="store_true",
        help="run and read nothing: draw the data in OUT again",
    )


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    wanted = [name for each in options.names for name in (FIGURES if each == "all" else [each])]
    for name in wanted:
        spec_of(name)
    matplotlib()  # if it is missing, say so before a model runs
    sources = Sources(
        model=options.model,
        samples=options.samples,
        methods=options.methods,
        runs=options.runs,
        bench=options.bench,
    )
    for name in dict.fromkeys(wanted):
        start = time.perf_counter()
        data = stored(name, options.out) if options.redraw else gathered(name, sources)
        for file in store(name, data, options.out):
            print(file)
        print(f"{name}: {time.perf_counter() - start:.1f} s", file=sys.stderr)
    write_index(options.out)
    return 0
