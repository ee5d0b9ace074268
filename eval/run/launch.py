"""Run what was planned: one lmms-eval per run, several at a time, each on devices of its own.

    <out>/<name>.json      the result; it is there = the run is done
    <out>/logs/<name>.txt  what lmms-eval printed
    <out>/logs/<name>/     the model's log of answers, with which an interrupted run goes on
    <out>/raw/<name>/      what lmms-eval wrote
    <out>/superseded/      results of suites that were edited afterwards

Nothing else is kept about a run, so it may be killed at any moment and started again. A lock keeps
two commands from working on the same run; the children hold it too, and end when we do.
"""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from eval.results.server_scores import server_file
from eval.run.collect import is_current, read_record, write_record
from eval.run.processes import Crew, Launch, locked
from eval.run.progress import Progress
from eval.run.spec import Run
from eval.run.suites import prepare
from llava_todre.errors import TodreError

_POLL_SECONDS = 0.2
_NOTHING_LOST = (
    "Make room or choose another folder with --out; the same command then goes on with the answers "
    "that are in the logs."
)


@dataclass
class Report:
    """What became of the runs."""

    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """Name -> reason."""
    failed_before: dict[str, str] = field(default_factory=dict)
    """The same, of runs that were not repeated."""
    superseded: list[str] = field(default_factory=list)
    """Runs whose stored result was of the suite as it stood before an edit."""
    undated: list[str] = field(default_factory=list)
    """Runs whose stored result does not tell of which suite it is, and stays."""
    versions: set[str] = field(default_factory=set)
    """Of lmms-eval, in results that were found."""

    def add(self, record: Mapping[str, Any], is_old: bool = False) -> None:
        """Note a run that has ended, or that was found."""
        if is_old:
            self.versions.add(str((record.get("versions") or {}).get("lmms_eval")))
            self.undated += [record["name"]] * ("suite_digest" not in record)
        if record["status"] == "complete":
            self.done.append(record["name"])
        else:
            failures = self.failed_before if is_old else self.failed
            failures[record["name"]] = record["error"]


def visible_gpus() -> tuple[str, ...]:
    """Return the names of the GPUs this process may use, as its children need them."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return tuple(named[:count]) if named != [""] else tuple(map(str, range(count)))


def execute(runs: Sequence[Run], launch: Launch) -> Report:
    """Carry out the runs that are not done; returns what became of all of them.

    Raises:
        TodreError: before anything starts, when something about the runs or devices is wrong.
    """
    slots = launch.slots(runs)
    report, waiting = Report(), {}
    stored = {run.name: read_record(launch.file(run)) for run in runs}
    for run in runs:
        record = stored[run.name]
        if record is None or (record["status"] == "failed" and launch.retry_failed):
            waiting[run.name] = run
        elif not is_current(record, run):
            waiting[run.name] = run
            report.superseded += [run.name] * (record["status"] == "complete")
        else:
            report.add(record, is_old=True)
    if not waiting:
        return report
    _check_installed(launch.program)
    for suite in {run.suite: run.suite_spec for run in waiting.values()}.values():
        prepare(suite)
    for folder in ("", "logs", "raw"):
        try:
            (launch.out / folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            place = str(launch.out / folder)
            raise TodreError(f"out {place!r} cannot be a folder: {error.strerror}.") from None
    with (
        _told_with_what_to_do(launch.out),
        Progress([*waiting.values()], launch.out / "logs") as progress,
        Crew(launch, slots) as crew,
    ):
        while waiting or crew.children:
            for run in list(waiting.values()) if crew.free else ():
                lock = locked(launch.out / "raw" / f"{run.name}.lock")
                if lock is None:  # another command is at it
                    continue
                record = read_record(launch.file(run))
                if record is not None and record != stored[run.name]:  # another command did it
                    os.close(lock)
                    report.add(record)
                    progress.end(run, report.failed.get(run.name))
                else:
                    try:
                        if record is not None and record["status"] == "complete":
                            _set_aside(launch.file(run), record)
                        crew.start(run, lock)
                    except OSError:
                        os.close(lock)
                        raise
                del waiting[run.name]
                if not crew.free:
                    break
            for child in crew.ended():
                try:
                    record = child.record(launch)
                    _store(launch.file(child.run), record)
                finally:
                    os.close(child.lock)
                report.add(record)
                progress.end(child.run, report.failed.get(child.run.name))
            progress.count(child.run.name for child in crew.children.values())
            time.sleep(_POLL_SECONDS)
    return report


def _set_aside(file: Path, record: Mapping[str, Any]) -> None:
    """Move a result out of the way, to where no table looks, with what servers said about it."""
    when = re.sub(r"\D", "", str(record.get("time_utc")))
    place = file.parent / "superseded" / f"{file.stem}.{when}.json"
    place.parent.mkdir(exist_ok=True)
    if server_file(file).exists():  # its scores are of the old submission; no table would open
        os.replace(server_file(file), server_file(place))
    os.replace(file, place)


def _check_installed(program: Sequence[str]) -> None:
    if program[0] == "-m" and importlib.util.find_spec(program[1]) is None:
        raise TodreError(
            f"{program[1]} is not installed: pip install -e '.[eval]', and then "
            "pip install --no-deps lmms_eval==0.7.3."
        )


def _store(file: Path, record: Mapping[str, Any]) -> None:
    """Write a result; where that is impossible, say what to do."""
    try:
        write_record(file, record)
    except TodreError as error:
        raise TodreError(f"{error} {_NOTHING_LOST}") from None


@contextmanager
def _told_with_what_to_do(out: Path) -> Iterator[None]:
    """Turn the first file that the system does not let us use into one line."""
    try:
        yield
    except OSError as error:
        file = str(error.filename or out)
        raise TodreError(f"{file!r} cannot be used: {error.strerror}. {_NOTHING_LOST}") from None


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP stop the children before they end us, as Ctrl-C does."""

    def stop(number: int, frame: Any) -> None:
        del frame
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
