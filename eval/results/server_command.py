"""``python -m eval score-from-server``: enter the score that a server gave to a submission."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.results.files import read_run
from eval.results.schema import is_number
from eval.results.server_scores import read_server_scores, require_submission, server_file
from llava_todre.errors import TodreError
from llava_todre.files import write_whole

_HIGHEST = {"percent": 100, "points": 2800}
"""Of each scale; MME has 14 categories of 200 points."""


def add_parser(commands: Any) -> None:
    """Add ``score-from-server`` to the commands of ``python -m eval``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "score-from-server",
        help="enter the score that a server gave to a run's submission",
        description="Writes RUN.server.json next to the run, which itself is not changed.",
    )
    add = parser.add_argument
    add("run", type=Path, help="JSON of the run")
    add("--benchmark", required=True, help="key of the benchmark, e.g. vizwiz")
    add("--score", type=float, required=True, help="on the papers' scale, e.g. 54.3 (percent)")
    add("--source", required=True, help="server, number and date of the submission, address")
    add("--replace", action="store_true", help="replace an earlier entry")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    stored = read_run(options.run, with_servers=False)
    target = enter(
        stored, options.run, options.benchmark, options.score, options.source, options.replace
    )
    print(f"eval: written to {target}", file=sys.stderr)
    return 0


def enter(
    run: Mapping[str, Any],
    file: Path,
    benchmark: str,
    score: float,
    source: str,
    replace: bool = False,
) -> Path:
    """Write what a server said next to a run; returns the file.

    Raises:
        TodreError: no such submission, a score out of range, no source, entered before, or it
            cannot be written.
    """
    require_submission(run, benchmark, file)
    highest = _HIGHEST[run["benchmarks"][benchmark]["scale"]]
    if not is_number(score) or not 0 <= score <= highest:
        raise TodreError(f"score must be between 0 and {highest}, got {score}.")
    if not source.strip():
        raise TodreError("source must say which server gave the score, got nothing.")
    known = read_server_scores(run, file)
    if benchmark in known and not replace:
        before = known[benchmark]
        raise TodreError(
            f"benchmark {benchmark!r} has a score already, {before['score']} ({before['source']});"
            " --replace puts the new one in its place."
        )
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    said = {"score": score, "source": " ".join(source.split()), "entered_utc": now}
    content = {
        "what": "scores that servers gave to submissions, entered by hand",
        "run": run["name"],
        "run_time_utc": run.get("time_utc"),
        "benchmarks": {**known, benchmark: said},
    }
    target = server_file(file)
    write_whole(target, json.dumps(content, indent=1) + "\n")
    return target
