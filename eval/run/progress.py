"""How far the active runs are, read from the logs of their answers."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from tqdm import tqdm

from eval.run.spec import Run

_COUNT_SECONDS = 2.0


class Progress:
    """A line with finished and total items, time left, and runs."""

    def __init__(self, runs: Sequence[Run], logs: Path) -> None:
        """Count what earlier starts have answered."""
        self._num_runs, self._ended = len(runs), 0
        self._sizes = {run.name: sum(run.expected.values()) for run in runs}
        self._counters = {run.name: _Counter(logs / run.name) for run in runs}
        self._counts = {name: self._read(name) for name in self._sizes}
        self._next = 0.0
        self._bar = tqdm(
            desc="eval",
            total=sum(self._sizes.values()),
            initial=sum(self._counts.values()),
            unit="item",
            mininterval=0.5 if sys.stderr.isatty() else 30.0,
            postfix=f"0/{len(runs)} runs",
        )

    def _read(self, name: str) -> int:
        return min(self._counters[name].read(), self._sizes[name])

    def count(self, names: Iterable[str]) -> None:
        """Count the answers of the active runs, now and then."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _COUNT_SECONDS
        for name in names:
            self._advance(name, self._read(name))
            if line := self._counters[name].news():
                tqdm.write(f"{name}: {line}", file=sys.stderr)
        self._bar.update(0)

    def end(self, run: Run, reason: str | None) -> None:
        """Count a run as ended; ``reason``: why it failed, if it did."""
        self._ended += 1
        self._bar.set_postfix_str(f"{self._ended}/{self._num_runs} runs", refresh=False)
        self._advance(run.name, self._sizes[run.name])
        if reason is not None:
            tqdm.write(f"failed: {run.name}: {reason}", file=sys.stderr)

    def _advance(self, name: str, count: int) -> None:
        self._bar.update(count - self._counts[name])
        self._counts[name] = count

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()


class _Counter:
    """Counts the lines of a log that grows, reading each part of it once."""

    def __init__(self, log_dir: Path) -> None:
        self._log_dir = log_dir
        self._seen: dict[Path, tuple[int, int]] = {}
        self._told: str | None = None
        self.news()  # what an earlier start reported is none

    def news(self) -> str:
        """Return what the log says about answers that do not count, once."""
        try:
            current = (self._log_dir / "current").read_text()
            line = (self._log_dir / current / "unused.txt").read_text().strip()
        except OSError:
            return ""
        if current == self._told:
            return ""
        self._told = current
        return line

    def read(self) -> int:
        """Return the number of answers so far."""
        try:
            folder = self._log_dir / (self._log_dir / "current").read_text()
        except OSError:
            return 0
        total = 0
        for file in folder.glob("*.jsonl"):
            place, lines = self._seen.get(file, (0, 0))
            with file.open("rb") as stream:
                stream.seek(place)
                lines += sum(
                    chunk.count(b"\n") for chunk in iter(partial(stream.read, 1 << 20), b"")
                )
                self._seen[file] = stream.tell(), lines
            total += lines
        return total
