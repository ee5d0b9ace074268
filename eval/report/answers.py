"""Answers of stored runs, item by item: of the demo, and of runs through lmms-eval."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.mini import Sample
from llava_todre.errors import TodreError
from llava_todre.lmms_plugin.answer_log import read_answers

_Key = tuple[str, int]
"""Task and number of a document."""


@dataclass(frozen=True)
class Asked:
    """One question, and what each run said."""

    task: str
    question: str
    expected: str
    given: Mapping[str, tuple[str, bool]]
    """Run -> its answer, and whether that is right."""


def of_demo(runs: Mapping[str, Mapping[str, Any]], index: int, sample: Sample) -> list[Asked]:
    """Return the questions about one picture of the demo.

    Args:
        runs: label -> stored run. One that was stored without its answers says nothing.
        index: of the picture.
        sample: the picture's questions.
    """
    found = []
    for question in sample.questions:
        given = {
            label: (run["answers"][question.task][index], bool(run["hits"][question.task][index]))
            for label, run in runs.items()
            if "answers" in run
        }
        found.append(Asked(question.task, question.text, question.answer, given))
    return found


def of_runs(
    runs: Mapping[str, Mapping[str, Any]], folder: Path, num_items: int
) -> list[list[Asked]]:
    """Return the first questions of every benchmark.

    Args:
        runs: label -> a complete run's JSON.
        folder: where they are stored, with ``logs`` and ``raw`` next to them. Without these, as in
            results that were passed on, there are no answers.
        num_items: of each benchmark.

    Returns:
        ``num_items`` lists; each goes through the benchmarks in order.
    """
    found: list[list[Asked]] = [[] for _ in range(num_items)]
    logged = {label: _logged(folder, run) for label, run in runs.items()}
    logged = {label: lines for label, lines in logged.items() if lines}
    if not logged:
        return found
    first = runs[next(iter(logged))]
    expected = _expected(folder, first)
    for benchmark, part in first["benchmarks"].items():
        if part["items"] is None or "+" in part.get("task", "+"):
            continue  # several tasks share their numbers
        scores = {label: _scores(runs[label], benchmark) for label in logged}
        for place, (doc_id, _) in zip(found, part["items"], strict=False):
            key = (part["task"], doc_id)
            given = {
                label: (lines[key]["answer"], scores[label][doc_id] >= 0.5)
                for label, lines in logged.items()
                if key in lines and doc_id in scores[label]
            }
            if given and key in expected:
                question = logged[next(iter(given))][key]["prompt"]
                place.append(Asked(benchmark, question, expected[key], given))
    return found


def _scores(run: Mapping[str, Any], benchmark: str) -> dict[int, float]:
    items = run["benchmarks"].get(benchmark, {}).get("items") or []
    return {doc_id: score for doc_id, score in items}


def _logged(folder: Path, run: Mapping[str, Any]) -> dict[_Key, dict[str, Any]]:
    """Return what a run answered; of several questions about a document, to the first."""
    log = folder / "logs" / str(run["name"])
    if not log.is_dir():
        return {}
    return {(line["task"], line["doc_id"]): line for line in reversed(read_answers(log))}


def _expected(folder: Path, run: Mapping[str, Any]) -> dict[_Key, str]:
    """Return the right answers, from what lmms-eval wrote."""
    found: dict[_Key, str] = {}
    for part in run["benchmarks"].values():
        for file in (folder / "raw" / str(run["name"])).rglob(f"*_samples_{part['task']}.jsonl"):
            try:
                records: Sequence[Any] = [
                    json.loads(line) for line in file.read_text().split("\n") if line
                ]
            except ValueError as error:
                raise TodreError(f"samples {str(file)!r} are damaged: {error}.") from None
            found |= {(part["task"], each["doc_id"]): str(each["target"]) for each in records}
    return found
