"""``python -m eval docs`` and ``readme``: write pages from the registry and stored results."""

from __future__ import annotations

import argparse
from typing import Any

from eval.pages import methods, readme
from eval.pages.fill import check, write

_PAGES = {
    "docs": ("the pages of docs/", methods.docs),
    "readme": ("the generated parts of README.md", readme.pages),
}


def add_parser(commands: Any) -> None:
    """Add ``docs`` and ``readme`` to the commands of ``python -m eval``."""
    for name, (page, _) in _PAGES.items():
        command = commands.add_parser(name, help=f"write {page} from registry and stored results")
        command.add_argument(
            "--check", action="store_true", help="only check that they are current"
        )


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    pages = _PAGES[options.command][1]()
    return check(pages, f"make {options.command}") if options.check else write(pages)
