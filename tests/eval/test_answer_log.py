"""The log of answers: what a damaged line stands for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava_todre.errors import TodreError
from llava_todre.lmms_plugin.answer_log import AnswerLog, read_answers

LINE = {
    "task": "gqa",
    "split": "test",
    "doc_id": 0,
    "repeat": 0,
    "batch": "abc",
    "prompt": "What is it?",
    "answer": "a cat",
    "withdrawn_from": None,
    "visual_tokens": 320,
    "kept_tokens": 32,
    "mean_visual_tokens_per_layer": 35.5,
    "prefill_flops": 1e9,
    "prefill_flops_unpruned": 4e9,
    "seconds": 0.25,
    "peak_memory_mib": 100.0,
}


def damaged() -> dict[str, str]:
    whole = json.dumps(LINE)
    found = {"null": "null", "keys": "{}", "list": "[1]", "text": '"x"', "cut": whole[:-9]}
    found["nested"] = "[" * 5_000
    for key in LINE:
        found[f"no {key}"] = json.dumps({k: v for k, v in LINE.items() if k != key})
    changes: dict[str, Any] = {"answer": None, "doc_id": "0", "seconds": None, "batch": 3}
    for key, value in changes.items():
        found[f"{key} {value}"] = json.dumps(LINE | {key: value})
    return found


@pytest.mark.parametrize("kind", damaged())
def test_a_damaged_line_is_as_if_it_were_not_there(kind: str, tmp_path: Path) -> None:
    """Its item is then answered again, and the new line counts."""
    log = AnswerLog(tmp_path, "name", 0, {})
    log.append([LINE])
    (file,) = (tmp_path / "name").glob("*.jsonl")
    file.write_text(f"{damaged()[kind]}\n{json.dumps(LINE | {'doc_id': 1})}\n")
    again = AnswerLog(tmp_path, "name", 0, {})
    assert [doc_id for _, doc_id, _ in again.finished("gqa", "test")] == [1]
    again.append([LINE])
    assert [line["doc_id"] for line in read_answers(tmp_path)] == [0, 1]


def test_reading_a_log_takes_the_latest_run_and_each_item_once(tmp_path: Path) -> None:
    old, new = AnswerLog(tmp_path, "old", 0, {}), AnswerLog(tmp_path, "new", 0, {})
    old.append([LINE | {"answer": "old"}])
    new.append([LINE | {"doc_id": 1, "answer": "first"}, LINE | {"answer": "zero"}])
    new.append([LINE | {"doc_id": 1, "batch": "c", "answer": "second"}])
    assert [entry["answer"] for entry in read_answers(tmp_path)] == ["zero", "second"]
    with pytest.raises(TodreError, match="log_dir .* holds no log"):
        read_answers(tmp_path / "elsewhere")
