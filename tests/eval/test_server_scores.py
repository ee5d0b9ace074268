"""Scores that servers gave: entered beside a run, with their source, and shown as what they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval.__main__ import main
from eval.results.files import load_runs, read_run
from eval.results.server_scores import WAITING, server_file
from llava_todre import TodreError

SOURCE = "EvalAI submission 123, 2026-11-28, https://eval.ai/web/challenges/challenge-page/523"


def benchmark(score: float | None, **changes: Any) -> dict[str, Any]:
    status = "submission" if score is None else "complete"
    stored = {"task": "a", "scale": "percent", "num_samples": 8000, "note": None, "items": None}
    return stored | {"status": status, "score": score, "submission": "x.json"} | changes


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    file = tmp_path / "run.json"
    run = {
        "format": 1,
        "name": "vanilla-image",
        "status": "complete",
        "error": None,
        "time_utc": "2026-11-20T10:00:00+00:00",
        "config": {
            "model": {"key": "llava_next_7b"},
            "method": "vanilla",
            "options": {},
            "suite": "image",
        },
        "benchmarks": {
            "gqa": benchmark(64.2),
            "vizwiz": benchmark(None, note=f"a: 3 empty answers; {WAITING}"),
            "vqav2": benchmark(None, note=WAITING),
            "mme": benchmark(None, scale="points"),
        },
    }
    file.write_text(json.dumps(run))
    return file


def enter(file: Path, key: str, score: object, source: str = SOURCE, *more: str) -> int:
    given = ["--benchmark", key, "--score", str(score), "--source", source, *more]
    return main(["score-from-server", str(file), *given])


def test_an_entered_score_is_joined_and_the_run_is_not_edited(stored: Path) -> None:
    before = stored.read_bytes()
    assert enter(stored, "vizwiz", 54.3) == 0 and enter(stored, "vqav2", "80.1") == 0
    assert stored.read_bytes() == before
    (loaded,) = load_runs([stored.parent])
    assert loaded == read_run(stored)
    vizwiz, vqav2 = (loaded["benchmarks"][key] for key in ("vizwiz", "vqav2"))
    assert (vizwiz["status"], vizwiz["score"], vizwiz["num_samples"]) == ("complete", 54.3, 8000)
    assert vizwiz["provenance"]["source"] == SOURCE
    assert vizwiz["note"].startswith(f"a: 3 empty answers; score from a server ({SOURCE}), entered")
    assert vqav2["score"] == 80.1 and WAITING not in vqav2["note"]
    assert loaded["benchmarks"]["mme"]["status"] == "submission"


def test_table_1_has_its_average_then(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def cell() -> str:
        assert main(["table", "1", "--results", str(stored.parent), "--format", "csv"]) == 0
        header, *lines = [line.split(",") for line in capsys.readouterr().out.splitlines()]
        row = next(line for line in lines if line[:2] == ["llava_next_7b", "vanilla"])
        return f"{row[header.index('vizwiz ours')]} {row[header.index('average ours')]}"

    assert cell() == "server 100.0 (1 of 8)"
    enter(stored, "vizwiz", 60.6)
    capsys.readouterr()
    assert cell() == "60.6 100.0 (2 of 8)"
    assert main(["table", "1", "--results", str(stored.parent)]) == 0
    assert "score from a server (EvalAI submission 123" in capsys.readouterr().out.replace(
        "\n", " "
    )


@pytest.mark.parametrize(
    ("key", "score", "source", "message"),
    [
        (
            "vizwz",
            54.3,
            SOURCE,
            "'vizwz' is unknown. Did you mean 'vizwiz'? Allowed: mme, vizwiz",
        ),
        ("gqa", 54.3, SOURCE, "submission 'gqa' is unknown"),
        ("vizwiz", 154.3, SOURCE, "score must be between 0 and 100, got 154.3"),
        ("vizwiz", -1, SOURCE, "score must be between 0 and 100, got -1.0"),
        ("vizwiz", "nan", SOURCE, "score must be between 0 and 100, got nan"),
        ("mme", 2801, SOURCE, "score must be between 0 and 2800"),
        ("vizwiz", 54.3, " ", "source must say which server gave the score"),
    ],
)
def test_a_wrong_entry_is_refused_and_writes_nothing(
    key: str,
    score: object,
    source: str,
    message: str,
    stored: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert enter(stored, key, score, source) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not server_file(stored).exists()


def test_a_score_is_replaced_only_on_demand(
    stored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    enter(stored, "vizwiz", 54.3)
    capsys.readouterr()
    assert enter(stored, "vizwiz", 55.0) == 1
    assert "has a score already, 54.3 (EvalAI" in capsys.readouterr().err
    assert enter(stored, "vizwiz", 55.0, SOURCE, "--replace") == 0
    assert read_run(stored)["benchmarks"]["vizwiz"]["score"] == 55.0


def test_a_score_of_another_run_is_not_taken_for_this_one(stored: Path) -> None:
    """The run was repeated, or the file was copied beside another."""
    enter(stored, "vizwiz", 54.3)
    repeated = json.loads(stored.read_text()) | {"time_utc": "2026-11-27T10:00:00+00:00"}
    stored.write_text(json.dumps(repeated))
    with pytest.raises(TodreError, match="is about another run than"):
        read_run(stored)


@pytest.mark.parametrize("content", ["{", "[]", "null", '{"run": 3}', '{"what": "", "run": "x"}'])
def test_a_damaged_file_beside_a_run_is_one_line(content: str, stored: Path) -> None:
    server_file(stored).write_text(content)
    for read in (read_run, lambda file: load_runs([file.parent])):
        with pytest.raises(TodreError, match=r"run.server.json'") as caught:
            read(stored)
        assert "\n" not in str(caught.value)
