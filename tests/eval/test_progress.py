"""The line of progress: what the logs of runs tell while they are written."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from eval.run import progress
from eval.run.progress import Progress


def start(log: Path, name: str, answers: int, unused: str = "") -> None:
    (log / name).mkdir(parents=True)
    (log / name / "task.rank0.jsonl").write_text("{}\n" * answers)
    if unused:
        (log / name / "unused.txt").write_text(f"{unused}\n")
    (log / "current").write_text(name)


def test_answers_that_are_not_used_are_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_COUNT_SECONDS", 0.0)
    runs: Any = [SimpleNamespace(name="run", expected={"task": 192})]
    start(tmp_path / "run", "first", 100)
    start(tmp_path / "run", "second", 120, "100 answers are not used, for an old reason")
    with Progress(runs, tmp_path) as shown:
        shown.count(["run"])
        assert "not used" not in capsys.readouterr().err, "told by an earlier start"
        start(tmp_path / "run", "third", 2, "120 answers are not used, for a reason")
        shown.count(["run"])
        shown.count(["run"])
        assert capsys.readouterr().err.count("run: 120 answers are not used, for a reason") == 1
        assert shown._bar.n == 2, "and the line goes back"
