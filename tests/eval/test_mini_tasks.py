"""The bundled model's tasks: their data and files; lmms-eval runs them in ``test_fixtures``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

pytest.importorskip("lmms_eval")

import datasets

from eval.mini import TASKS, TEST_SEED, held_out
from eval.mini import data as mini_data
from eval.run.suites import ROOT, load_suite, prepare
from llava_todre.errors import TodreError

NUM_IMAGES = 3


def test_data_holds_the_pictures_and_questions_of_the_demo(tmp_path: Path) -> None:
    file = mini_data.prepare(tmp_path / "data", NUM_IMAGES)
    table = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "cache"))
    expected = held_out(NUM_IMAGES, TEST_SEED)
    assert len(table) == NUM_IMAGES
    for row, sample in zip(table, expected, strict=True):
        assert row["image"].tobytes() == sample.image.tobytes()
        for question in sample.questions:
            asked = row[f"{question.task}_question"], row[f"{question.task}_answer"]
            assert asked == (question.text, question.answer)


def test_data_is_made_once_and_again_when_it_is_not_what_is_wanted(tmp_path: Path) -> None:
    file = mini_data.prepare(tmp_path, 1)
    before = file.read_bytes(), file.stat().st_mtime_ns
    assert mini_data.prepare(tmp_path, 1) == file
    assert (file.read_bytes(), file.stat().st_mtime_ns) == before
    mini_data.prepare(tmp_path, 2)
    assert len(file.read_bytes()) > len(before[0])
    (tmp_path / "mini.json").write_text("of another version")
    file.write_bytes(b"stale")
    mini_data.prepare(tmp_path, 1)
    assert file.read_bytes() == before[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mini.json", "mini.parquet"]


@pytest.mark.parametrize("moment", ["first write", "first rename", "second rename"])
def test_a_stop_at_any_moment_leaves_nothing_that_passes_for_finished(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, renamed = os.replace, []

    def write(file: Path, num_images: int) -> None:
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    def replace(source: Path, target: Path) -> None:
        if len(renamed) == (moment == "second rename"):
            raise KeyboardInterrupt
        renamed.append(target)
        rename(source, target)

    one = mini_data.prepare(tmp_path, 1).read_bytes()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if moment == "first write":
            patch.setattr(mini_data, "_write", write)
        patch.setattr(mini_data.os, "replace", replace)
        mini_data.prepare(tmp_path, 2)
    assert bool(renamed) == (moment == "second rename")
    # Readers never see half a file, and the first size is made again where it is gone.
    assert ((tmp_path / "mini.parquet").read_bytes() == one) != bool(renamed)
    assert mini_data.prepare(tmp_path, 1).read_bytes() == one
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mini.json", "mini.parquet"]


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(TodreError, match="num_images 0 is out of range"):
        mini_data.prepare(tmp_path, 0)
    (tmp_path / "file").write_text("")
    with pytest.raises(TodreError, match="folder '.*file' cannot be written"):
        mini_data.prepare(tmp_path / "file", 1)


def test_the_suite_prepares_its_data(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr(mini_data, "prepare", lambda: called.append("made"))
    prepare(load_suite("image"))
    assert not called
    prepare(load_suite("mini"))
    assert called == ["made"]


def test_task_files_suite_and_data_agree() -> None:
    folder = ROOT / "configs" / "tasks" / "mini"
    group = yaml.safe_load((folder / "todre_mini.yaml").read_text())
    assert tuple(group["task"]) == load_suite("mini").tasks
    for task in TASKS:
        content = yaml.safe_load((folder / f"{task}.yaml").read_text())
        assert content["task"] == f"todre_mini_{task}"
        columns = content["doc_to_text"], content["doc_to_target"]
        assert columns == (f"{task}_question", f"{task}_answer")
    assert set(load_suite("mini").benchmarks[0].samples.values()) == {mini_data.NUM_IMAGES}
