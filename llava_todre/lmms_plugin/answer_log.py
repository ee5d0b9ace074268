"""Answers on disk, one JSON line per item, so that an interrupted run resumes where it stopped.

    <log_dir>/current                                    fingerprint of the latest run
    <log_dir>/<fingerprint>/settings.json                what the fingerprint stands for
    <log_dir>/<fingerprint>/unused.txt                   answers of the start before that are not
                                                         used, and why
    <log_dir>/<fingerprint>/<task>.<split>.rank<r>.jsonl answers of process r

A line is an item and its answer, see :mod:`~llava_todre.lmms_plugin.answer_line`. Every
process writes a file of its own and reads those of all. A line that a kill cut short, or that is
damaged otherwise, counts as missing: its item is answered again.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from llava_todre.errors import TodreError
from llava_todre.files import unwritable, write_whole
from llava_todre.source import what_changed

logger = logging.getLogger(__name__)
Line = dict[str, Any]
Place = tuple[str, int, int]
"""Hash of the batch, ``doc_id``, ``repeat``."""
_TEXTS = ("task", "split", "batch", "prompt", "answer")
_COUNTS = ("visual_tokens", "kept_tokens", "mean_visual_tokens_per_layer")
_NUMBERS = ("doc_id", "repeat", *_COUNTS, "seconds", "peak_memory_mib")
_OR_NULL = ("withdrawn_from", "prefill_flops", "prefill_flops_unpruned")


class AnswerLog:
    """The answers of one run, from this start and from earlier ones."""

    def __init__(self, log_dir: Path, fingerprint: str, rank: int, settings: Line) -> None:
        """Open the log of the run with that fingerprint; rank 0 records it as the current one.

        Args:
            log_dir: may hold the logs of several runs.
            fingerprint: equal for runs that give equal answers.
            rank: of this process.
            settings: what the fingerprint stands for.
        """
        self._folder, self._rank = log_dir / fingerprint, rank
        self._finished: dict[tuple[str, str], dict[Place, Line]] = {}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TodreError(
                f"log_dir must be a folder to write to, got {str(log_dir)!r}: {error.strerror}."
            ) from None
        if rank == 0:
            if not (self._folder / "settings.json").exists():
                self._warn_of_unused(log_dir, settings)
            write_whole(self._folder / "settings.json", json.dumps(settings, indent=1))
            write_whole(log_dir / "current", fingerprint)

    def _warn_of_unused(self, log_dir: Path, settings: Line) -> None:
        """Warn if answers of the latest start are not used by this one, and say why."""
        try:
            before = log_dir / (log_dir / "current").read_text()
            made_by = json.loads((before / "settings.json").read_text())
            count = sum(1 for file in before.glob("*.jsonl") for _ in _lines(file))
        except (OSError, ValueError, RecursionError):
            return
        if count == 0:
            return
        # As it will be read back: tuples are lists, and all else is text.
        now = json.loads(json.dumps(settings, default=str))
        changed = what_changed(made_by, now) if isinstance(made_by, dict) else ""
        line = (
            f"{count} answers of an earlier start are not used, because what made them has "
            f"changed: {changed or 'not recorded'}. They stay in {before}."
        )
        logger.warning("%s", line)
        write_whole(self._folder / "unused.txt", f"{line}\n")

    def finished(self, task: str, split: str) -> dict[Place, Line]:
        """Return the answers of earlier starts to a task, by all processes; read once."""
        if (task, split) not in self._finished:
            files = sorted(self._folder.glob(f"{_stem(task, split)}.rank*.jsonl"))
            lines = (line for file in files for line in _lines(file))
            self._finished[task, split] = {
                (line["batch"], line["doc_id"], line["repeat"]): line for line in lines
            }
        return self._finished[task, split]

    def append(self, lines: Sequence[Line]) -> None:
        """Store the answers of a batch; they survive a kill once this returns."""
        files: dict[Path, str] = {}
        for line in lines:
            stem = _stem(line["task"], line["split"])
            file = self._folder / f"{stem}.rank{self._rank}.jsonl"
            files[file] = files.get(file, "") + json.dumps(line, default=str) + "\n"
        for file, text in files.items():
            try:
                _append(file, text)
            except OSError as error:
                raise unwritable(file, error) from None


def _append(file: Path, text: str) -> None:
    with file.open("a+b") as stream:
        end = stream.seek(0, os.SEEK_END)
        if end > 0:
            stream.seek(end - 1)
            text = text if stream.read(1) == b"\n" else "\n" + text  # after a cut-off line
        stream.write(text.encode())


def read_answers(log_dir: Path) -> list[Line]:
    """Return the lines of the latest run, one per item, ordered by task, split, doc and repeat.

    Earlier starts with another limit or other documents left their lines here too: pick those
    whose ``doc_id`` was scored.
    """
    try:
        folder = log_dir / (log_dir / "current").read_text()
    except OSError as error:
        raise TodreError(f"log_dir {str(log_dir)!r} holds no log: {error.strerror}.") from None
    items = {}
    for file in sorted(folder.glob("*.jsonl")):
        for line in _lines(file):
            items[line["task"], line["split"], line["doc_id"], line["repeat"]] = line
    return [items[key] for key in sorted(items)]


def _lines(file: Path) -> Iterator[Line]:
    for text in file.read_bytes().split(b"\n"):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):  # the last line before a kill, or nothing
            continue
        if _is_whole(line):
            yield line


def _is_whole(line: Any) -> bool:
    """Return whether a line holds everything that is read from it."""
    return (
        isinstance(line, dict)
        and all(key in line and (line[key] is None or _is_number(line[key])) for key in _OR_NULL)
        and all(isinstance(line.get(key), str) for key in _TEXTS)
        and all(_is_number(line.get(key)) for key in _NUMBERS)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def _stem(task: str, split: str) -> str:
    return ".".join(re.sub(r"[^\w-]", "-", part) for part in (task, split))
