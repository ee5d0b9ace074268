"""Runs as an array of SLURM jobs, one job per run, through submitit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from eval.run.launch import execute, visible_gpus
from eval.run.processes import Launch
from eval.run.spec import Run
from llava_todre.errors import TodreError, unknown
from llava_todre.settings import whole

CLUSTERS = ("slurm", "local")
_NO_CAP = 1_000_000
"""How often a job may reach its time limit and go back into the queue; submitit's default is 3."""


@dataclass(frozen=True)
class Job:
    """One run as submitit calls it; at its time limit it goes back into the queue and goes on."""

    run: Run
    launch: Launch

    def __call__(self) -> str:
        """Carry out the run on the node's own GPUs; returns its name."""
        report = execute([self.run], replace(self.launch, gpus=visible_gpus(), jobs=None))
        for reason in (*report.failed.values(), *report.failed_before.values()):
            raise TodreError(f"run {self.run.name!r} failed: {reason}")
        return self.run.name

    def checkpoint(self) -> Any:
        """Tell submitit to submit the same again: answers so far are in the log."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def submit(
    runs: Sequence[Run], launch: Launch, cluster: str, parameters: Mapping[str, Any]
) -> list[Any]:
    """Submit the runs; returns submitit's jobs.

    Args:
        runs: what to run; those that are done end at once.
        launch: how; ``jobs`` is the number that may run at a time.
        cluster: slurm, or local for jobs on this machine.
        parameters: for ``submitit.AutoExecutor.update_parameters``: ``timeout_min``, the minutes
            until a job goes back into the queue, and others, e.g. ``slurm_partition``.

    Raises:
        TodreError: no submitit, no such cluster, no time limit, or parameters that it refuses.
    """
    if cluster not in CLUSTERS:
        raise unknown("slurm", cluster, CLUSTERS)
    _check_time(parameters)
    try:
        import submitit
    except ImportError:
        raise TodreError("SLURM arrays need submitit: pip install submitit.") from None
    try:
        executor = submitit.AutoExecutor(
            folder=launch.out / "slurm",
            cluster=cluster,
            **{f"{name}_max_num_timeout": _NO_CAP for name in CLUSTERS},
        )
        executor.update_parameters(
            **({"slurm_array_parallelism": launch.jobs} if launch.jobs else {}), **parameters
        )
        with executor.batch():
            jobs = [executor.submit(Job(run, launch)) for run in runs]
    except Exception as error:  # it checks parameters in many ways, with assertions as well
        text = " ".join(str(error).split()) or type(error).__name__
        raise TodreError(f"slurm {cluster!r} refused: {text}") from None
    return jobs


def _check_time(parameters: Mapping[str, Any]) -> None:
    """Raise unless there is a time limit; submitit's own is five minutes."""
    if "slurm_time" in parameters:
        raise TodreError("slurm-set slurm_time is not taken; give timeout_min, in minutes.")
    minutes = parameters.get("timeout_min")
    if minutes is None:
        raise TodreError(
            "slurm-set timeout_min is missing; give the minutes after which a job goes back into "
            "the queue, to go on later, e.g. --slurm-set timeout_min=1440."
        )
    whole("slurm-set timeout_min", minutes, 1)
