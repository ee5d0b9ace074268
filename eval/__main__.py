"""``python -m eval bench`` and ``python -m eval readme``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from eval.bench import bench
from eval.readme import check_readme, write_readme


def main() -> int:
    """Run one command."""
    parser = argparse.ArgumentParser(prog="python -m eval", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    timing = commands.add_parser("bench", help="time selection and prefill on this machine")
    timing.add_argument("--repeats", type=int, default=5)
    timing.add_argument("--out", type=Path, help="also write the JSON here")
    readme = commands.add_parser("readme", help="write the README's table from stored results")
    readme.add_argument("--check", action="store_true", help="only say whether it is up to date")
    options = parser.parse_args()
    if options.command == "bench":
        bench(options.repeats, options.out)
        return 0
    return check_readme() if options.check else write_readme()


if __name__ == "__main__":
    sys.exit(main())
