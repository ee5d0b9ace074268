"""Suites of benchmarks: what lmms-eval runs for them, and its results on the papers' scale.

A suite is a file ``configs/suites/NAME.yaml``; ``image.yaml`` explains every key.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import PositiveFloat, PositiveInt

from eval import ROOT
from eval.mini import data as mini_data
from eval.results.item_scores import Record, item_scores
from eval.results.server_scores import WAITING
from eval.run.config import check_keys, parsed
from llava_todre.errors import TodreError, unknown
from llava_todre.files import parse_yaml, read_json, read_text

SUITES = ROOT / "configs" / "suites"
Pictures = Mapping[tuple[str, int], str | None]
"""Task and doc_id -> what stands for the pictures of an item; None where it shows none."""
UNKNOWN = "unknown"
"""Stands for pictures in logs that do not tell."""


@dataclass(frozen=True)
class Benchmark:
    """One column of a table."""

    key: str
    """Its name in ``published.yaml`` and in results."""
    tasks: tuple[str, ...]
    """lmms-eval's names of the tasks behind it."""
    samples: Mapping[str, int]
    """Number of items of each task where nothing limits it."""
    split: str
    metric: str
    """Name in lmms-eval's results, without its filter ",none"; A+B is the sum of two."""
    factor: PositiveInt | PositiveFloat
    """lmms-eval's number times this is the papers' number."""
    scale: Literal["percent", "points"]
    combine: Literal["single", "mean", "weighted"]
    """Several tasks: ``mean`` of their scores, or ``weighted`` by number of items."""
    media: Literal["image", "video"]
    frames: PositiveInt | None
    """Frames taken from a clip; None for images."""
    sampling: Literal["uniform"] | None
    """None for images."""
    submission: str | None
    """Pattern of the file that must be sent to a server for a score; None where none must."""
    judge: bool
    """Whether a judging model is asked over the network."""
    item_metric: str | None
    """Where the score of one item stands, see ``eval.results.item_scores``; None: nowhere."""
    note: str | None
    """A remark that goes into every result."""
    submission_entries: PositiveInt | None = None
    """Entries that the server wants, where they are more than the items."""
    watched_answer: str | None = None
    """An answer whose share is told beside the score."""
    averaged: bool = True
    """Whether the score counts in an average over benchmarks."""
    block: PositiveInt = 1
    """Items are scored together in blocks of so many, which a limit must not cut."""

    @property
    def metrics(self) -> list[str]:
        """Names in lmms-eval's results whose sum is the score."""
        return self.metric.split("+")


_KEYS = {field.name for field in fields(Benchmark)} - {"key", "samples"}


@dataclass(frozen=True)
class Suite:
    """Benchmarks that are run and shown together."""

    name: str
    benchmarks: tuple[Benchmark, ...]
    include: Path | None
    """Folder with our own task files, for lmms-eval's ``--include_path``."""
    data: str | None
    """``mini`` where the data is drawn on this machine: see :func:`prepare`."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """All tasks of lmms-eval, each once."""
        return tuple(dict.fromkeys(task for mark in self.benchmarks for task in mark.tasks))


def suite_names() -> list[str]:
    """Return the names of all suites."""
    return sorted(path.stem for path in SUITES.glob("*.yaml"))


@lru_cache
def load_suite(name: str) -> Suite:
    """Read a suite from ``configs/suites``.

    Raises:
        TodreError: unknown name or key, or a value that is not allowed.
    """
    if name not in suite_names():
        raise unknown("suite", name, suite_names())
    content, where = _read(name), f"suite {name!r}"
    include = ROOT / content.include if content.include else None
    if include is not None and not include.is_dir():
        raise TodreError(f"{where}: include {content.include!r} is not a folder of this checkout.")
    marks = (content.benchmarks or {}).items()
    benchmarks = tuple(_benchmark(where, key, values) for key, values in marks)
    return Suite(name, benchmarks, include, content.data)


def check_limit(where: str, suite: Suite, limit: int) -> None:
    """Raise a TodreError if so many items of each task cannot be scored."""
    for mark in suite.benchmarks:
        if limit % mark.block and limit < max(mark.samples.values()):
            raise TodreError(
                f"{where}: limit {limit} does not fit {mark.key!r}, which is scored in blocks of "
                f"{mark.block} items; allowed: a multiple of {mark.block}."
            )


def prepare(suite: Suite) -> None:
    """Make the data that a suite draws on this machine; nothing for the others."""
    if suite.data == "mini":
        mini_data.prepare()


# ------------------------------------------------------------------------------- reading a file


@dataclass(frozen=True)
class _File:
    """Keys of a suite's file."""

    include: str | None = None
    data: Literal["mini"] | None = None
    defaults: dict[str, Any] | None = None
    benchmarks: dict[str, Any] | None = None
    base: str | None = None
    only: list[str] | None = None


def _read(name: str) -> _File:
    """Return a suite's keys, with those of its base, and its defaults in every benchmark."""
    where = f"suite {name!r}"
    content = parse_yaml(read_text(SUITES / f"{name}.yaml", "suite"), where)
    file = parsed(_File, content, where)
    base = _File()
    if file.base is not None:
        others = [other for other in suite_names() if other != name]
        if file.base not in others:
            raise unknown(f"{where}: base", file.base, others)
        base = _read(file.base)
    marks = dict(base.benchmarks or {})
    for key, values in (file.benchmarks or {}).items():
        check_keys(f"{where}: benchmark {key!r}", values, _KEYS)
        marks[key] = {**(file.defaults or {}), **marks.get(key, {}), **values}
    only = [*marks] if file.only is None else file.only
    for key in only:
        if key not in marks:
            raise unknown(f"{where}: only", key, marks)
    if not only:
        raise TodreError(f"{where} has no benchmarks; give at least one.")
    given = {**vars(base), **content, "benchmarks": {key: marks[key] for key in only}}
    return _File(**given)


def _benchmark(where: str, key: str, values: Mapping[str, Any]) -> Benchmark:
    where = f"{where}: benchmark {key!r}"
    samples = values.get("tasks", {})
    check_keys(f"{where}: tasks", samples, samples)
    if not samples or not all(type(count) is int and count > 0 for count in samples.values()):
        raise TodreError(f"{where}: tasks {samples!r} must give a number of items for each task.")
    mark = parsed(Benchmark, {**values, "tasks": [*samples]}, where, key=key, samples=samples)
    if (mark.combine == "single") != (len(mark.tasks) == 1):
        raise TodreError(
            f"{where}: combine {mark.combine!r} does not fit {len(mark.tasks)} tasks; "
            "allowed: single for one task, mean or weighted for several."
        )
    if [mark.frames is None, mark.sampling is None] != [mark.media == "image"] * 2:
        raise TodreError(
            f"{where}: frames {mark.frames!r} and sampling {mark.sampling!r} do not fit media "
            f"{mark.media!r}; allowed: null for image, a number and uniform for video."
        )
    return mark


# ------------------------------------------------------------------------------- reading results


def scores(
    suite: Suite,
    results: Mapping[str, Any],
    samples: Mapping[str, Sequence[Record]],
    folder: Path | None = None,
    pictures: Pictures | None = None,
) -> dict[str, dict[str, Any]]:
    """Return the ``benchmarks`` part of a run's JSON, by key of the benchmark.

    Args:
        suite: what was run.
        results: lmms-eval's results JSON.
        samples: per task, the records of lmms-eval's samples file, in any order.
        folder: lmms-eval's output path, with submission files in ``submissions``.
        pictures: what each item shows, as the log of answers tells.

    Returns:
        Per benchmark: ``task``, ``metric``, ``score`` on the papers' scale (None where a server
        must give it), ``scale``, ``num_samples``, ``status`` (``complete``; ``submission``: send
        the file ``submission`` to the server; ``skipped``: ``--limit`` left no item of the
        metric), ``note``, and ``items``: [number, score] for intervals, where tasks are numbered
        one after the other, with ``groups``: the number of each item's image, None if unknown;
        ``watched_answer``: what is told beside the score; ``averaged``: whether it counts in an
        average.

    Raises:
        TodreError: a task has no result, its metric is missing or not a finite number, its records
            are not as many as it has items, or a submission file is missing or incomplete.
    """
    known = pictures or {}
    return {mark.key: _scored(mark, results, samples, folder, known) for mark in suite.benchmarks}


def _scored(
    mark: Benchmark,
    results: Mapping[str, Any],
    samples: Mapping[str, Sequence[Record]],
    folder: Path | None,
    pictures: Pictures,
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
        found["groups"] = _groups(mark, records, pictures)
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
    """Return how many items a task has and how many were asked; raise unless all are there."""
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
    mark: Benchmark, records: Mapping[str, Sequence[Record]], pictures: Pictures
) -> list[int] | None:
    """Return the number of each item's image, in the order of the items; None if one is unknown.

    An item without an image is by itself.
    """
    if mark.item_metric is None:
        return None
    numbers: dict[Any, int] = {}
    found = []
    for task, start, doc_id, _ in _numbered(mark, mark.item_metric, records):
        shown = pictures.get((task, doc_id), UNKNOWN)
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
