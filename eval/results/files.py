"""Stored results of runs, demo and bench, read and checked against what ``eval`` relies on.

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
    PERCENTILES,
    Value,
    checked,
    is_number,
    is_whole,
    read_json,
)
from eval.results.server_scores import joined
from llava_todre.errors import TodreError

StoredRun = Mapping[str, Any]
"""The JSON of one run."""
FORMAT = 1


def _is_items(value: Any) -> bool:
    """Return whether a value is null, or pairs of distinct ids and scores from 0 to 1."""
    if value is None:
        return True
    if not isinstance(value, list) or not all(isinstance(p, list) and len(p) == 2 for p in value):
        return False
    sound = all(is_whole(i) and is_number(score) and 0 <= score <= 1 for i, score in value)
    return sound and len({i for i, _ in value}) == len(value)


def _is_watched(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("answer"), str)
        and is_number(value.get("share"))
    )


_GROUPS = Value(
    lambda value: value is None or (isinstance(value, list) and all(map(is_whole, value))),
    "null, or a whole number for each item",
)
_NUMBERS = Value(
    lambda value: (
        isinstance(value, dict) and all(v is None or is_number(v) for v in value.values())
    ),
    "keys with numbers",
)
_INTERVAL = Value(
    lambda value: isinstance(value, list) and len(value) == 2 and all(map(is_number, value)),
    "a lower and an upper end",
)
_HITS = Value(
    lambda value: isinstance(value, list) and all(hit in (0, 1) for hit in value),
    "a list of 0 and 1",
)
BENCHMARK = {
    "task?": str,
    "scale": ("percent", "points"),
    "num_samples": int,
    "status": ("complete", "submission", "skipped"),
    "score": (float, None),
    "items": Value(_is_items, "null, or pairs of doc_id (each once) and score between 0 and 1"),
    "groups?": _GROUPS,
    "note?": (str, None),
    "submission?": (str, None),
    "averaged?": bool,
    "watched_answer?": (Value(_is_watched, "an answer and its share"), None),
    "spread?": ABSENT,
    "provenance?": ABSENT,
}
RUN = {
    "name": str,
    "status": ("complete", "failed"),
    "error": (str, None),
    "config": {
        "model": {"num_layers?": COUNT},
        "method": str,
        "options": {"retain_ratio?": float},
        "suite": str,
        "limit?": (COUNT, None),
        "seed?": int,
        "benchmarks?": [str],
    },
    "benchmarks": {...: BENCHMARK},
    "seconds?": (float, None),
    "cpu_seconds?": (float, None),
    "items_per_second?": (float, None),
    "peak_memory_mib?": (float, None),
    "tokens?": (_NUMBERS, None),
    "versions?": dict,
    "members?": ABSENT,
}
"""Shape of a run; a key that ends in ``?`` may be missing, as in results of earlier versions.

What is put together from several files afterwards is in none of them."""
DEMO = {
    "rows": [
        {
            "method": str,
            "retain_ratio": float,
            "draws": COUNT,
            "accuracy": {...: float},
            "average": float,
            "relative_average": float,
            "relative_interval": _INTERVAL,
            "kept_tokens": float,
            "mean_visual_tokens_per_layer": float,
            "flops_share": float,
            "prefill_speedup": PERCENTILES,
            "first_token_speedup": PERCENTILES,
        }
    ],
    "runs": [{"run": dict, "hits": {...: _HITS}}],
    "tasks": [str],
    "interval": {"level": float},
    "num_images": COUNT,
    "questions": COUNT,
    "seed": int,
    "versions": dict,
    "time_utc": str,
}
BENCH = {
    "size": str,
    "checkpoint": (str, None),
    "new_tokens": COUNT,
    "repeats?": COUNT,
    "attention": str,
    "dtype": str,
    "decoder?": dict,
    "methods": [
        {
            "label": str,
            "method": str,
            "options": {"retain_ratio?": float},
            "measured": bool,
            "flops": {"prefill": float, "paper_prefill": float},
            "kept_tokens?": float,
            "visual_tokens?": float,
        }
    ],
    "versions": dict,
    "device": str,
    "torch_threads?": COUNT,
    "git_dirty": bool,
}
_MEASURED = {
    "samples_per_s": PERCENTILES,
    "peak_memory_mib": float,
    "stages_ms?": {...: PERCENTILES},
    "total_ms?": PERCENTILES,
    "speedup?": {...: PERCENTILES},
}
"""What a row of the bench has besides, where it was timed."""


def is_run(value: object) -> bool:
    """Return whether a JSON value claims to be a run."""
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        return False
    return "benchmarks" in value or "config" in value


def read_run(file: Path, with_servers: bool = True) -> dict[str, Any]:
    """Return the run stored in a file.

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


def load_runs(folders: Sequence[Path]) -> list[StoredRun]:
    """Return every run stored in the folders, by name; other JSON files are passed over.

    A copy of a run in another folder is the same run.

    Raises:
        TodreError: no such folder, or a file that is not JSON or a damaged run.
    """
    found: list[StoredRun] = []
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


def checked_demo(results: Any, file: Path) -> dict[str, Any]:
    """Return the results of a demo, or raise a TodreError that says what is wrong with them."""
    found: dict[str, Any] = checked(results, DEMO, file)
    for part, inner, kind in (("rows", "accuracy", float), ("runs", "hits", _HITS)):
        for index, each in enumerate(found[part]):
            checked(each[inner], dict.fromkeys(found["tasks"], kind), file)
            _require_length(each, f"{part}.{index}", found, file)
    return found


def _require_length(
    each: Mapping[str, Any], where: str, found: Mapping[str, Any], file: Path
) -> None:
    """Raise unless a run holds a hit, and an answer if it has any, for every image."""
    for key in {"hits", "answers"} & set(each):
        for task in found["tasks"]:
            of_task = each[key].get(task) if isinstance(each[key], dict) else None
            if not isinstance(of_task, list) or len(of_task) != found["num_images"]:
                raise TodreError(
                    f"result {str(file)!r} has {where}.{key}.{task} of other than"
                    f" {found['num_images']} images; expected: one for each."
                )


def checked_bench(result: Any, file: Path) -> dict[str, Any]:
    """Return a result of the bench, or raise a TodreError that says what is wrong with it."""
    found: dict[str, Any] = checked(result, BENCH, file)
    for row in found["methods"]:
        if row["measured"]:
            checked(row, _MEASURED, file)
    return found
