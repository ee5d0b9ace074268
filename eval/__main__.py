"""Commands for a checkout: measure, evaluate, compare, and write what is generated."""

from __future__ import annotations

import argparse
import re
import sys

from llava_todre.command import run_command
from llava_todre.errors import TodreError

# What takes seconds to import is imported inside, where Ctrl-C is caught.


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    return run_command("eval", lambda: _run(given), "--debug" in given)


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; ``carry_out`` of what it parses runs one."""
    from eval.bench import command as bench
    from eval.figures import command as figures
    from eval.pages import command as pages
    from eval.report import command as report
    from eval.results import compare, server_command, submissions
    from eval.run import commands as runs
    from eval.run import vtw_layer
    from eval.tables import command as tables

    whole = argparse.ArgumentParser(prog="python -m eval", description=__doc__)
    whole.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parsers = whole.add_subparsers(dest="command", required=True)
    for module in (
        *(runs, tables, compare, server_command, submissions),
        *(bench, report, figures, vtw_layer, pages),
    ):
        known = set(parsers.choices)
        module.add_parser(parsers)
        for name in parsers.choices.keys() - known:
            parsers.choices[name].set_defaults(carry_out=module.run)
    parsers.add_parser("demo", help="compare methods on the bundled model; same as todre demo")
    return whole


def _run(arguments: list[str]) -> int:
    from llava_todre.cli import main as todre

    for argument in arguments:  # "" would be the working folder where a path is asked for
        if argument == "" or re.fullmatch("--[a-z-]+=", argument):
            raise TodreError(f"argument {argument!r} is empty; leave it out or give a value.")
    if arguments[:1] == ["demo"]:
        return todre(arguments)
    options = parser().parse_args(arguments)
    status: int = options.carry_out(options)
    return status


if __name__ == "__main__":
    sys.exit(main())
