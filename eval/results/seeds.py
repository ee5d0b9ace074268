"""Runs that differ in nothing but their seed, put together: means, and how far the seeds spread."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from eval.results.files import StoredRun

_MEANS = ("seconds", "cpu_seconds", "items_per_second")


def over_seeds(runs: Sequence[StoredRun]) -> list[StoredRun]:
    """Return the runs, those of several seeds as one whose scores are means.

    Of several runs with the same seed the newest counts; the others stay as they are. So do runs
    that failed.
    """
    groups: dict[str, dict[int, StoredRun]] = {}
    found: list[StoredRun] = []
    for run in sorted(runs, key=lambda run: str(run.get("time_utc")), reverse=True):
        seeds = groups.setdefault(_same(run), {})
        if run["status"] == "complete" and seed_of(run) not in seeds:
            seeds[seed_of(run)] = run
        else:
            found.append(run)
    found += [_together([*seeds.values()]) for seeds in groups.values() if seeds]
    return sorted(found, key=lambda run: str(run["name"]))


def seed_of(run: StoredRun) -> int:
    """Return the seed of a run that is not put together."""
    return int(run["config"].get("seed") or 0)


def members(run: StoredRun) -> list[StoredRun]:
    """Return the runs that one was put together from, by seed; of any other, itself."""
    found: list[StoredRun] = run.get("members", [run])
    return found


def _same(run: StoredRun) -> str:
    config = {key: value for key, value in run["config"].items() if key != "seed"}
    return json.dumps([config, run.get("suite_digest")], sort_keys=True)


def _together(seeds: list[StoredRun]) -> StoredRun:
    if len(seeds) == 1:
        return seeds[0]
    ordered = sorted(seeds, key=seed_of)
    keys = dict.fromkeys(key for run in ordered for key in run["benchmarks"])
    return {
        **seeds[0],
        "name": f"{ordered[0]['name']} and {len(ordered) - 1} more seeds",
        "members": ordered,
        "benchmarks": {
            key: _benchmark([run["benchmarks"].get(key) for run in ordered]) for key in keys
        },
        "tokens": _means([run.get("tokens") or {} for run in ordered]),
        **{key: _mean([run.get(key) for run in ordered]) for key in _MEANS},
    }


def _benchmark(parts: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
    """Return a benchmark's mean over seeds, with the standard deviation as ``spread``."""
    given = [part for part in parts if part is not None]
    scored = [part for part in given if part["status"] == "complete"]
    if not scored:
        return dict(given[0])
    scores = [part["score"] for part in scored]
    spread = stdev(scores) if len(scores) > 1 else None
    notes = dict.fromkeys(part.get("note") for part in scored)
    if len(scored) < len(parts):
        notes[f"of {len(scored)} of {len(parts)} seeds; the others have no score"] = None
    return {
        **scored[0],
        "score": fmean(scores),
        "spread": spread,
        "items": _items([part["items"] for part in scored]),
        "note": "; ".join(filter(None, notes)) or None,
        "watched_answer": _watched([part.get("watched_answer") for part in scored]),
    }


def _items(runs: Sequence[Sequence[Sequence[float]] | None]) -> list[list[float]] | None:
    """Return each item's mean score; None where the seeds did not score the same items."""
    known = [{int(i): score for i, score in items} for items in runs if items is not None]
    if len(known) < len(runs) or any(each.keys() != known[0].keys() for each in known):
        return None
    return [[doc_id, fmean(each[doc_id] for each in known)] for doc_id in known[0]]


def _watched(parts: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    given = [part for part in parts if part is not None]
    if not given:
        return None
    return {"answer": given[0]["answer"], "share": fmean(part["share"] for part in given)}


def _means(parts: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    keys = dict.fromkeys(key for part in parts for key in part)
    return {key: _mean([part.get(key) for part in parts]) for key in keys}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None
