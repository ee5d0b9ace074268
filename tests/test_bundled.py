"""The bundled model does what its card and the README say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval.mini import TEST_SEED
from eval.mini.heldout import held_out
from llava_todre import Answer, ImageCache, Request, answer, load_pretrained_model
from llava_todre.cli import main

MINI = Path(__file__).parents[1] / "checkpoints" / "mini"
EXAMPLES = json.loads((MINI / "examples" / "examples.json").read_text())
LEAST = {"exist": 0.97, "colour": 0.97, "shape": 0.97, "digit": 0.97, "where": 0.95, "read": 0.95}
LEAST |= {"count": 0.80, "relation": 0.80, "choice": 0.80}


@pytest.mark.parametrize(
    "setting",
    [["--method", "vanilla"], ["--method", "todre", "--retain-ratio", "0.25"]],
    ids=["100 %", "25 %"],
)
def test_todre_generate_answers_questions_about_a_bundled_scene(
    setting: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    scene = [entry for entry in EXAMPLES if entry["image"] == "scene_0.png"]
    right = []
    for entry in scene:
        image = str(MINI / "examples" / entry["image"])
        fixed = ["generate", "--model", str(MINI), "--image", image, "--json"]
        assert main([*fixed, "--question", entry["question"], *setting]) == 0
        report = json.loads(capsys.readouterr().out)
        right.append(report["answer"] == entry["answer"])
    assert len(scene) == 9 and sum(right) >= 8


@pytest.mark.parametrize(
    ("method", "knobs", "scenes"),
    [("vanilla", {}, 1), ("todre", {"retain_ratio": 0.1, "tau": 0.01}, 3)],
)
def test_answers_do_not_depend_on_batch_or_stored_prefix(
    method: str, knobs: dict[str, float], scenes: int
) -> None:
    tokenizer, model, _, _ = load_pretrained_model(MINI)
    model.set_pruner(method, **knobs)
    texts: dict[str, list[str]] = {"fresh": [], "batched": [], "one by one": [], "shared": []}
    withdrawn = set()
    cache = ImageCache()
    for sample in held_out(scenes):
        requests = [Request(question.text, [sample.image]) for question in sample.questions]

        def given(some: list[Request], cache: ImageCache | None = None) -> list[Answer]:
            return answer(model, tokenizer, some, max_new_tokens=8, image_cache=cache)

        texts["fresh"] += [given([one])[0].text for one in requests]
        texts["batched"] += [each.text for each in given(requests)]
        shared = given(requests, cache)
        texts["shared"] += [each.text for each in shared]
        texts["one by one"] += [given([one], cache)[0].text for one in requests]
        withdrawn |= {each.stats.withdrawn_from for each in shared}
    assert texts["batched"] == texts["shared"] == texts["one by one"] == texts["fresh"]
    assert len(texts["fresh"]) == 9 * scenes
    assert cache.prefixes.hits == scenes * 17, "all but the first question about each image"
    assert len(withdrawn) == (2 if method == "todre" else 1), "some withdrew, others did not"


def test_the_card_meets_what_was_promised() -> None:
    evaluation = json.loads((MINI / "evaluation.json").read_text())
    assert evaluation["seed"] == TEST_SEED
    for task, least in LEAST.items():
        assert evaluation["accuracy"][task] >= least, task
    card = (MINI / "README.md").read_text()
    assert all(f"{evaluation['accuracy'][task]:.3f}" in card for task in LEAST)


def test_the_demo_row_without_pruning_meets_it_too() -> None:
    stored = Path(__file__).parents[1] / "docs" / "results" / "demo_mini.json"
    results = json.loads(stored.read_text())
    vanilla = results["rows"][0]
    assert vanilla["method"] == "vanilla" and results["seed"] == TEST_SEED
    assert all(vanilla["accuracy"][task] >= least for task, least in LEAST.items())


def test_it_is_small_enough_to_be_in_git() -> None:
    assert sum(file.stat().st_size for file in MINI.rglob("*")) < 16 * 2**20
