"""The processes of runs: their commands, their locks, and how they end."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from eval.run.collect import complete, failed, last_error, results_files
from eval.run.spec import Run, shown_path
from llava_todre.errors import TodreError

_GRACE_SECONDS = 15.0
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
_SET_PARENT_DEATH_SIGNAL = 1  # prctl's number of it, Linux only


@dataclass(frozen=True)
class Launch:
    """How runs are carried out; nothing here changes a score."""

    out: Path
    jobs: int | None = None
    """Runs at a time; None is as many as there are GPUs, or shares of GPUs."""
    gpus: tuple[str, ...] = ()
    """Which GPUs to use; none leaves the choice to PyTorch."""
    processes: int = 1
    """Per run: copies of the model, among which the items are shared, or parts of one model."""
    offline: bool = False
    """Whether to forbid the children to ask the Hugging Face hub."""
    retry_failed: bool = False
    program: tuple[str, ...] = ("-m", "lmms_eval")
    """What Python runs."""

    def slots(self, runs: Sequence[Run]) -> list[tuple[str, ...]]:
        """Return the GPUs of each of the runs that go on at a time.

        A model that spreads takes an equal share of the GPUs, any other one per process; with more
        jobs than there are shares, some share.
        """
        is_spread = any(run.is_spread for run in runs)
        if is_spread and self.processes > 1:
            raise TodreError(
                f"processes {self.processes} with a device_map that spreads the model: each would "
                "take all GPUs; allowed: 1."
            )
        if any(run.is_split for run in runs) and self.processes == 1:
            raise TodreError(
                "processes 1 with a tp_plan that splits the model over them; allowed: 2 or more."
            )
        if not self.gpus:
            return [()] * (self.jobs or 1)
        each = max(len(self.gpus) // (self.jobs or 1), 1) if is_spread else self.processes
        if each > len(self.gpus):
            raise TodreError(f"processes {each} needs as many GPUs; given: {','.join(self.gpus)}.")
        starts = range(0, len(self.gpus) - each + 1, each)
        shares = [self.gpus[start : start + each] for start in starts]
        return [shares[job % len(shares)] for job in range(self.jobs or len(shares))]

    def file(self, run: Run) -> Path:
        """Return where the result of a run is stored."""
        return self.out / f"{run.name}.json"


def command(
    run: Run, launch: Launch, gpus: Sequence[str], jobs: int
) -> tuple[dict[str, str], list[str]]:
    """Return what a run adds to the environment, and the arguments of its process."""
    log_dir, work = (
        shown_path(launch.out / "logs" / run.name),
        shown_path(launch.out / "raw" / run.name),
    )
    include = run.suite_spec.include
    environment: dict[str, str] = {}
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    elif jobs * launch.processes > 1:
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        environment["OMP_NUM_THREADS"] = str(max(1, cores // (jobs * launch.processes)))
    if launch.processes > 1 and not gpus:
        environment["ACCELERATE_USE_CPU"] = "true"
    if run.suite_spec.data is not None:
        environment["HF_DATASETS_OFFLINE"] = "1"  # else it counts every use of the data, outside
    if launch.offline:
        environment |= dict.fromkeys(_OFFLINE, "1")
    torchrun = ["-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc_per_node", str(launch.processes)]
    arguments = [
        _python(),
        *(torchrun if launch.processes > 1 else ()),
        *launch.program,
        *("--model", "llava_todre"),
        *("--model_args", run.model_args(log_dir)),
        *("--tasks", ",".join(run.suite_spec.tasks)),
        *("--batch_size", str(run.batch_size)),
        *(("--limit", str(run.limit)) if run.limit is not None else ()),
        *(("--include_path", shown_path(include)) if include is not None else ()),
        *("--output_path", work),
        "--log_samples",
        *("--seed", str(run.seed)),
    ]
    return environment, arguments


def shell_line(environment: Mapping[str, str], arguments: Sequence[str]) -> str:
    """Return a command as a reader would paste it into a shell."""
    settings = [f"{key}={shlex.quote(value)}" for key, value in environment.items()]
    return " ".join([*settings, shlex.join(arguments)])


def _python() -> str:
    """Return "python" where that is the one that runs us, else its full path."""
    found = shutil.which("python")
    return "python" if found and Path(found) == Path(sys.executable) else sys.executable


def locked(file: Path) -> int | None:
    """Return a descriptor that holds the lock of a run; None while another process holds it.

    The lock is free once every process that has the descriptor is gone.
    """
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


@dataclass(frozen=True)
class Child:
    """A process that carries out a run."""

    run: Run
    process: subprocess.Popen[bytes]
    lock: int
    environment: Mapping[str, str]

    def record(self, launch: Launch) -> dict[str, Any]:
        """Return the JSON of the run, whose process has ended."""
        record = self._outcome(launch)
        if "OMP_NUM_THREADS" in self.environment:  # ours is not what the child computed with
            record["torch_threads"] = int(self.environment["OMP_NUM_THREADS"])
        return record

    def _outcome(self, launch: Launch) -> dict[str, Any]:
        work, log = launch.out / "raw" / self.run.name, launch.out / "logs" / self.run.name
        if not results_files(work):
            reason = last_error(log.with_name(f"{log.name}.txt"), self.process.returncode)
            return failed(self.run, f"lmms-eval left no results: {reason}")
        try:
            return complete(self.run, work, log, launch.processes)
        except Exception as error:  # files of another program may be broken in any way
            kind = "" if isinstance(error, TodreError) else f"{type(error).__name__}: "
            return failed(self.run, f"{kind}{error}")


class Crew:
    """The running processes; leaving it ends those that still run."""

    def __init__(self, launch: Launch, slots: Sequence[tuple[str, ...]]) -> None:
        self._launch, self._slots = launch, slots
        self.children: dict[int, Child] = {}
        """By number of the slot."""

    @property
    def free(self) -> list[int]:
        """Numbers of the slots without a child."""
        return [slot for slot in range(len(self._slots)) if slot not in self.children]

    def start(self, run: Run, lock: int) -> None:
        """Start a run in the first free slot."""
        slot, out = self.free[0], self._launch.out
        environment, arguments = command(run, self._launch, self._slots[slot], len(self._slots))
        shutil.rmtree(out / "raw" / run.name, ignore_errors=True)  # of an interrupted attempt
        with (out / "logs" / f"{run.name}.txt").open("wb") as output:
            process = subprocess.Popen(
                arguments,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches us alone, and we stop them
                pass_fds=(lock,),
                preexec_fn=_end_with_parent(),
            )
        self.children[slot] = Child(run, process, lock, environment)

    def ended(self) -> list[Child]:
        """Return and forget the children that have ended."""
        slots = [k for k, child in self.children.items() if child.process.poll() is not None]
        return [self.children.pop(slot) for slot in slots]

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *error: object) -> None:
        for child in self.children.values():
            _signal(child.process, signal.SIGTERM)
        deadline = time.monotonic() + _GRACE_SECONDS
        for child in self.children.values():
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _signal(child.process, signal.SIGKILL)
                child.process.wait()
            os.close(child.lock)


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass


def _end_with_parent() -> Callable[[], Any] | None:
    """Return what makes a child end when this process is killed; only Linux knows how."""
    if sys.platform != "linux":
        return None
    return partial(ctypes.CDLL(None).prctl, _SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
