"""Suites of benchmarks: what lmms-eval runs for them.

A suite is a file ``configs/suites/NAME.yaml``; ``image.yaml`` explains every key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import PositiveFloat, PositiveInt

from eval import ROOT
from eval.mini import data as mini_data
from eval.run.config import check_keys, parsed
from llava_todre.errors import TodreError, unknown
from llava_todre.files import parse_yaml, read_text

SUITES = ROOT / "configs" / "suites"


@dataclass(frozen=True)
class Benchmark:
    """One column of a table."""

    key: str
    """Its name in ``published.yaml`` and in results."""
    tasks: tuple[str, ...]
    """lmms-eval's names of its tasks."""
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
    """Where the score of one item is, see ``eval.results.item_scores``; None: nowhere."""
    note: str | None
    """A remark that goes into every result."""
    submission_entries: PositiveInt | None = None
    """Entries that the server wants, where they are more than the items."""
    watched_answer: str | None = None
    """An answer whose share is shown next to the score."""
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
