"""Scores that servers gave to the submissions of a run, next to what was computed here.

    <run>.json          what was computed here; a benchmark of status ``submission`` has no score
    <run>.server.json   what servers said about it since, with its source

A finished run is never edited; who reads it through :mod:`eval.results.files` gets both together.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.results.schema import checked, read_json
from llava_todre.errors import TodreError, unknown

WAITING = "the server must give the score; it was not asked or did not answer"
"""Note of a benchmark whose submission is not scored yet."""
SHAPE = {
    "what": str,
    "run": str,
    "run_time_utc": (str, None),
    "benchmarks": {...: {"score": float, "source": str, "entered_utc": str}},
}


def server_file(file: Path) -> Path:
    """Return where the scores that servers gave the run in ``file`` are kept."""
    return file.with_name(f"{file.name.removesuffix('.json')}.server.json")


def read_server_scores(run: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Return what is kept next to the run in ``file``: benchmark -> score, source and time.

    Raises:
        TodreError: it is damaged, or about another run.
    """
    target = server_file(file)
    if not target.exists():
        return {}
    kept = checked(read_json(target), SHAPE, target)
    if (kept["run"], kept["run_time_utc"]) != (run["name"], run.get("time_utc")):
        raise TodreError(
            f"result {str(target)!r} is about another run than {str(file)!r}, or that was repeated"
            " since; remove it and enter the scores of the new submission."
        )
    found: dict[str, Any] = kept["benchmarks"]
    return found


def joined(run: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return a run with what servers said about its submissions, noted with its source.

    Raises:
        TodreError: what is kept next to the run is damaged, or about another one.
    """
    benchmarks = dict(run["benchmarks"])
    for key, said in read_server_scores(run, file).items():
        require_submission(run, key, server_file(file))
        benchmarks[key] = _scored(benchmarks[key], said)
    return {**run, "benchmarks": benchmarks}


def _scored(stored: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
    earlier = str(stored.get("note") or "").replace(WAITING, "").strip("; ")
    note = f"score from a server ({said['source']}), entered {said['entered_utc'][:10]}"
    return {
        **stored,
        "status": "complete",
        "score": said["score"],
        "note": f"{earlier}; {note}" if earlier else note,
        "provenance": said,
    }


def require_submission(run: Mapping[str, Any], benchmark: str, file: Path) -> None:
    """Raise a TodreError naming the file unless a server must give this benchmark's score."""
    waiting = [k for k, each in run["benchmarks"].items() if each["status"] == "submission"]
    if benchmark not in waiting:
        raise unknown(f"result {str(file)!r}: submission", benchmark, waiting or ["none"])
