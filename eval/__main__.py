"""Commands for a checkout: measure, evaluate, compare, and write what is generated."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from llava_todre.command import run_command
from llava_todre.errors import TodreError

# What takes seconds to import is imported inside, where Ctrl-C is caught.


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    return run_command("eval", lambda: _run(given), "--debug" in given)


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    from eval.bench import command as bench
    from eval.figures import command as figures
    from eval.report import command as report
    from eval.results import compare, server_command, submissions
    from eval.run import commands
    from eval.tables import command as table_command

    whole = argparse.ArgumentParser(prog="python -m eval", description=__doc__)
    whole.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parsers = whole.add_subparsers(dest="command", required=True)
    commands.add_parsers(parsers)
    table_command.add_parser(parsers)
    compare.add_parser(parsers)
    server_command.add_parser(parsers)
    submissions.add_parser(parsers)
    bench.add_parser(parsers)
    report.add_parser(parsers)
    figures.add_parser(parsers)
    search = parsers.add_parser("vtw-layer", help="search the layer at which VTW withdraws")
    search.add_argument("--model", help="checkpoint (default: the bundled one)")
    search.add_argument("--samples", type=Path, help="JSON lines with the keys image and question")
    search.add_argument("--num-samples", type=int, default=20)
    search.add_argument("--eta", type=float, default=0.003, help="bound on the divergence, in nats")
    search.add_argument("--first", type=int, default=5, help="first layer to try")
    parsers.add_parser("demo", help="compare methods on the bundled model; same as todre demo")
    for name, page in (
        ("docs", "the pages of docs/"),
        ("readme", "the generated parts of README.md"),
    ):
        command = parsers.add_parser(name, help=f"write {page} from registry and stored results")
        command.add_argument("--check", action="store_true", help="only say whether it is current")
    return whole


def _run(arguments: list[str]) -> int:
    from eval.bench import command as bench
    from eval.figures import command as figures
    from eval.pages.methods import check_docs, write_docs
    from eval.pages.readme import check_readme, write_readme
    from eval.report import command as report
    from eval.results import compare, server_command, submissions
    from eval.run import commands
    from eval.run.vtw_layer import find_layer
    from eval.tables import command as table_command
    from llava_todre.cli import main as todre

    for argument in arguments:  # "" would be the working folder where a path is asked for
        if argument == "" or re.fullmatch("--[a-z-]+=", argument):
            raise TodreError(f"argument {argument!r} is empty; leave it out or give a value.")
    if arguments[:1] == ["demo"]:
        return todre(arguments)
    options = parser().parse_args(arguments)
    match options.command:
        case "run" | "sweep":
            return commands.run(options)
        case "table":
            return table_command.run(options)
        case "compare":
            return compare.run(options)
        case "score-from-server":
            return server_command.run(options)
        case "pad-submission":
            return submissions.run(options)
        case "bench":
            return bench.run(options)
        case "report":
            return report.run(options)
        case "figure":
            return figures.run(options)
        case "vtw-layer":
            find_layer(
                options.model, options.samples, options.num_samples, options.eta, options.first
            )
        case "docs":
            return check_docs() if options.check else write_docs()
        case "readme":
            return check_readme() if options.check else write_readme()
    return 0


if __name__ == "__main__":
    sys.exit(main())
