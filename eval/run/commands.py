"""``python -m eval run`` and ``python -m eval sweep``: carry out what config files describe.

Both take the same files and options: ``run`` for configs/runs, ``sweep`` for configs/sweeps.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from eval.run.collect import lmms_eval_version
from eval.run.launch import Report, execute, stop_on_signals, visible_gpus
from eval.run.processes import Launch, command, shell_line
from eval.run.slurm import submit
from eval.run.sweeps import plan
from llava_todre.command import INTERRUPTED
from llava_todre.errors import TodreError
from llava_todre.files import parse_yaml
from llava_todre.settings import whole

OUT = Path("outputs/eval")


def add_parser(commands: Any) -> None:
    """Add ``run`` and ``sweep`` to the commands of ``python -m eval``."""
    for name, text in (
        ("run", "evaluate what configs/runs/X.yaml describes: a run, or a table's rows"),
        ("sweep", "evaluate every point of the grid in configs/sweeps/Y.yaml"),
    ):
        parser: argparse.ArgumentParser = commands.add_parser(
            name,
            help=text,
            description=f"{text}. Finished runs are not repeated, interrupted ones continue.",
        )
        add = parser.add_argument
        add("configs", type=Path, nargs="+", metavar="CONFIG", help="YAML files")
        add(
            "--set",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="change a key of the config, e.g. model=mini or options.tau=0.05; repeatable",
        )
        add("--limit", type=int, metavar="N", help="only the first N items of each task")
        add("--out", type=Path, default=OUT, help=f"folder of the results (default: {OUT})")
        add("--dry-run", action="store_true", help="print the command of every run, nothing else")
        add("--jobs", type=int, metavar="N", help="runs at a time (default: one per GPU)")
        add("--gpus", default="all", metavar="0,1,..", help="GPUs to use (default: all)")
        add(
            "--processes",
            type=int,
            default=1,
            metavar="N",
            help="copies of the model per run; or, for a model with tp_plan, parts of it",
        )
        add("--offline", action="store_true", help="do not contact the Hugging Face hub")
        add("--retry-failed", action="store_true", help="repeat runs that failed before")
        add(
            "--slurm",
            nargs="?",
            const="slurm",
            metavar="CLUSTER",
            help="submit an array of SLURM jobs, one per run (local: jobs on this machine)",
        )
        add(
            "--slurm-set",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="parameter of submitit: timeout_min=1440 (required), slurm_partition=gpu, ...",
        )


def run(options: argparse.Namespace) -> int:
    """Carry out the command; returns the exit status: 0 if every run is complete."""
    changes = [*options.set, *([f"limit={options.limit}"] if options.limit is not None else ())]
    runs = plan(options.configs, changes)
    launch = Launch(
        out=_checked_out(options.out),
        jobs=None if options.jobs is None else whole("jobs", options.jobs, 1),
        gpus=_gpus(options.gpus, must_exist=not options.dry_run),
        processes=whole("processes", options.processes, 1),
        offline=options.offline,
        retry_failed=options.retry_failed,
    )
    if options.dry_run:
        slots = launch.slots(runs)
        for index, each in enumerate(runs):
            print(shell_line(*command(each, launch, slots[index % len(slots)], len(slots))))
        if any(each.suite_spec.data for each in runs):
            _say("these commands need data that is drawn first: python -m eval.mini.data")
        return 0
    if options.slurm is not None:
        jobs = submit(runs, launch, options.slurm, _pairs(options.slurm_set))
        _say(f"{len(jobs)} jobs submitted, {jobs[0].job_id} and on; logs in {launch.out / 'slurm'}")
        _say("the same command without --slurm tells what became of them")
        return 0
    try:
        with stop_on_signals():
            report = execute(runs, launch)
    except KeyboardInterrupt:
        _say("interrupted; the same command goes on where it stopped")
        return INTERRUPTED
    return _tell(report, launch)


def _tell(report: Report, launch: Launch) -> int:
    """Say what became of the runs; returns the exit status."""
    failures = {**report.failed_before, **report.failed}
    for name, reason in failures.items():
        _say(f"FAILED {name}: {reason}")
    if report.undated:
        _say(
            f"{len(report.undated)} results are of an earlier version, which did not store of "
            f"which suite they are; they stay. To repeat one, move it out of {launch.out}"
        )
    if report.superseded:
        _say(
            f"{len(report.superseded)} results were of a suite that was edited since; "
            f"they are in {launch.out / 'superseded'}, the runs were repeated "
            "with the answers in their logs"
        )
    others = sorted(report.versions - {str(lmms_eval_version())})
    if others:
        _say(f"some results are of lmms-eval {', '.join(others)}; here is {lmms_eval_version()}")
    if report.failed_before and not launch.retry_failed:
        _say(f"{len(report.failed_before)} runs failed earlier; --retry-failed repeats them")
    _say(f"{len(report.done)} runs complete, {len(failures)} failed; results in {launch.out}")
    return 1 if failures else 0


def _say(text: str) -> None:
    print(f"eval: {text}", file=sys.stderr)


def _checked_out(out: Path) -> Path:
    if "," in str(out):  # lmms-eval splits its arguments there
        raise TodreError(f"out {str(out)!r} has a comma, which lmms-eval cannot take.")
    return out


def _gpus(text: str, must_exist: bool) -> tuple[str, ...]:
    visible = visible_gpus()
    if text == "all":
        return visible
    wanted = tuple(part.strip() for part in text.split(","))
    if not all(wanted):
        raise TodreError(f"gpus {text!r} is not a list such as 0,1; allowed also: all.")
    missing = [gpu for gpu in wanted if gpu not in visible]
    if missing and must_exist:
        here = ",".join(visible) or "none"
        raise TodreError(f"gpus {text!r}: {','.join(missing)} not found here; allowed: {here}.")
    return wanted


def _pairs(lines: list[str]) -> dict[str, Any]:
    pairs = [line.partition("=") for line in lines]
    for key, equals, value in pairs:
        if not (key and equals and value):
            raise TodreError(f"slurm-set {key + equals + value!r} is not of the form KEY=VALUE.")
    return {key: parse_yaml(value, f"slurm-set {key!r}: the value") for key, _, value in pairs}
