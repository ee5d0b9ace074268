"""The demo on two pictures: complete, resumable, honest about what it stores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava_todre import TodreError, demo
from llava_todre.demo import Run, plan, run_demo
from llava_todre.mini import TASKS
from llava_todre.table import as_markdown

NUM_IMAGES = 2


def small_demo(out: Path, **changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {
        "model_path": None,
        "methods": ["random", "todre"],
        "ratios": [0.25],
        "num_images": NUM_IMAGES,
        "out": out,
    }
    return run_demo(**(options | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("demo")
    return out, small_demo(out)


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
    finished: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, results = finished
    repeated: list[str] = []
    evaluate = demo._evaluate

    def spy(run: Run, *rest: Any) -> dict[str, Any]:
        repeated.append(run.name)
        return evaluate(run, *rest)

    monkeypatch.setattr(demo, "_evaluate", spy)
    whole = (out / "runs" / "todre_0.25.json").read_text()
    (out / "runs" / "todre_0.25.json").write_text(whole[: len(whole) // 2])
    again = small_demo(out)
    assert repeated == ["todre_0.25"]
    assert [row["accuracy"] for row in again["rows"]] == [
        row["accuracy"] for row in results["rows"]
    ]
    repeated.clear()
    small_demo(out, num_images=1)
    assert len(repeated) == 5, "other questions are other runs"


def test_random_draws_differ_between_images_and_draws() -> None:
    seeds = {Run("random", 0.25, draw).pruner(image).seed for draw in (0, 1) for image in (0, 1)}  # type: ignore[attr-defined]
    assert len(seeds) == 4


def test_mistakes_are_found_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(TodreError, match="Did you mean 'todre'"):
        plan(["todree"], [0.25])
    with pytest.raises(TodreError, match="retain_ratio"):
        plan(["todre"], [25])
    assert plan(["todre", "todre"], [0.25, 0.25]) == plan(["todre"], [0.25])
    with pytest.raises(TodreError, match="cannot be a folder"):
        (tmp_path / "file").write_text("")
        small_demo(tmp_path / "file")
    with pytest.raises(TodreError, match="num_images"):
        small_demo(tmp_path, num_images=0)
