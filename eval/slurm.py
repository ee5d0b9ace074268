"""Runs as an array of SLURM jobs, one job per run, through submitit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from eval.launch import Launch, execute, visible_gpus
from eval.runs import Run
from llava_todre.errors import TodreError, unknown

CLUSTERS = ("slurm", "local")


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
        parameters: for ``submitit.AutoExecutor.update_parameters``, e.g. ``slurm_partition``.

    Raises:
        TodreError: no submitit, no such cluster, or parameters that it refuses.
    """
    if cluster not in CLUSTERS:
        raise unknown("slurm", cluster, CLUSTERS)
    try:
        import submitit
    except ImportError:
        raise TodreError("SLURM arrays need submitit: pip install submitit.") from None
    try:
        executor = submitit.AutoExecutor(folder=launch.out / "slurm", cluster=cluster)
        executor.update_parameters(
            **({"slurm_array_parallelism": launch.jobs} if launch.jobs else {}), **parameters
        )
        with executor.batch():
            jobs = [executor.submit(Job(run, launch)) for run in runs]
    except (RuntimeError, NameError, TypeError, submitit.core.utils.FailedJobError) as error:
        raise TodreError(f"slurm {cluster!r} refused: {' '.join(str(error).split())}") from None
    return jobs
