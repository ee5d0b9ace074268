"""The training loop every phase shares: schedule, logging, and resuming after a kill.

Batches are a pure function of the step number, so a saved state needs no data position and no
random state: weights, optimiser and step are all there is to resume.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

logger = logging.getLogger(__name__)

LOG_EVERY = 50


class Phase(Protocol):
    """One stage of training: some steps on its own data with its own loss."""

    name: str
    num_steps: int

    def train_step(self, step: int) -> dict[str, float]:
        """Do one update; returns metrics to average into the curve."""
        ...

    def validate(self) -> dict[str, float]:
        """Metrics on the validation seeds."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimiser state."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        ...


def rate(step: int, num_steps: int, warmup: int, decay: float, floor: float = 0.02) -> float:
    """Learning-rate factor: linear warm-up, flat, then linear decay over the last `decay` share."""
    remaining = 1 - step / num_steps
    return min(1.0, (step + 1) / warmup) * min(1.0, max(floor, remaining / decay))


def write_atomically(path: Path, state: dict[str, Any]) -> None:
    """Save so that a kill at any moment leaves either the old or the new file, never half."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class Run:
    """A directory with `state.pt` (resume), `<phase>.pt` (results) and `training_curve.jsonl`."""

    def __init__(self, directory: Path, save_every_s: float = 60.0) -> None:
        self.directory, self.save_every_s = directory, save_every_s
        directory.mkdir(parents=True, exist_ok=True)
        self._state_path = directory / "state.pt"
        self._curve: list[dict[str, Any]] = []
        self._saved: dict[str, Any] | None = None
        self._wall_s = self._cpu_s = 0.0
        if self._state_path.exists():
            self._saved = torch.load(self._state_path, weights_only=True)
            self._curve = self._saved["curve"]
            self._wall_s, self._cpu_s = self._saved["wall_s"], self._saved["cpu_s"]
        self._wall_start, self._cpu_start = time.monotonic(), time.process_time()

    def result_path(self, phase_name: str) -> Path:
        """Where a finished phase leaves its weights."""
        return self.directory / f"{phase_name}.pt"

    def _clock(self) -> tuple[float, float]:
        """Wall and processor seconds so far, over all restarts."""
        wall = self._wall_s + time.monotonic() - self._wall_start
        return wall, self._cpu_s + time.process_time() - self._cpu_start

    def _save(self, phase: Phase, step: int) -> None:
        wall, cpu = self._clock()
        state = {
            "phase": phase.name,
            "step": step,
            "content": phase.state_dict(),
            "curve": self._curve,
            "wall_s": wall,
            "cpu_s": cpu,
        }
        write_atomically(self._state_path, state)

    def _log(self, phase: Phase, step: int, metrics: dict[str, float], kind: str) -> None:
        wall, cpu = self._clock()
        entry: dict[str, Any] = {"phase": phase.name, "kind": kind, "step": step}
        entry |= {"wall_min": round(wall / 60, 2), "core_min": round(cpu / 60, 2)}
        entry |= {key: float(f"{value:.4g}") for key, value in metrics.items()}
        self._curve.append(entry)
        lines = [json.dumps(line) + "\n" for line in self._curve]
        (self.directory / "training_curve.jsonl").write_text("".join(lines))
        logger.info("%s", json.dumps(entry))

    def train(self, phase: Phase, validate_every: int = 500) -> None:
        """Run or continue `phase`; returns at once where it is already finished."""
        result = self.result_path(phase.name)
        if result.exists():
            phase.load_state_dict(torch.load(result, weights_only=True))
            return
        start = 0
        if self._saved is not None and self._saved["phase"] == phase.name:
            phase.load_state_dict(self._saved["content"])
            start = int(self._saved["step"])
            logger.info("%s: continuing at step %d", phase.name, start)
        self._saved = None
        last_save = time.monotonic()
        window: dict[str, list[float]] = defaultdict(list)
        steps = tqdm(range(start, phase.num_steps), phase.name, phase.num_steps, initial=start)
        for step in steps:
            for key, value in phase.train_step(step).items():
                window[key].append(value)
            done = step + 1
            if done % LOG_EVERY == 0 or done == phase.num_steps:
                means = {key: sum(values) / len(values) for key, values in window.items()}
                self._log(phase, done, means, "train")
                window.clear()
            if done % validate_every == 0 or done == phase.num_steps:
                self._log(phase, done, phase.validate(), "validation")
            if time.monotonic() - last_save > self.save_every_s:
                self._save(phase, done)
                last_save = time.monotonic()
        self._save(phase, phase.num_steps)
        write_atomically(result, phase.state_dict())
