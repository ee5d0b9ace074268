"""Commands for a checkout: measure, search, and write what is generated."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from eval.bench import bench
from eval.docs import check_docs, write_docs
from eval.readme import check_readme, write_readme
from eval.vtw import find_layer
from llava_todre.errors import TodreError


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m eval", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    timing = commands.add_parser("bench", help="time selection and prefill on this machine")
    timing.add_argument("--repeats", type=int, default=5)
    timing.add_argument("--out", type=Path, help="also write the JSON here")
    for name, page in (("docs", "docs/methods.md"), ("readme", "the generated parts of README.md")):
        command = commands.add_parser(name, help=f"write {page} from registry and stored results")
        command.add_argument("--check", action="store_true", help="only say whether it is current")
    search = commands.add_parser("vtw-layer", help="search the layer at which VTW withdraws")
    search.add_argument("--model", help="checkpoint (default: the bundled one)")
    search.add_argument("--samples", type=Path, help="JSON lines with the keys image and question")
    search.add_argument("--num-samples", type=int, default=20)
    search.add_argument("--eta", type=float, default=0.003, help="bound on the divergence, in nats")
    search.add_argument("--first", type=int, default=5, help="first layer to try")
    options = parser.parse_args(arguments)
    try:
        if options.command == "bench":
            bench(options.repeats, options.out)
            return 0
        if options.command == "vtw-layer":
            find_layer(
                options.model, options.samples, options.num_samples, options.eta, options.first
            )
            return 0
        if options.command == "docs":
            return check_docs() if options.check else write_docs()
        return check_readme() if options.check else write_readme()
    except TodreError as error:
        print(f"eval: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
