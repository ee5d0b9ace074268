"""``python -m eval table all``: every run once, with all that is known about it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from eval.__main__ import main
from tests.eval.planted import FULL, LESS, hits, planted, pruned, scored

OTHER = {"key": "llava_1_5_7b", "pretrained": "liuhaotian/llava-v1.5-7b"}


def mixed() -> list[dict[str, Any]]:
    """Return runs of many kinds: models, suites, budgets, seeds, limits, ablations, failures."""
    seeds = []
    for seed, percent in enumerate((40, 60)):
        run = planted("random", {"retain_ratio": 0.25}, {"gqa": hits(percent, seed)})
        run["config"]["seed"] = seed
        seeds.append(run | {"name": f"random {seed}", "cpu_seconds": 60.0 + seed})
    waiting = LESS | {"vqav2": scored(None, status="submission", note="send it")}
    return [
        planted("vanilla", {"retain_ratio": 1.0}, FULL | {"gqa": hits(80)}, cpu_seconds=90.0),
        pruned(scores=waiting),
        pruned(limit=50),
        planted("todre", {"retain_tokens": 192}, LESS),
        planted("divprune+todre", {"retain_ratio": 0.25}, LESS, name="combined"),
        planted("todre", {"retain_ratio": 1.0, "tau": 0.05}, LESS, name="tau"),
        planted("todre", {"retain_ratio": 1.0, "probe_depths": [0.5]}, LESS, name="layers"),
        pruned(model={"key": "llava_next_7b", "protocol": "native"}, name="native"),
        planted("vanilla", {"retain_ratio": 1.0}, {"where": 50.0}, OTHER, "own", name="other"),
        planted("todre", {"retain_ratio": 0.1}, {"where": 40.0}, OTHER, "own", name="other pruned"),
        planted("gone", {"retain_ratio": 0.1}, LESS, name="a method of another version"),
        pruned(0.11, status="failed", error="out of memory", scores={}, tokens=None, name="lost"),
        *seeds,
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index, run in enumerate(mixed()):
        (tmp_path / f"{index}.json").write_text(json.dumps(run))
    (tmp_path / "other.json").write_text("[]")
    return tmp_path


def lines_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def of(lines: Sequence[dict[str, str]], name: str) -> dict[str, str]:
    (line,) = [line for line in lines if name in line["runs"]]
    return line


def test_the_csv_has_every_run_once_with_its_numbers(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "all.csv"
    assert main(["table", "all", "--results", str(folder), "--csv", str(file)]) == 0
    lines = lines_of(file.read_text())
    names = [run["name"] for run in mixed()]
    assert len(lines) == len(names) - 1, "two seeds are one line"
    assert all(sum(name == each for each in names) == 1 for name in names)
    listed = [line["runs"] for line in lines]
    assert sorted(listed) == sorted([n for n in names if "random" not in n] + ["random 0 random 1"])
    full = of(lines, "vanilla_1.0_image_None")
    assert (full["model"], full["suite"], full["method"]) == ("llava_next_7b", "image", "vanilla")
    assert (full["average"], full["average_over"].count(" ")) == ("100", 7)
    assert (full["cpu_seconds"], full["wall_seconds"]) == ("90", "4390.2")
    assert float(full["gqa_low"]) < 80 < float(full["gqa_high"])
    todre = of(lines, "todre_0.1_image_None")
    assert (todre["retain_ratio"], todre["prefill_flops"]) == ("0.1", "6.5e+12")
    assert (todre["mme"], todre["vqav2"], todre["limit"]) == ("1350", "", "")
    # six benchmarks at 90 %, GQA at 54 of 80
    assert float(todre["average"]) == pytest.approx((6 * 90 + 67.5) / 7, abs=1e-3)
    assert of(lines, "todre_0.1_image_50")["average"] == "", "no unpruned run has this limit"
    assert of(lines, "native")["average"] == "", "nor these settings"
    assert of(lines, "todre_192_image")["retain_tokens"] == "192"
    assert of(lines, "layers")["options"] == "retain_ratio=1, probe_depths=[0.5]"
    assert of(lines, "other pruned")["average"] == "80"
    assert of(lines, "lost")["status"] == "failed" and of(lines, "lost")["error"] == "out of memory"
    random = of(lines, "random 0")
    assert (random["seeds"], random["gqa"], random["cpu_seconds"]) == ("0, 1", "50", "60.5")
    assert float(random["gqa_sd"]) == pytest.approx(200**0.5, abs=1e-3)
    assert float(random["average_sd"]) == pytest.approx(200**0.5 / 0.8, abs=1e-3)
    capsys.readouterr()
    assert main(["table", "all", "--results", str(folder), "--format", "csv"]) == 0
    assert capsys.readouterr().out == file.read_text()


def test_the_text_has_every_run_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", "all", "--results", str(folder)]) == 0
    text = capsys.readouterr().out
    titles = [line for line in text.splitlines() if line.startswith("All runs of")]
    assert titles == [
        "All runs of llava_1_5_7b on suite own (2)",
        "All runs of llava_next_7b on suite image, protocol native (1)",
        "All runs of llava_next_7b on suite image, protocol paper (11)",
    ]
    assert text.count("divprune+todre") == 1 and text.count("probe_depths=[0.5]") == 1
    assert "50.0 ± 14.1" in text and "62.5 ± 17.7 (1 of 1)".removesuffix(" (1 of 1)") in text
    assert "lost failed: out of memory" in text
    assert "wall: by the clock. Other work" in text
    assert "server" in text and " 1:30 " in text


def test_limits_are_sorted_as_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for limit in (100, None, 9, 50):
        (tmp_path / f"{limit}.json").write_text(json.dumps(pruned(limit=limit)))
    assert main(["table", "all", "--results", str(tmp_path), "--format", "csv"]) == 0
    assert [row["limit"] for row in lines_of(capsys.readouterr().out)] == ["9", "50", "100", ""]


def test_the_table_can_be_narrowed_and_drawn_in_every_format(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for style in ("text", "md", "latex"):
        assert main(["table", "all", "--results", str(folder), "--format", style]) == 0
        assert capsys.readouterr().out
    given = ["table", "all", "--results", str(folder), "--suite", "own"]
    assert main([*given, "--format", "csv"]) == 0
    assert len(lines_of(capsys.readouterr().out)) == 2
    assert main([*given, "--model", "mini"]) == 1
    assert "hold no such runs" in capsys.readouterr().err


def test_without_folders_the_usual_ones_are_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["table", "all"]) == 1
    assert "no results below 'outputs'; give folders with --results" in capsys.readouterr().err
    for name in ("eval", "table1_image"):
        (tmp_path / "outputs" / name).mkdir(parents=True)
        (tmp_path / "outputs" / name / "run.json").write_text((folder / "0.json").read_text())
    (tmp_path / "outputs" / "eval" / "run2.json").write_text((folder / "1.json").read_text())
    assert main(["table", "all", "--format", "csv"]) == 0
    assert len(lines_of(capsys.readouterr().out)) == 2, "a copy of a run is the same run"


def test_other_tables_write_their_numbers_as_csv_too(folder: Path) -> None:
    file = folder / "1.csv"
    assert main(["table", "1", "--results", str(folder), "--csv", str(file)]) == 0
    assert any(line["method"] == "todre 10%" for line in lines_of(file.read_text()))
    assert main(["table", "1", "--results", str(folder), "--csv", str(folder / "no" / "x")]) == 1
