"""Submissions of VQAv2: padded to all questions that EvalAI knows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eval.__main__ import main
from eval.results import submissions
from eval.results.submissions import (
    complete_submissions,
    pad,
    questions_of_data_set,
    questions_of_file,
)
from eval.run.suites import load_suite
from llava_todre import TodreError

ANSWERS = [{"question_id": 11, "answer": "yes"}, {"question_id": 13, "answer": "2"}]
KNOWN = [10, 11, 12, 13]


@pytest.fixture
def sent(tmp_path: Path) -> Path:
    file = tmp_path / "vqav2-test-submission-2026.json"
    file.write_text(json.dumps(ANSWERS))
    return file


def test_the_suite_demands_what_evalai_does() -> None:
    """447,793 questions of test2015, 107,394 of which are test-dev."""
    (mark,) = [mark for mark in load_suite("image").benchmarks if mark.key == "vqav2"]
    assert mark.submission_entries == submissions.ENTRIES == 447_793
    assert sum(mark.samples.values()) == 107_394


def test_every_question_has_an_entry_and_answers_stay(sent: Path) -> None:
    padded = pad(sent, KNOWN, entries=4)
    assert padded.name == "vqav2-test-submission-2026-padded.json"
    found = json.loads(padded.read_text())
    assert [entry["question_id"] for entry in found] == KNOWN
    assert [entry["answer"] for entry in found] == ["", "yes", "", "2"]
    assert json.loads(sent.read_text()) == ANSWERS


@pytest.mark.parametrize(
    ("content", "known", "message"),
    [
        (ANSWERS, KNOWN[:3], "3 questions are known, the server wants 4"),
        (ANSWERS, [1, 2, 3, 11], "answers 1 questions that are not of this set, 13 for one"),
        ([*ANSWERS, ANSWERS[0]], KNOWN, "answers a question twice"),
        ([{"question_id": "11", "answer": "yes"}], KNOWN, "must list question_id and answer"),
        ({"11": "yes"}, KNOWN, "must list question_id and answer"),
    ],
)
def test_what_cannot_be_padded_is_one_line(
    content: Any, known: list[int], message: str, sent: Path
) -> None:
    sent.write_text(json.dumps(content))
    with pytest.raises(TodreError, match=message):
        pad(sent, known, entries=4)
    assert list(sent.parent.iterdir()) == [sent]


def test_a_file_that_is_not_there_is_called_what_it_is(tmp_path: Path) -> None:
    file = tmp_path / "none.json"
    with pytest.raises(TodreError, match=r"^submission '.*none.json' cannot be read"):
        pad(file, KNOWN, entries=4)
    with pytest.raises(TodreError, match=r"^questions '.*none.json' cannot be read"):
        questions_of_file(file)


def test_questions_come_from_vqas_own_file_or_a_list(tmp_path: Path) -> None:
    file = tmp_path / "questions.json"
    for content in ({"questions": [{"question_id": 1, "image_id": 5}]}, [1], [{"question_id": 1}]):
        file.write_text(json.dumps(content))
        assert questions_of_file(file) == [1]
    for wrong in ("3", "{}", "[]", '["a"]', '{"questions": 3}'):
        file.write_text(wrong)
        with pytest.raises(TodreError, match="must be v2_OpenEnded_mscoco_test2015_questions"):
            questions_of_file(file)


def test_the_data_set_is_asked_offline_and_only_if_it_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here: as a folder named like the hub's, as lmms-eval finds it too."""
    pytest.importorskip("datasets")
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    folder = tmp_path / submissions.DATA_SET / "data"
    folder.mkdir(parents=True)
    table = pyarrow.table({"question_id": KNOWN, "image": [b"x"] * 4})
    parquet.write_table(table, folder / "test-00000-of-00001.parquet")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf_home"))
    monkeypatch.chdir(tmp_path)
    assert questions_of_data_set() == KNOWN
    monkeypatch.setattr(submissions, "_READ_IDS", "raise SystemExit(1)")
    with pytest.raises(TodreError, match="of lmms-lab-encoder/VQAv2 is not on this machine"):
        questions_of_data_set()


def test_a_run_pads_by_itself_or_says_how(sent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marks = [mark for mark in load_suite("image").benchmarks if mark.submission]
    marks = [replace(m, submission_entries=m.submission_entries and 4) for m in marks]

    def stored() -> dict[str, Any]:
        notes = {"submission": str(sent), "note": "send it"}
        return {"vqav2": dict(notes), "vizwiz": dict(notes)}

    monkeypatch.setattr(submissions, "questions_of_data_set", lambda: KNOWN)
    found = stored()
    complete_submissions(marks, found)
    assert found["vizwiz"] == stored()["vizwiz"]
    assert found["vqav2"]["submission"].endswith("-padded.json")
    assert found["vqav2"]["note"] == "send it; padded with empty answers to the 4 of test2015"
    monkeypatch.setattr(submissions, "questions_of_data_set", lambda: KNOWN[:2])
    found = stored()
    complete_submissions(marks, found)
    assert found["vqav2"]["submission"] == str(sent)
    assert f"python -m eval pad-submission {sent} --questions FILE" in found["vqav2"]["note"]


def test_the_command_pads_an_older_submission(
    sent: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = sent.with_name("questions.json")
    questions.write_text(json.dumps({"questions": [{"question_id": each} for each in KNOWN]}))
    assert main(["pad-submission", str(sent), "--questions", str(questions)]) == 1
    assert "4 questions are known, the server wants 447,793" in capsys.readouterr().err
    questions.write_text(json.dumps([11, 13, *range(20, 20 + submissions.ENTRIES - 2)]))
    assert main(["pad-submission", str(sent), "--questions", str(questions)]) == 0
    assert "-padded.json" in capsys.readouterr().err
