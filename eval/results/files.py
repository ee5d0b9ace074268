"""Stored results, read and checked against what the rest of ``eval`` relies on.

Whoever shows results gets them from here, so that a file that was damaged, cut or edited by hand is
one line with its name and key, wherever it is met.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.results.schema import (
    ABSENT,
    COUNT,
    GROUPS,
    ITEMS,
    KEYS,
    NUMBER,
    NUMBERS,
    TEXT,
    TRUTH,
    WATCHED,
    WHOLE,
    Each,
    checked,
    one_of,
    or_null,
    read_json,
)
from eval.results.server_scores import joined
from llava_todre.errors import TodreError

Run = Mapping[str, Any]
"""The JSON of one run."""
FORMAT = 1
BENCHMARK = {
    "task?": TEXT,
    "scale": one_of("percent", "points"),
    "num_samples": WHOLE,
    "status": one_of("complete", "submission", "skipped"),
    "score": or_null(NUMBER),
    "items": ITEMS,
    "groups?": GROUPS,
    "note?": or_null(TEXT),
    "submission?": or_null(TEXT),
    "averaged?": TRUTH,
    "watched_answer?": or_null(WATCHED),
    "spread?": ABSENT,
    "provenance?": ABSENT,
}
RUN = {
    "name": TEXT,
    "status": one_of("complete", "failed"),
    "error": or_null(TEXT),
    "config": {
        "model": {"num_layers?": COUNT},
        "method": TEXT,
        "options": {"retain_ratio?": NUMBER},
        "suite": TEXT,
        "limit?": or_null(COUNT),
        "seed?": WHOLE,
        "benchmarks?": Each(TEXT, listed=True),
    },
    "benchmarks": Each(BENCHMARK),
    "seconds?": or_null(NUMBER),
    "cpu_seconds?": or_null(NUMBER),
    "items_per_second?": or_null(NUMBER),
    "peak_memory_mib?": or_null(NUMBER),
    "tokens?": or_null(NUMBERS),
    "versions?": KEYS,
    "members?": ABSENT,
}
"""Shape of a run; a key that ends in ``?`` may be missing, as in results of earlier versions.

What is put together from several files afterwards is in none of them."""


def is_run(value: object) -> bool:
    """Return whether a JSON value claims to be a run."""
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        return False
    return "benchmarks" in value or "config" in value


def read_run(file: Path, with_servers: bool = True) -> dict[str, Any]:
    """Return the run stored in a file.

    Args:
        file: with its JSON.
        with_servers: whether to add what servers said about its submissions.

    Raises:
        TodreError: no such file, or not the sound JSON of a run.
    """
    run = read_json(file)
    if not is_run(run):
        raise TodreError(f"result {str(file)!r} is not the result of a run (format {FORMAT}).")
    _require_sound(run, file)
    return joined(run, file) if with_servers else dict(run)


def _require_sound(run: dict[str, Any], file: Path) -> None:
    checked(run, RUN, file)
    if run["status"] == "failed" and run["error"] is None:
        raise TodreError(f"result {str(file)!r} has status failed and no error; it must have one.")
    for key, stored in run["benchmarks"].items():
        if stored["status"] == "complete" and stored["score"] is None:
            raise TodreError(
                f"result {str(file)!r} has no score for {key!r}; expected: a number, as its status"
                " is complete."
            )
        groups, items = stored.get("groups"), stored["items"]
        if groups is not None and len(groups) != len(items or ()):
            raise TodreError(
                f"result {str(file)!r} has {len(groups)} groups for {len(items or ())} items of"
                f" {key!r}; expected: one for each."
            )


def load_runs(folders: Sequence[Path]) -> list[Run]:
    """Return every run stored in the folders, by name; other JSON files are passed over.

    A copy of a run in another folder is the same run.

    Raises:
        TodreError: no such folder, or a file that is not JSON or a damaged run.
    """
    found: list[Run] = []
    for folder in folders:
        if not folder.is_dir():
            raise TodreError(
                f"results {str(folder)!r} is not a folder; allowed: one with run JSONs."
            )
        for file in sorted(folder.glob("*.json")):
            stored = read_json(file)
            if is_run(stored):
                _require_sound(stored, file)
                run = joined(stored, file)
                found += [run] * (run not in found)
    return sorted(found, key=lambda run: str(run["name"]))
