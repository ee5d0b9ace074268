"""The bundled model's tasks: the data, and lmms-eval's own run on it from a strange folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("lmms_eval")

import datasets

from eval.mini import TASKS, TEST_SEED, held_out
from eval.mini import data as mini_data
from eval.run.scoring import scores
from eval.run.suites import ROOT, load_suite, prepare
from llava_todre.errors import TodreError
from llava_todre.model.checkpoint import bundled_checkpoint
from llava_todre.model.load import load_pretrained_model
from llava_todre.vlm import Request, answer

NUM_IMAGES = 3


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the task files, with data of their own."""
    folder = tmp_path_factory.mktemp("mini") / "tasks"
    shutil.copytree(ROOT / "configs" / "tasks", folder, ignore=shutil.ignore_patterns("data"))
    mini_data.prepare(folder / "mini" / "data", NUM_IMAGES)
    return folder


@pytest.fixture(scope="module")
def run(tasks: Path) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Results and samples of lmms-eval on the group of all nine tasks, from another folder."""
    out = tasks.parent / "out"
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
    environment = {**os.environ, **offline, "HF_HOME": str(out / "hf"), "OMP_NUM_THREADS": "1"}
    model = f"pretrained={bundled_checkpoint()},method=vanilla"
    command = [sys.executable, "-m", "lmms_eval", "--model", "llava_todre", "--model_args", model]
    command += ["--tasks", "todre_mini", "--include_path", str(tasks), "--batch_size", "1"]
    command += ["--output_path", str(out), "--log_samples"]
    done = subprocess.run(
        command, cwd=tasks.parent, env=environment, capture_output=True, text=True, timeout=600
    )
    found = list(out.rglob("*_results.json"))
    assert len(found) == 1, done.stdout[-3000:] + done.stderr[-3000:]
    samples = {
        f"todre_mini_{task}": [
            json.loads(line)
            for line in next(out.rglob(f"*_samples_todre_mini_{task}.jsonl")).open()
        ]
        for task in TASKS
    }
    return json.loads(found[0].read_text()), samples


def test_data_holds_the_pictures_and_questions_of_the_demo(tasks: Path) -> None:
    file = tasks / "mini" / "data" / "mini.parquet"
    table = datasets.Dataset.from_parquet(str(file), cache_dir=str(tasks.parent / "cache"))
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


def test_lmms_eval_gives_the_answers_and_the_accuracy_of_the_library(run: Any) -> None:
    results, samples = run
    tokenizer, model, _, _ = load_pretrained_model(bundled_checkpoint())
    pictures = held_out(NUM_IMAGES)
    scored = scores(load_suite("mini"), results, samples)
    assert tuple(scored) == TASKS
    right = 0
    for place, task in enumerate(TASKS):
        questions = [(picture.image, picture.questions[place]) for picture in pictures]
        requests = [Request(question.text, [image]) for image, question in questions]
        given = [answer(model, tokenizer, [one], max_new_tokens=8)[0].text for one in requests]
        records = sorted(samples[f"todre_mini_{task}"], key=lambda record: record["doc_id"])
        assert [record["filtered_resps"] for record in records] == given
        hits = [
            float(text.strip().lower() == question.answer.lower())
            for text, (_, question) in zip(given, questions, strict=True)
        ]
        assert scored[task]["items"] == [[number, hit] for number, hit in enumerate(hits)]
        assert scored[task]["score"] == pytest.approx(100 * sum(hits) / NUM_IMAGES)
        assert scored[task]["num_samples"] == NUM_IMAGES
        right += sum(hits)
    assert right > 0.5 * NUM_IMAGES * len(TASKS)
    group = results["results"]["todre_mini"]["exact_match,none"]
    assert group == pytest.approx(right / NUM_IMAGES / len(TASKS))
