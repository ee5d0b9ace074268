"""lmms-eval's results as scores on the papers' scale, with the items that intervals need."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.results.item_scores import Record, item_scores
from eval.results.server_scores import WAITING
from eval.run.suites import Benchmark, Suite
from llava_todre.errors import TodreError
from llava_todre.files import read_json

Images = Mapping[tuple[str, int], str | None]
"""Task and doc_id -> a key for the images of an item; None where it shows none."""
UNKNOWN = "unknown"
"""Stands for images in logs that do not tell."""


def scores(
    suite: Suite,
    results: Mapping[str, Any],
    samples: Mapping[str, Sequence[Record]],
    folder: Path | None = None,
    images: Images | None = None,
) -> dict[str, dict[str, Any]]:
    """Return the ``benchmarks`` part of a run's JSON, by key of the benchmark.

    Args:
        suite: what was run.
        results: lmms-eval's results JSON.
        samples: per task, the records of lmms-eval's samples file, in any order.
        folder: lmms-eval's output path, with submission files in ``submissions``.
        images: what each item shows, from the log of answers.

    Returns:
        Per benchmark: ``task``, ``metric``, ``score`` on the papers' scale (None where a server
        must give it), ``scale``, ``num_samples``, ``status`` (``complete``; ``submission``: send
        the file ``submission`` to the server; ``skipped``: ``--limit`` left no item of the
        metric), ``note``, and ``items``: [number, score] for intervals, where tasks are numbered
        one after the other, with ``groups``: the number of each item's image, None if unknown;
        ``watched_answer``: what is shown next to the score; ``averaged``: whether it counts in an
        average.

    Raises:
        TodreError: a task has no result, its metric is missing or not a finite number, its records
            are not as many as it has items, or a submission file is missing or incomplete.
    """
    known = images or {}
    return {mark.key: _scored(mark, results, samples, folder, known) for mark in suite.benchmarks}


def _scored(
    mark: Benchmark,
    results: Mapping[str, Any],
    samples: Mapping[str, Sequence[Record]],
    folder: Path | None,
    images: Images,
) -> dict[str, Any]:
    records = {task: samples.get(task, ()) for task in mark.tasks}
    sizes = {task: _size(task, results, records[task]) for task in mark.tasks}
    values = {task: _value(mark, task, results) for task in mark.tasks}
    is_limited = any(size["effective"] < size["original"] for size in sizes.values())
    found: dict[str, Any] = {"status": "complete", "score": None, "submission": None, "items": None}
    found |= {"groups": None, "watched_answer": _watched(mark, records)}
    notes = [mark.note, *_size_notes(mark, sizes), *_answer_notes(records)]
    if mark.submission is not None:
        found["submission"] = str(_submission(mark, folder, sum(map(len, records.values()))))
    numbers = [value for value in values.values() if value is not None]
    if len(numbers) == len(values):
        weights = [len(group) if mark.combine == "weighted" else 1 for group in records.values()]
        total = sum(number * weight for number, weight in zip(numbers, weights, strict=True))
        found["score"] = mark.factor * total / sum(weights)
        found["items"] = _items(mark, records)
        found["groups"] = _groups(mark, records, images)
    elif mark.submission is not None:
        found["status"] = "submission"
        notes.append(WAITING)
    elif is_limited:
        found["status"] = "skipped"
        notes.append(f"no item of {mark.metric} among those asked")
    else:
        task = next(task for task, value in values.items() if value is None)
        known = ", ".join(sorted(results["results"][task])) or "none"
        raise TodreError(f"task {task!r}: metric {mark.metric!r} is missing; found: {known}.")
    return {
        "task": "+".join(mark.tasks),
        "metric": mark.metric,
        "scale": mark.scale,
        "averaged": mark.averaged,
        "num_samples": sum(map(len, records.values())),
        "note": "; ".join(note for note in notes if note) or None,
        **found,
    }


def _size(task: str, results: Mapping[str, Any], records: Sequence[Record]) -> dict[str, int]:
    """Return how many items a task has and how many were scored; raise unless all are there."""
    size = results.get("n-samples", {}).get(task)
    if size is None or task not in results.get("results", {}):
        ran = ", ".join(sorted(results.get("results", {}))) or "none"
        raise TodreError(f"task {task!r} has no result; tasks with one: {ran}.")
    numbers = {record["doc_id"] for record in records}
    if not records or not len(numbers) == len(records) == size["effective"]:
        raise TodreError(
            f"task {task!r} has {len(records)} sample records of {len(numbers)} items; "
            f"expected: {size['effective']} of both."
        )
    return dict(size)


def _value(mark: Benchmark, task: str, results: Mapping[str, Any]) -> float | None:
    """Return lmms-eval's number; None where it gave none."""
    values = [results["results"][task].get(f"{metric},none") for metric in mark.metrics]
    if None in values:
        return None
    for metric, value in zip(mark.metrics, values, strict=True):
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value):
            raise TodreError(f"task {task!r}: metric {metric!r} is {value!r}; expected: a number.")
    return float(sum(values))


def _size_notes(mark: Benchmark, sizes: Mapping[str, Mapping[str, int]]) -> Iterable[str]:
    for task, size in sizes.items():
        if size["effective"] < size["original"]:
            yield f"{task}: the first {size['effective']} of {size['original']} items"
        if size["original"] != mark.samples[task]:
            yield f"{task}: {size['original']} items on this machine, {mark.samples[task]} expected"


def _answer_notes(records: Mapping[str, Sequence[Record]]) -> Iterable[str]:
    for task, group in records.items():
        empty = sum(not any(_texts(record.get("filtered_resps"))) for record in group)
        if empty:
            yield f"{task}: {empty} empty answers"


def _texts(answer: Any) -> list[str]:
    parts = answer if isinstance(answer, list) else [answer]
    return [str(part).strip() for part in parts if part is not None]


def _watched(mark: Benchmark, records: Mapping[str, Sequence[Record]]) -> dict[str, Any] | None:
    """Return how often a benchmark's watched answer was given, whatever its case and full stop."""
    if mark.watched_answer is None:
        return None
    answers = [record.get("filtered_resps") for group in records.values() for record in group]
    said = [" ".join(_texts(answer)).lower().rstrip(". ") for answer in answers]
    share = said.count(mark.watched_answer.lower()) / len(said)
    return {"answer": mark.watched_answer, "share": share}


def _items(mark: Benchmark, records: Mapping[str, Sequence[Record]]) -> list[list[float]] | None:
    if mark.item_metric is None:
        return None
    return [[start + i, score] for _, start, i, score in _numbered(mark, mark.item_metric, records)]


def _groups(
    mark: Benchmark, records: Mapping[str, Sequence[Record]], images: Images
) -> list[int] | None:
    """Return the number of each item's image, in the order of the items; None if one is unknown.

    An item without an image is by itself.
    """
    if mark.item_metric is None:
        return None
    numbers: dict[Any, int] = {}
    found = []
    for task, start, doc_id, _ in _numbered(mark, mark.item_metric, records):
        shown = images.get((task, doc_id), UNKNOWN)
        if shown == UNKNOWN:
            return None
        found.append(numbers.setdefault(shown or start + doc_id, len(numbers)))
    return found


def _numbered(
    mark: Benchmark, item_metric: str, records: Mapping[str, Sequence[Record]]
) -> Iterator[tuple[str, int, int, float]]:
    """Yield task, number of its first item in the benchmark, ``doc_id`` and score of the items."""
    start = 0
    for task, group in records.items():
        for doc_id, score in item_scores(item_metric, task, group):
            yield task, start, doc_id, score
        start += 1 + max(record["doc_id"] for record in group)


def _submission(mark: Benchmark, folder: Path | None, num_items: int) -> Path:
    """Return the newest submission file; raise unless it has an entry for every item."""
    place = None if folder is None else folder / "submissions"
    files = sorted(place.glob(str(mark.submission))) if place else []
    if not files:
        where = str(place) if place else "no folder"
        raise TodreError(
            f"benchmark {mark.key!r}: no submission file {mark.submission!r} in {where}."
        )
    content = read_json(files[-1], "submission")
    entries = len(content) if isinstance(content, (list, dict)) else 0
    if entries != num_items:
        raise TodreError(
            f"submission {str(files[-1])!r} has {entries} entries; expected: {num_items}."
        )
    return files[-1]
