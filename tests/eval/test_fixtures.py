"""lmms-eval's task code of all twelve benchmarks, offline, on small data with the real schema.

Twice, by one process, which is this file run as a script: the bundled model answers through our
plug-in, as in earnest; it was trained on other wording, so most answers are wrong. And an oracle
answers all but the first item of every task right, so that every score is known beforehand.

The bundled model's own tasks are asked along; there the library must give the same answers.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from eval.mini import TASKS as MINI_TASKS
from eval.mini import data as mini_data
from eval.mini import held_out
from eval.mini.fixtures import HF_HOME, NUM_SCENES, make_fixtures
from eval.run.scoring import scores
from eval.run.suites import ROOT, load_suite
from llava_todre.model.checkpoint import bundled_checkpoint
from llava_todre.model.load import load_pretrained_model
from llava_todre.vlm import Request, answer

for package in ("lmms_eval", "datasets", "av", "cv2", "pandas", "openpyxl"):
    pytest.importorskip(package)

OFFLINE = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
TASKS = ROOT / "configs" / "tasks"
SUITES = ("image", "image_local", "video", "video_local")
NUM_IMAGES = 3
"""Of the bundled model's own tasks."""
METHOD = {"method": "todre", "retain_ratio": 0.5}
SIZES = {
    **{
        "mme": 8,
        "mme_total": 8,
        "scienceqa": 6,
        "gqa": 8,
        "pope": 12,
        "mmbench_en": 10,
        "mmbench_cn": 10,
    },
    **{"vizwiz": 4, "vqav2": 4, "videomme": 6, "egoschema": 4, "mlvu": 7, "longvideobench": 4},
}
Records = list[dict[str, Any]]


@pytest.fixture(scope="module")
def fixtures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fixtures(tmp_path_factory.mktemp("fixtures"))


class Finished:
    """What one lmms-eval left behind."""

    def __init__(self, out: Path, printed: str) -> None:
        found = [path for path in out.glob("*/*_results.json") if path.parent.name != "submissions"]
        assert len(found) == 1, printed[-3000:]
        self.out, self.printed = out, printed
        self.results = json.loads(found[0].read_text())
        self.samples: dict[str, Records] = {}
        for path in found[0].parent.glob("*_samples_*.jsonl"):
            lines = path.read_text().splitlines()
            records = sorted(map(json.loads, lines), key=lambda record: record["doc_id"])
            self.samples[path.stem.partition("_samples_")[2]] = records

    def answers(self, task: str) -> list[str]:
        return [record["filtered_resps"] for record in self.samples[task]]

    def targets(self, task: str) -> list[str]:
        return [record["target"] for record in self.samples[task]]


@pytest.fixture(scope="module")
def runs(fixtures: Path) -> Finished:
    """One lmms-eval for everything, in a folder without a checkout; then the oracle."""
    include, out = fixtures / "tasks", fixtures / "out"
    shutil.copytree(TASKS, include, ignore=shutil.ignore_patterns("data"))
    mini_data.prepare(include / "mini" / "data", NUM_IMAGES)
    tasks = dict.fromkeys(task for name in SUITES for task in load_suite(name).tasks)
    options = {"pretrained": bundled_checkpoint(), "max_frames": 5, **METHOD}
    command = ["--model", "llava_todre"]
    command += ["--model_args", ",".join(f"{key}={value}" for key, value in options.items())]
    command += ["--tasks", ",".join([*tasks, "todre_mini"]), "--include_path", str(include)]
    command += ["--output_path", str(out), "--log_samples"]
    command += ["--gen_kwargs", "max_new_tokens=8", "--batch_size", "4"]
    environment = {"HF_HOME": str(fixtures / HF_HOME), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, str(fixtures / "oracle.json"), *command],
        cwd=fixtures,
        env={**os.environ, **OFFLINE, **environment, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    return Finished(out, done.stdout)


@pytest.fixture(scope="module")
def scored(runs: Finished) -> dict[str, dict[str, Any]]:
    """Scores per suite."""
    return {name: scores(load_suite(name), runs.results, runs.samples, runs.out) for name in SUITES}


# ------------------------------------------------------------------------- the data sets


def test_equal_calls_write_equal_bytes(fixtures: Path, tmp_path: Path) -> None:
    make_fixtures(tmp_path)
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 40
    for file in files:
        assert (tmp_path / file).read_bytes() == (fixtures / file).read_bytes(), file


# ------------------------------------------------------------------------- all twelve run


def test_every_benchmark_runs_on_all_its_items(scored: Any, runs: Any) -> None:
    assert set(scored["image"]) | set(scored["video"]) == set(SIZES)
    for suite in scored.values():
        for key, found in suite.items():
            assert found["num_samples"] == SIZES[key], key
    assert "Traceback" not in runs.printed


def test_every_benchmark_has_a_number_where_no_server_is_needed(scored: Any) -> None:
    for name in ("image_local", "video_local"):
        for key, found in scored[name].items():
            assert found["status"] == "complete", key
            assert 0 <= found["score"] <= (2800 if found["scale"] == "points" else 100), key
            assert found["submission"] is None
            assert "items on this machine" in found["note"]
    assert any(found["score"] > 0 for found in scored["image_local"].values())
    assert any(found["score"] > 0 for found in scored["video_local"].values())


def test_scores_of_a_mean_are_the_mean_of_their_items(scored: Any) -> None:
    everything = {**scored["image_local"], **scored["video_local"]}
    for key in ("scienceqa", "gqa", "mmbench_en", "mmbench_cn", "vizwiz", "vqav2", "videomme"):
        items = [score for _, score in everything[key]["items"]]
        assert everything[key]["score"] == pytest.approx(100 * sum(items) / len(items)), key
    for key in ("egoschema", "longvideobench"):
        items = [score for _, score in everything[key]["items"]]
        assert everything[key]["score"] == pytest.approx(100 * sum(items) / len(items)), key
    assert len(everything["mmbench_en"]["items"]) == NUM_SCENES
    assert len(everything["mme"]["items"]) == 6  # of perception


def test_the_library_gives_the_same_answers_to_the_models_own_tasks(runs: Finished) -> None:
    tokenizer, model, _, _ = load_pretrained_model(bundled_checkpoint())
    model.set_pruner(**METHOD)
    pictures = held_out(NUM_IMAGES)
    found = scores(load_suite("mini"), runs.results, runs.samples)
    assert tuple(found) == MINI_TASKS
    right = 0
    for place, task in enumerate(MINI_TASKS):
        questions = [(picture.image, picture.questions[place]) for picture in pictures]
        requests = [Request(question.text, [image]) for image, question in questions]
        given = [answer(model, tokenizer, [one], max_new_tokens=8)[0].text for one in requests]
        assert runs.answers(f"todre_mini_{task}") == given
        hits = [
            float(text.strip().lower() == question.answer.lower())
            for text, (_, question) in zip(given, questions, strict=True)
        ]
        assert found[task]["items"] == [[number, hit] for number, hit in enumerate(hits)]
        assert found[task]["score"] == pytest.approx(100 * sum(hits) / NUM_IMAGES)
        assert found[task]["num_samples"] == NUM_IMAGES
        right += sum(hits)
    assert right > 0.5 * NUM_IMAGES * len(MINI_TASKS)
    group = runs.results["results"]["todre_mini"]["exact_match,none"]
    assert group == pytest.approx(right / NUM_IMAGES / len(MINI_TASKS))


# ------------------------------------------------------------------------- known beforehand


def test_scores_of_known_answers_are_what_the_papers_would_print(
    fixtures: Path, runs: Finished
) -> None:
    assert (fixtures / "oracle.json").is_file(), runs.printed[-3000:]
    known = json.loads((fixtures / "oracle.json").read_text())
    found = {}
    for name in ("image_local", "video_local"):
        found |= scores(load_suite(name), known, known["samples"])
    assert {key: round(one["score"], 2) for key, one in found.items()} == {
        "mme": 50 + 200 + 200,  # three categories of perception, in the first a pair half right
        "mme_total": 50 + 200 + 200 + 200,  # and one of cognition
        "scienceqa": 66.67,  # 3 of 4 and 1 of 2 are 4 of 6
        "gqa": 87.5,
        "pope": 66.67,  # in each of the three parts: precision 1, recall 1/2
        "mmbench_en": 75.0,  # one question in four, for one of its rotations
        "mmbench_cn": 75.0,
        "vizwiz": 75.0,
        "vqav2": 75.0,
        "videomme": 83.33,
        "egoschema": 75.0,
        "mlvu": 85.71,
        "longvideobench": 75.0,
    }
    assert found.pop("mme_total")["items"] is None
    for key, one in found.items():
        wrong = [number for number, score in one["items"] if score < 1]
        assert wrong == {"scienceqa": [0, 4], "pope": [0, 4, 8]}.get(key, [0]), key


def _oracle(out: Path) -> None:
    """Run lmms-eval with a model that knows the answers; write results and samples to ``out``."""
    from lmms_eval.api.model import lmms
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    def right(task: str, doc: dict[str, Any]) -> str:
        if "vqa" in task:
            first = doc["answers"][0]
            return first if isinstance(first, str) else first["answer"]
        place = doc["correct_choice"] if "longvideobench" in task else doc["answer"]
        return "ABCDE"[int(place)] if str(place).isdigit() else place

    def wrong(answer: str) -> str:
        return {"yes": "no", "a": "B"}.get(answer.lower(), "A" if len(answer) == 1 else "nothing")

    class Oracle(lmms):
        is_simple = True

        def generate_until(self, requests: list[Any]) -> list[str]:
            answers = []
            for _, _, _, number, task, split in (request.args for request in requests):
                answer = right(task, self.task_dict[task][split][number])
                answers.append(answer if number else wrong(answer))
            return answers

        def loglikelihood(self, requests: list[Any]) -> list[Any]:
            raise NotImplementedError

        def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
            raise NotImplementedError

    names = [task for name in ("image_local", "video_local") for task in load_suite(name).tasks]
    manager = TaskManager("ERROR", include_path=str(TASKS), model_name="oracle")
    results = simple_evaluate(model=Oracle(), tasks=names, task_manager=manager)
    found = {key: results[key] for key in ("results", "n-samples")}
    out.write_text(json.dumps({**found, "samples": results["samples"]}, default=str))


# --------------------------------------------------------------- computed again from the answers


def test_mme_adds_accuracy_and_accuracy_of_pairs_over_perception(runs: Any, scored: Any) -> None:
    answers, targets = runs.answers("mme"), runs.targets("mme")
    right = [a.lower() == t.lower() for a, t in zip(answers, targets, strict=True)]
    pairs = [right[i : i + 2] for i in range(0, 6, 2)]  # the fourth pair is cognition
    points = sum(50 * sum(pair) + 100 * all(pair) for pair in pairs)
    assert scored["image"]["mme"]["score"] == points
    assert scored["image"]["mme"]["items"] == [[i, float(r)] for i, r in enumerate(right[:6])]


def test_pope_is_the_mean_of_three_f1_scores(runs: Any, scored: Any) -> None:
    total = 0.0
    for task in ("pope_adv", "pope_pop", "pope_random"):
        given = list(zip(runs.answers(task), runs.targets(task), strict=True))
        assert {target for _, target in given} == {"yes", "no"}
        hits = sum(answer == target == "yes" for answer, target in given)
        said, there = (sum(pair[side] == "yes" for pair in given) for side in (0, 1))
        total += 2 * hits / (said + there)
    assert scored["image"]["pope"]["score"] == pytest.approx(100 * total / 3)


def test_scienceqa_and_gqa_are_accuracies_over_all_items(runs: Any, scored: Any) -> None:
    for key, tasks in {"gqa": ("gqa",), "scienceqa": ("scienceqa", "scienceqa_img")}.items():
        right = [
            answer.lower() == target.lower()
            for task in tasks
            for answer, target in zip(runs.answers(task), runs.targets(task), strict=True)
        ]
        assert scored["image"][key]["score"] == pytest.approx(100 * sum(right) / len(right))


def test_mmbench_asks_in_its_language_and_leaves_a_missing_hint_out(runs: Any) -> None:
    for task, ending in {
        "mmbench_en_dev_static": "from the given choices directly.",
        "todre_mmbench_cn_dev_static": "请直接使用所提供的选项字母作为答案回答。",
    }.items():
        prompts = [record["input"] for record in runs.samples[task]]
        assert all(prompt.endswith(ending) for prompt in prompts)
        assert not any("nan" in prompt for prompt in prompts)
        assert sum("Look at the shapes." in prompt for prompt in prompts) > 0


def test_items_without_an_image_are_answered(runs: Any) -> None:
    hints = [record["input"] for record in runs.samples["scienceqa"]]
    assert sum("There is one object only." in hint for hint in hints) == NUM_SCENES // 2
    assert len(runs.answers("scienceqa")) == NUM_SCENES


def test_mlvu_is_the_mean_over_kinds_of_questions(runs: Any, scored: Any) -> None:
    answers, targets = runs.answers("mlvu_dev"), runs.targets("mlvu_dev")
    right = [answer == target for answer, target in zip(answers, targets, strict=True)]
    assert scored["video"]["mlvu"]["score"] == pytest.approx(100 * sum(right) / 7)


# ------------------------------------------------------------------------- submissions


def test_what_needs_a_server_leaves_its_file_and_says_so(scored: Any, runs: Any) -> None:
    for suite, key, task, entry in (
        ("image", "vizwiz", "vizwiz_vqa_test", lambda one: one["answer"]),
        ("image", "vqav2", "todre_vqav2_testdev", lambda one: one["answer"]),
    ):
        found = scored[suite][key]
        assert (found["status"], found["score"], found["items"]) == ("submission", None, None)
        assert "the server must give the score" in found["note"]
        entries = json.loads(Path(found["submission"]).read_text())
        assert [entry(one) for one in entries] == runs.answers(task)


def test_full_egoschema_writes_its_file_and_reports_the_server_as_skipped(
    scored: Any, runs: Any
) -> None:
    found = scored["video"]["egoschema"]
    assert (found["status"], found["score"]) == ("submission", None)
    chosen = json.loads(Path(found["submission"]).read_text())
    assert sorted(chosen) == [f"ego{number}" for number in range(NUM_SCENES)]
    assert set(chosen.values()) <= set(range(5))
    assert "EgoSchema's server was not asked or gave no score" in runs.printed


# ------------------------------------------------------------------------- our own task code


def _utils(name: str) -> ModuleType:
    """Load the file that a task file's ``!function utils.x`` loads."""
    path = TASKS / name / "utils.py"
    spec = importlib.util.spec_from_file_location(f"{name}_utils", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_guess_depends_on_the_item_only() -> None:
    ego, long = _utils("egoschema"), _utils("longvideobench")
    clips = [
        {"video_idx": f"c{i}", "option": [f"{k}. x" for k in "ABCDE"], "answer": "0"}
        for i in range(40)
    ]
    docs = [
        {
            **{"id": f"c{i}", "duration_group": 15, "question_category": "S2E"},
            **{"correct_choice": 0, "option0": "a", "option1": "b", "option2": "c"},
            **{"option3": "N/A", "option4": "N/A"},
        }
        for i in range(40)
    ]
    guesses = [ego.process_results(clip, ["hm"])["submission"][clip["video_idx"]] for clip in clips]
    assert set(guesses) == set(range(5))
    letters = [long.process_results(doc, ["hm"])["lvb_acc"]["parsed_pred"] for doc in docs]
    assert set(letters) == set("ABC")
    for clip, guess in reversed(list(zip(clips, guesses, strict=True))):
        assert ego.process_results(clip, ["hm"])["score"] == {"pred": guess, "ground_truth": "0"}
    for doc, letter in reversed(list(zip(docs, letters, strict=True))):
        assert long.process_results(doc, ["hm"])["lvb_acc"]["parsed_pred"] == letter


def test_an_answer_with_a_letter_is_never_guessed() -> None:
    ego, long = _utils("egoschema"), _utils("longvideobench")
    clip = {"video_idx": "c", "option": [f"{k}. x" for k in "ABCDE"], "answer": "0"}
    doc = {f"option{place}": "x" for place in range(5)}
    doc |= {"id": "c", "duration_group": 15, "question_category": "S2E", "correct_choice": 0}
    for place, letter in enumerate("ABCDE"):
        for said in (letter, f"({letter})", f"The answer is {letter}."):
            assert ego.process_results(clip, [said])["submission"] == {"c": place}
            assert long.process_results(doc, [said])["lvb_acc"]["parsed_pred"] == letter


@pytest.mark.parametrize("case", ["scored", "few", "offline", "unreachable", "broken"])
def test_egoschemas_server_is_asked_about_complete_answers_only(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ego = _utils("egoschema")
    asked: list[str] = []

    def head(url: str, timeout: float) -> None:
        asked.append(url)
        if case == "unreachable":
            raise ego.requests.ConnectionError

    def upstream_score(results: Any, args: Any) -> float:
        asked.append("score")
        if case == "broken":
            raise RuntimeError("no parseable accuracy")
        return 61.5

    monkeypatch.setattr(ego.requests, "head", head)
    monkeypatch.setattr(ego.upstream, "egoschema_aggregate_mc", upstream_score)
    monkeypatch.setattr(ego, "is_offline_mode", lambda: case == "offline")
    count = ego.NUM_QUESTIONS - (case == "few")
    answers = [{f"clip{number}": number % 5} for number in range(count)]
    score = ego.submit(answers, argparse.Namespace(output_path=str(tmp_path)))
    assert score == (61.5 if case == "scored" else None)
    assert asked == {
        "scored": [ego.SERVER, "score"],
        "broken": [ego.SERVER, "score"],
        "unreachable": [ego.SERVER],
    }.get(case, [])
    (file,) = (tmp_path / "submissions").iterdir()
    assert file.match(load_suite("video").benchmarks[1].submission or "")
    assert json.loads(file.read_text()) == {k: v for one in answers for k, v in one.items()}


if __name__ == "__main__":
    out = Path(sys.argv.pop(1))
    try:
        runpy.run_module("lmms_eval", run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        assert not stop.code, stop.code
    _oracle(out)
