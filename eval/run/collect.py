"""What became of a run: from the files lmms-eval left to the run's JSON.

lmms-eval exits with 0 after almost any failure, so its exit status decides nothing. A run is
complete when its results are there, hold every metric, and cover all the items they should.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean
from typing import Any

from eval.results.files import FORMAT, read_run
from eval.results.submissions import complete_submissions
from eval.run.scoring import UNKNOWN, scores
from eval.run.spec import Run
from llava_todre.errors import TodreError
from llava_todre.files import write_whole
from llava_todre.lmms_plugin.answer_log import read_answers
from llava_todre.provenance import provenance

_MEANS = (
    "visual_tokens",
    "kept_tokens",
    "mean_visual_tokens_per_layer",
    "prefill_flops",
    "prefill_flops_unpruned",
)
_LONGEST_REASON = 500
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_RAISED = re.compile(r"^(?:\[rank\d+\]: ?)?(?:\w+\.)*\w*(?:Error|Exception|Exit|Interrupt)\b.*")
_WRAPPER = re.compile("ChildFailedError|RetryError|Connection closed by peer")
"""Errors that only say that something else went wrong."""
_LOGGED = re.compile(r"^.*\bERROR\b[^-]*- +(.*)$")


def complete(run: Run, work: Path, log_dir: Path, processes: int) -> dict[str, Any]:
    """Return the JSON of a run that lmms-eval finished.

    Args:
        run: what was run.
        work: lmms-eval's ``--output_path``.
        log_dir: the model's log of answers.
        processes: among which the items were shared, or the model was split.

    Raises:
        TodreError: something is missing, damaged, or of the wrong number.
    """
    results = _read_results(work)
    samples = {task: _read_samples(work, task) for task in run.suite_spec.tasks}
    _check_counts(run, results, samples)
    lines = _scored_lines(log_dir, samples)
    images = {(line["task"], line["doc_id"]): line.get("pictures", UNKNOWN) for line in lines}
    benchmarks = scores(run.suite_spec, results, samples, work, images)
    if run.limit is None:
        complete_submissions(run.benchmarks, benchmarks)
    _mark_failed(benchmarks, lines)
    seconds = sum(line["seconds"] for line in lines) / (1 if run.is_split else processes)
    return _record(
        run,
        status="complete",
        error=None,
        benchmarks=benchmarks,
        seconds=seconds,
        cpu_seconds=None if run.is_split else _cpu_seconds(lines),
        items_per_second=len(lines) / seconds if seconds else None,
        failed_items=sum("failed" in line for line in lines),
        tokens=_tokens([line for line in lines if "failed" not in line]),
        peak_memory_mib=max(line["peak_memory_mib"] for line in lines),
        processes=processes,
    )


def _cpu_seconds(lines: Sequence[Mapping[str, Any]]) -> float | None:
    """Return what all processes computed for the items; None where an answer does not say."""
    known = [line["cpu_seconds"] for line in lines if line.get("cpu_seconds") is not None]
    return sum(known) if len(known) == len(lines) else None


def _tokens(lines: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Return means over the prompts that show something: nothing is pruned where nothing is seen.

    ``prompts`` counts all of them, ``prompts_with_visuals`` those in the means.
    """
    seen = [line for line in lines if line["visual_tokens"] > 0]
    counts: dict[str, float | None] = {"prompts": len(lines), "prompts_with_visuals": len(seen)}
    if not seen:
        return counts | dict.fromkeys((*_MEANS, "withdrawn_share"))
    means = {key: _mean([line[key] for line in seen]) for key in _MEANS}
    withdrawn = fmean(line["withdrawn_from"] is not None for line in seen)
    return counts | means | {"withdrawn_share": withdrawn}


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean; None where a value is not known, as FLOPs of some decoders."""
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


def _mark_failed(
    benchmarks: Mapping[str, dict[str, Any]], lines: Sequence[Mapping[str, Any]]
) -> None:
    """Say in the benchmarks how many of their items the model could not read, and why."""
    for mark in benchmarks.values():
        tasks = mark["task"].split("+")
        reasons = [line["failed"] for line in lines if "failed" in line and line["task"] in tasks]
        mark["failed_items"] = len(reasons)
        if reasons:
            text = f"{len(reasons)} items failed and count as wrong: {reasons[0]}"
            mark["note"] = "; ".join(filter(None, (mark["note"], text.removesuffix("."))))


def failed(run: Run, reason: str) -> dict[str, Any]:
    """Return the JSON of a run that failed: the reason, and nothing that looks like a score."""
    keys = ("seconds", "cpu_seconds", "items_per_second", "tokens", "peak_memory_mib")
    measured = dict.fromkeys(keys)
    return _record(run, status="failed", error=reason, benchmarks={}, **measured)


def _record(run: Run, **outcome: Any) -> dict[str, Any]:
    origin = provenance()
    origin["versions"]["lmms_eval"] = lmms_eval_version()
    known = {"format": FORMAT, "name": run.name, "config": run.config()}
    return {**known, "suite_digest": run.suite_digest, **outcome, **origin}


def lmms_eval_version() -> str | None:
    """Return the version of lmms-eval that is installed, if one is."""
    try:
        return version("lmms_eval")
    except PackageNotFoundError:
        return None


def last_error(log: Path, returncode: int) -> str:
    """Return why a child failed, as far as its output says: one line."""
    try:
        text = log.read_text(errors="replace")
    except OSError:
        text = ""
    lines = [_COLOURS.sub("", line).rstrip() for line in text.splitlines()]
    lines = [line for line in lines if line.strip()]
    raised = [line for line in lines if _RAISED.match(line)]
    causes = [line for line in raised if not _WRAPPER.search(line)]
    logged = [match[1] for line in lines if (match := _LOGGED.match(line))]
    said = (causes or raised or logged or lines or ["nothing was printed"])[-1].strip()
    how = f"ended by signal {-returncode}" if returncode < 0 else f"exit status {returncode}"
    return f"{said[:_LONGEST_REASON]} ({how}, all output in {log})"


def read_record(file: Path) -> dict[str, Any] | None:
    """Return a stored run; None when there is none, or something else."""
    try:
        return read_run(file, with_servers=False)
    except TodreError:
        return None


def is_current(record: Mapping[str, Any], run: Run) -> bool:
    """Return whether a stored result is of the suite as it is now, as far as it says.

    One from before results said that stays: it may have taken days, and nothing speaks against it.
    """
    return record.get("suite_digest", run.suite_digest) == run.suite_digest


def write_record(file: Path, record: Mapping[str, Any]) -> None:
    """Write a run so that it is there whole or not at all, even after a power cut."""
    write_whole(file, _indented(record))


def _indented(record: Mapping[str, Any]) -> str:
    """Return JSON for readers: indented, but the many scores of a benchmark on one line."""
    marks: dict[str, Any] = {}
    rows: dict[str, Any] = {}
    for key, mark in record["benchmarks"].items():
        names = {part: f"<{part} of {key}>" for part in ("items", "groups") if part in mark}
        marks[key] = {**mark, **names}
        rows |= {name: mark[part] for part, name in names.items()}
    text = json.dumps({**record, "benchmarks": marks}, indent=1, allow_nan=False)
    for name, values in rows.items():
        text = text.replace(json.dumps(name), json.dumps(values))
    return text + "\n"


# ------------------------------------------------------------------------- lmms-eval's files


def results_files(work: Path) -> list[Path]:
    """Return the results JSONs below a folder; MMBench writes a submission of the same name."""
    found = sorted(work.rglob("*_results.json"))
    return [file for file in found if file.parent.name != "submissions"]


def _read_results(work: Path) -> dict[str, Any]:
    found = results_files(work)
    if len(found) != 1:
        raise TodreError(f"lmms-eval left {len(found)} results JSONs in {work}; expected: 1.")
    try:
        results: dict[str, Any] = json.loads(found[0].read_text())
    except ValueError as error:
        raise TodreError(f"results {str(found[0])!r} are damaged: {error}.") from None
    if not isinstance(results, dict) or not isinstance(results.get("results"), dict):
        raise TodreError(f"results {str(found[0])!r} are damaged: no key 'results'.")
    return results


def _read_samples(work: Path, task: str) -> list[dict[str, Any]]:
    found = sorted(work.rglob(f"*_samples_{task}.jsonl"))
    if len(found) != 1:
        raise TodreError(f"task {task!r}: lmms-eval left {len(found)} samples files; expected: 1.")
    try:
        return [json.loads(line) for line in found[0].read_text().split("\n") if line]
    except ValueError as error:
        raise TodreError(f"samples {str(found[0])!r} are damaged: {error}.") from None


def _check_counts(
    run: Run, results: Mapping[str, Any], samples: Mapping[str, Sequence[Mapping[str, Any]]]
) -> None:
    """Raise unless every task was scored on as many items as the suite says it has."""
    for task, expected in run.expected.items():
        scored = len({record["doc_id"] for record in samples[task]})
        if scored == expected == len(samples[task]):
            continue
        here = results.get("n-samples", {}).get(task, {}).get("original")
        hint = ""
        if here is not None and scored == min(here, run.limit or here):
            hint = (
                f" The data here has {here}; if that is right, correct the suite and repeat the "
                "run, whose answers are kept."
            )
        raise TodreError(
            f"task {task!r}: {scored} items were scored; suite {run.suite!r} expects "
            f"{expected}.{hint}"
        )


def _scored_lines(
    log_dir: Path, samples: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[dict[str, Any]]:
    """Return the log's lines of the items that were scored."""
    scored = {(task, record["doc_id"]) for task, group in samples.items() for record in group}
    lines = [line for line in read_answers(log_dir) if (line["task"], line["doc_id"]) in scored]
    logged = {(line["task"], line["doc_id"]) for line in lines}
    if logged != scored:
        counts = Counter(task for task, _ in scored - logged)
        missing = ", ".join(f"{count} of {task}" for task, count in counts.items())
        raise TodreError(f"log_dir {str(log_dir)!r} lacks items that were scored: {missing}.")
    return lines
