"""A result counts only for the suite that it was made with; its answers outlive an edit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from eval.mini import data as mini_data
from eval.results.files import load_runs
from eval.run import launch, suites
from eval.run.commands import _tell
from eval.run.launch import Report, execute
from eval.run.processes import Launch
from eval.run.spec import ROOT, Run, resolve
from eval.run.suite_digest import suite_digest
from eval.run.suites import load_suite

FAKE = Path(__file__).with_name("fake_lmms_eval.py")


@pytest.fixture(autouse=True)
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A checkout of suites and task files to edit; its folder."""
    for name in ("suites", "tasks"):
        skipped = shutil.ignore_patterns("data", "__pycache__")
        shutil.copytree(ROOT / "configs" / name, tmp_path / "configs" / name, ignore=skipped)
    monkeypatch.setattr(suites, "ROOT", tmp_path)
    monkeypatch.setattr(suites, "SUITES", tmp_path / "configs" / "suites")
    monkeypatch.setattr(launch, "prepare", lambda suite: None)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    load_suite.cache_clear()
    yield tmp_path / "configs"
    load_suite.cache_clear()


def edit(file: Path, old: str, new: str) -> None:
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))
    load_suite.cache_clear()


def run() -> Run:
    return resolve({"model": "mini", "suite": "mini", "method": "todre", "limit": 2})


EDITS = {
    "factor": ("suites/mini.yaml", "factor: 100", "factor: 10"),
    "scale": ("suites/mini.yaml", "scale: percent", "scale: points"),
    "item_metric": ("suites/mini.yaml", "item_metric: exact_match", "item_metric: null"),
    "number of items": ("suites/mini.yaml", "todre_mini_where: 96", "todre_mini_where: 95"),
    "task file": ("tasks/mini/exist.yaml", "task: todre_mini_exist", "task: todre_mini_exist #"),
    "what tasks share": ("tasks/mini/_template_yaml", "ignore_case: true", "ignore_case: false"),
}


@pytest.mark.parametrize("kind", EDITS)
def test_an_edit_that_can_change_a_score_changes_the_digest(kind: str, copies: Path) -> None:
    before = run()
    name, digest = before.name, before.suite_digest
    file, old, new = EDITS[kind]
    edit(copies / file, old, new)
    assert run().suite_digest != digest
    assert run().name == name, "the log of answers is found again"


def test_how_tasks_are_combined_is_in_the_digest(copies: Path) -> None:
    before = suite_digest(load_suite("ablation"))
    edit(copies / "suites" / "image.yaml", "combine: mean", "combine: weighted")
    assert suite_digest(load_suite("ablation")) != before


def test_functions_of_a_task_are_in_the_digest_and_other_tasks_are_not(copies: Path) -> None:
    def digests() -> list[str]:
        return [suite_digest(load_suite(name)) for name in ("video_local", "mini", "image")]

    before = digests()
    edit(copies / "tasks" / "egoschema" / "utils.py", "import", "import sys, ")
    assert [a != b for a, b in zip(before, digests(), strict=True)] == [True, False, False]


def test_remarks_and_drawn_data_leave_the_digest_alone(copies: Path) -> None:
    before = run().suite_digest
    edit(copies / "suites" / "mini.yaml", "note: null", "note: on a Sunday")
    (copies / "tasks" / "mini" / "data").mkdir()
    (copies / "tasks" / "mini" / "data" / "mini.parquet").write_text("")
    assert run().suite_digest == before


def test_how_data_is_drawn_is_in_the_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    before = run().suite_digest
    monkeypatch.setattr(mini_data, "TEST_SEED", 7)
    assert run().suite_digest != before


@pytest.fixture
def carry_out(tmp_path: Path) -> Callable[..., tuple[dict[str, Any], Report]]:
    """Carry out the run; returns its stored result, and the report."""

    def once(*fault: str, **how: Any) -> tuple[dict[str, Any], Report]:
        plan = Launch(tmp_path / "out", program=(str(FAKE), *fault), **how)
        report = execute([run()], plan)
        return json.loads(plan.file(run()).read_text()), report

    return once


def test_a_suite_edited_after_a_run_is_run_again_with_the_answers_that_are_there(
    copies: Path, carry_out: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, report = carry_out()
    assert carry_out("--fault", "raises")[1].done == report.done, "nothing was done again"
    edit(copies / "suites" / "mini.yaml", "factor: 100", "factor: 10")
    second, report = carry_out("--fault", "raises")  # asked for an answer, it would fail
    for key, mark in second["benchmarks"].items():
        assert mark["score"] == pytest.approx(first["benchmarks"][key]["score"] / 10)
    (old,) = (tmp_path / "out" / "superseded").glob("*.json")
    assert json.loads(old.read_text()) == first, "nothing is lost"
    assert report.superseded == report.done == [first["name"]] and not report.failed
    assert _tell(report, Launch(tmp_path / "out")) == 0
    assert "1 results were of a suite that was edited since" in capsys.readouterr().err
    assert carry_out("--fault", "raises")[1].superseded == []


def test_scores_of_a_server_go_with_the_result_that_they_are_of(
    copies: Path, carry_out: Callable[..., Any], tmp_path: Path
) -> None:
    first, _ = carry_out()
    beside = tmp_path / "out" / f"{first['name']}.server.json"
    said = {"what": "x", "run": first["name"], "run_time_utc": "before", "benchmarks": {}}
    beside.write_text(json.dumps(said))
    edit(copies / "suites" / "mini.yaml", "factor: 100", "factor: 10")
    carry_out("--fault", "raises")
    assert len(load_runs([tmp_path / "out"])) == 1, "what stood beside the old one is in no way"
    assert len([*(tmp_path / "out" / "superseded").glob("*.server.json")]) == 1


def test_a_result_that_does_not_tell_its_suite_stays_and_that_is_told(
    carry_out: Callable[..., Any], tmp_path: Path
) -> None:
    record, _ = carry_out()
    del record["suite_digest"]
    (tmp_path / "out" / f"{record['name']}.json").write_text(json.dumps(record))
    again, report = carry_out()
    assert again == record and not report.superseded
    assert report.undated == [record["name"]]


def test_a_failure_of_a_suite_as_it_was_is_no_failure_of_it_now(
    copies: Path, carry_out: Callable[..., Any]
) -> None:
    assert carry_out("--fault", "few")[1].failed
    assert carry_out()[1].failed_before
    edit(copies / "suites" / "mini.yaml", "factor: 100", "factor: 10")
    record, report = carry_out()
    assert record["status"] == "complete" and not report.superseded


def test_results_of_another_lmms_eval_are_told(
    carry_out: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record, _ = carry_out()
    record["versions"]["lmms_eval"] = "0.1.0"
    (tmp_path / "out" / f"{record['name']}.json").write_text(json.dumps(record))
    _, report = carry_out("--fault", "raises")
    assert _tell(report, Launch(tmp_path / "out")) == 0
    assert "some results are of lmms-eval 0.1.0; here is " in capsys.readouterr().err


def test_stored_results_are_of_the_suite_as_it_is() -> None:
    stored = [
        json.loads(f.read_text()) for f in (ROOT / "docs/results/reproduce_mini").glob("*.json")
    ]
    digests = {record["suite_digest"] for record in stored if "suite_digest" in record}
    assert digests == {suite_digest(load_suite("mini"))}
