"""The demo on two pictures: complete, resumable, honest about what it stores."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from eval.demo import command, measure, sheets
from eval.demo import run as running
from eval.demo.plan import RANDOM_DRAWS, Run, plan
from eval.demo.rows import rows_of
from eval.demo.run import run_demo
from eval.demo.stored import fingerprint, unused
from eval.demo.stored import finished as finished_run
from eval.figures.sources import opened
from eval.mini import TASKS, Sample, held_out
from eval.results.bootstrap import intervals
from eval.tables.demo import as_markdown, as_text, with_interval
from llava_todre import TodreError
from llava_todre.cli import main
from llava_todre.model.checkpoint import bundled_checkpoint
from llava_todre.pruners import PRUNERS
from llava_todre.vlm import Answer, Request, answer

NUM_IMAGES = 2


def test_rows_tokens_and_files(finished: tuple[Path, dict[str, Any]]) -> None:
    out, results = finished
    assert [(row["method"], row["kept_tokens"]) for row in results["rows"]] == [
        ("vanilla", 320),
        ("random", 80),
        ("todre", 80),
    ]
    vanilla, _, todre = results["rows"]
    assert vanilla["relative_average"] == vanilla["flops_share"] == 1
    assert vanilla["prefill_speedup"]["median"] == 1
    assert todre["flops_share"] < 0.5
    assert set(vanilla["accuracy"]) == set(TASKS)
    assert json.loads((out / "results.json").read_text())["rows"] == results["rows"]
    assert (out / "table.md").read_text() == as_markdown(results)
    assert (out / "kept_0.png").stat().st_size > 10_000
    assert {"git_commit", "git_dirty", "versions", "device"} <= set(results)


def test_a_finished_run_is_not_repeated_and_a_damaged_one_is(
    finished: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    results = finished[1]
    out = tmp_path / "demo"
    shutil.copytree(finished[0], out)
    repeated: list[str] = []
    evaluate = running.evaluate

    def spy(run: Run, *rest: Any) -> dict[str, Any]:
        repeated.append(run.name)
        return evaluate(run, *rest)

    monkeypatch.setattr(running, "evaluate", spy)
    monkeypatch.setattr(running, "draw_sheets", lambda *_: None)
    monkeypatch.setattr(measure, "TIMED_PROMPTS", 1)
    file = out / "runs" / "todre_0.25.json"
    whole = file.read_text()
    damages = [whole[: len(whole) // 2], "null", "{}", "[]"]
    for key in ("hits", "answers", "kept_tokens"):
        damages.append(json.dumps({k: v for k, v in json.loads(whole).items() if k != key}))
    damages.append(json.dumps(json.loads(whole) | {"hits": {"exist": [1]}}))
    version, run = json.loads(whole)["version"], Run("todre", 0.25)
    num_images = results["num_images"]
    assert finished_run(file, version, run, num_images) is not None
    for damage in damages:
        file.write_text(damage)
        assert finished_run(file, version, run, num_images) is None, damage[:80]
    again = run_demo(None, ["random", "todre"], [0.25], NUM_IMAGES, out)
    assert repeated == ["todre_0.25"]
    assert [row["accuracy"] for row in again["rows"]] == [
        row["accuracy"] for row in results["rows"]
    ]
    other = fingerprint(bundled_checkpoint(), 1)
    assert fingerprint(bundled_checkpoint(), num_images) == version != other
    assert finished_run(file, other, run, num_images) is None, "other questions are other runs"


def test_the_first_look_says_how_to_see_all(
    finished: tuple[Path, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    called: list[tuple[Any, ...]] = []

    def spy(*given: Any) -> dict[str, Any]:
        called.append(given)
        return finished[1]

    monkeypatch.setattr(command, "run_demo", spy)
    few = ["--methods", "random", "todre", "--ratios", "0.25", "--num-images", str(NUM_IMAGES)]
    assert main(["demo", *few, "--out", str(tmp_path)]) == 0
    assert called == [(None, ["random", "todre"], [0.25], NUM_IMAGES, tmp_path, False)]
    printed = capsys.readouterr().out
    assert "A first look, at 2 pictures: make demo IMAGES=96, or --num-images 96" in printed
    assert re.search(r"random 25% \(mean of 3\) .*% \[[\d.]+, [\d.]+\]", printed), "intervals"


def test_intervals_are_those_of_the_stored_hits(finished: tuple[Path, dict[str, Any]]) -> None:
    results = json.loads((finished[0] / "results.json").read_text())
    hits: dict[str, list[dict[str, list[int]]]] = {}
    for stored in results["runs"]:
        hits.setdefault(stored["run"]["method"], []).append(stored["hits"])
    assert [len(draws) for draws in hits.values()] == [1, RANDOM_DRAWS, 1]
    for row in results["rows"]:
        expected = intervals(hits[row["method"]], hits["vanilla"][0])
        assert row["relative_interval"] == list(expected["relative"])
        assert row["average_interval"] == list(expected["average"])
        for name in ("relative", "average"):
            low, high = row[f"{name}_interval"]
            value = row["relative_average" if name == "relative" else "average"]
            assert low <= value + 1e-9 and value - 1e-9 <= high
    assert results["interval"]["level"] == 0.95
    random = results["rows"][1]
    assert random["relative_interval"][0] < random["relative_interval"][1]
    shown = with_interval(random["relative_average"], random["relative_interval"])
    assert shown in as_text(results) and f"| {shown} |" in as_markdown(results)


def test_runs_that_no_longer_count_are_counted_and_the_reason_is_told(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    runs, stored = plan(["todre"], [0.25]), finished[1]["runs"]
    version = stored[0]["version"]
    assert set(version) == {"code", "model", "pictures", "torch", "transformers"}
    assert unused(tmp_path, version, runs) == ""
    (tmp_path / "runs").mkdir()
    for run in stored:
        (tmp_path / "runs" / f"{Run(**run['run']).name}.json").write_text(json.dumps(run))
    assert unused(tmp_path, version, runs) == ""
    line = unused(tmp_path, version | {"code": "other", "torch": "9"}, runs)
    assert line.startswith("2 finished runs in ") and line.endswith("changed: code, torch.")
    old = tmp_path / "runs" / "todre_0.25.json"
    old.write_text(json.dumps(json.loads(old.read_text()) | {"version": "0123456789abcdef"}))
    line = unused(tmp_path, version, runs)
    assert line.startswith("1 finished runs") and line.endswith("changed: not recorded.")


def test_all_draws_of_a_method_make_its_interval() -> None:
    right, wrong = (dict.fromkeys(TASKS, [hit] * 9 + [0] * 3) for hit in (1, 0))
    same = {"version": "", "kept_tokens": 1, "prefill_flops": 1}
    scored = [
        {"run": {"method": "vanilla", "retain_ratio": 1.0, "draw": 0}, "hits": right, **same},
        {"run": {"method": "random", "retain_ratio": 0.5, "draw": 0}, "hits": right, **same},
        {"run": {"method": "random", "retain_ratio": 0.5, "draw": 1}, "hits": wrong, **same},
    ]
    speed: Any = {"prefill": {}, "first_token": {}}
    _, row = rows_of(scored, {"vanilla_1.0": speed, "random_0.5_draw0": speed})
    assert (row["draws"], row["average"], row["relative_average"]) == (2, 0.375, 0.5)
    assert row["relative_interval"] == [0, 1], "one draw or the other"
    assert row["average_interval"][0] == 0 and 0.9 <= row["average_interval"][1] < 1


def test_how_an_interval_is_printed() -> None:
    assert with_interval(0.98312, [0.97149, 0.9921]) == "98.3% [97.1, 99.2]"
    assert with_interval(1.0, [1.0, 1.0]) == with_interval(1.0, None) == "100.0%"


def test_all_stands_for_every_method_once() -> None:
    runs = plan(["all", "todre+todre_v1", "todre"], [0.5, 0.25])
    assert runs[0] == Run("vanilla", 1.0)
    for ratio in (0.5, 0.25):
        named = [run.method for run in runs if run.retain_ratio == ratio]
        assert named == [
            *(name for name in PRUNERS for _ in range(RANDOM_DRAWS if name == "random" else 1))
        ][1:] + ["todre+todre_v1"]
    assert all(run.pruner(3).num_keep(1000) == 1000 * run.retain_ratio for run in runs)
    assert len({run.name for run in runs}) == len(runs)
    assert all(re.fullmatch(r"[\w.-]+", run.name) for run in runs), "fit for a file"


def test_a_random_first_stage_is_drawn_for_each_image_and_draw() -> None:
    runs = [run for run in plan(["random+vtw"], [0.25]) if run.method != "vanilla"]
    assert [run.draw for run in runs] == [0, 1, 2]
    seeds = {run.pruner(image).before.seed for run in runs for image in (0, 1)}  # type: ignore[attr-defined]
    assert len(seeds) == 6


def test_a_decoder_stage_without_a_stage_before_it_runs_once() -> None:
    runs = plan(["vanilla+vtw", "todre"], [0.5, 0.25])
    assert [(run.method, run.retain_ratio) for run in runs] == [
        ("vanilla", 1.0),
        ("vanilla+vtw", 1.0),
        ("todre", 0.5),
        ("todre", 0.25),
    ]


def test_many_methods_get_a_sheet_per_ratio_in_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drawn: list[list[list[str]]] = []
    contact_sheet = sheets.contact_sheet

    def spy(rows: Any, caption: str) -> Any:
        drawn.append([[title for title, _ in row] for row in rows])
        return contact_sheet(rows, caption)

    tokenizer, model = opened(None)

    def ask(sample: Sample, questions: list[int], pruner: Any, **_: Any) -> list[Answer]:
        model.set_pruner(pruner)
        requests = [Request(sample.questions[i].text, [sample.image]) for i in questions]
        return answer(model, tokenizer, requests, max_new_tokens=1)

    monkeypatch.setattr(sheets, "contact_sheet", spy)
    monkeypatch.setattr(sheets, "_ONE_SHEET", 2)
    monkeypatch.setattr(sheets, "ROW_OF_PICTURES", 1)
    runs = plan(["random", "todre"], [0.1, 0.25])
    sheets.draw_sheets(runs, held_out(NUM_IMAGES), ask, model, tmp_path)
    pictures = {f"kept_{scene}_{ratio}.png" for scene in (0, 1) for ratio in (0.25, 0.1)}
    assert {file.name for file in tmp_path.glob("*.png")} == pictures
    for sheet, tokens in zip(drawn, (80, 32) * NUM_IMAGES, strict=True):
        (vanilla,), (random,), (todre,) = sheet
        assert vanilla.startswith("vanilla, 320 in, 336 per layer: ")
        assert random.startswith(f"random, {tokens} in, ") and todre.startswith(f"todre, {tokens}")


@pytest.mark.parametrize(("cells", "rows"), [(8, [4, 4]), (10, [5, 5]), (11, [4, 4, 3]), (1, [1])])
def test_rows_of_pictures_are_about_equally_long(cells: int, rows: list[int]) -> None:
    wrapped = sheets._wrapped([(str(i), None) for i in range(cells)])  # type: ignore[misc]
    assert [len(row) for row in wrapped] == rows
    assert [title for row in wrapped for title, _ in row] == [str(i) for i in range(cells)]


def test_random_draws_differ_between_images_and_draws() -> None:
    seeds = {Run("random", 0.25, draw).pruner(image).seed for draw in (0, 1) for image in (0, 1)}  # type: ignore[attr-defined]
    assert len(seeds) == 4


def test_mistakes_are_found_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(TodreError, match="Did you mean 'todre'"):
        plan(["todree"], [0.25])
    with pytest.raises(TodreError, match="Did you mean 'todre'"):
        plan(["todre_v1+todree"], [0.25])
    with pytest.raises(TodreError, match="retain_ratio"):
        plan(["todre"], [25])
    assert plan(["todre", "todre"], [0.25, 0.25]) == plan(["todre"], [0.25])
    (tmp_path / "file").write_text("")
    for out, num_images, message in (
        ("file", 2, "cannot be a folder"),
        ("new", 0, "num_images"),
        ("new", 10_001, "num_images 10001 is out of range; allowed: 1 to 10,000"),
    ):
        with pytest.raises(TodreError, match=message):
            run_demo(None, ["todre"], [0.25], num_images, tmp_path / out)
    assert not (tmp_path / "new").exists()
