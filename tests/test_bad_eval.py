"""``python -m eval`` refuses what it cannot use: one line, no traceback, no hang, no lost run."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from refusals import BOMB, DEEP, refused

from eval.__main__ import main

ROOT = Path(__file__).parents[1]
STORED = ROOT / "docs" / "results" / "reproduce_mini"
RUN = {"model": "mini", "method": "todre", "suite": "mini"}


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)


def ids(table: dict[str, Any]) -> dict[str, Any]:
    return {"argvalues": list(table.values()), "ids": list(table)}


# ------------------------------------------------------------------------------ runs and sweeps

RUNS: dict[str, dict[str, Any]] = {
    f"{key}={str(value)[:20]}": {key: value}
    for key, values in {
        "model": ["no_such", "", 3, [], None, {"pretrained": 3}, {"pretrained": "no_such_folder"},
                  {"key": "mini", "dtype": "int3"}, {"key": "mini", "max_new_tokens": 0},
                  {"key": "mini", "max_new_tokens": "many"}, {"key": "mini", "tp_plan": "x"},
                  {"key": "mini", "protocol": "x"}, {"key": "mini", "no_such": 1},
                  {"key": "mini", "device_map": "auto", "tp_plan": "auto"}, "../etc/passwd"],
        "method": ["tudre", "", 3, ["todre"], None, "todre+", "todre+todre+todre", "no.yaml"],
        "suite": ["no_such", "", 3, ["mini"], None, "../suites/mini", "."],
        "options": ["x", 3, [1], {"tua": 1}, {"tau": "x"}, {"tau": -1}, {"tau": float("nan")},
                    {"retain_ratio": 0}, {"retain_ratio": 2}, {"retain_tokens": 0}, {"seed": 1},
                    {"retain_tokens": 1.5}, {"probe_depths": 0.5}, {"probe_depths": [2]},
                    {"version": "v3"}, {1: 2}],
        "limit": [0, -1, "x", 1.5, True, [1]],
        "seed": [-1, "x", 1.5, None, True, 2**70],
        "batch_size": [0, -1, "x", 1.5, None, True],
        "no_such_key": [1],
    }.items()
    for value in values
}  # fmt: skip


@pytest.mark.parametrize("changes", **ids(RUNS))
def test_run_configs(changes: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.yaml").write_text(json.dumps(RUN | changes))
    line = refused(main, ["run", "run.yaml", "--dry-run"], capsys)
    assert "run.yaml" in line or "model" in line


TABLES: dict[str, dict[str, Any]] = {
    "no such table": {"table": 99},
    "table is null": {"table": None},
    "no tables": {"table": []},
    "table is a mapping": {"table": {"a": 1}},
    "version v3": {"table": 1, "version": "v3"},
    "version v9 of a table without versions": {"table": 4, "version": "v9"},
    "version is a number": {"table": 1, "version": 2},
    "method in a table": {"table": 1, "method": "todre"},
}


@pytest.mark.parametrize("content", **ids(TABLES))
def test_table_configs(content: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.yaml").write_text(json.dumps({"model": "mini", "suite": "mini"} | content))
    refused(main, ["run", "run.yaml", "--dry-run"], capsys)


GRIDS: dict[str, Any] = {
    "null": None,
    "empty list": [],
    "empty": {},
    "a list of empty": [{}],
    "a number": 3,
    "a list of numbers": [1],
    "value is no list": {"ratio": 0.5},
    "value is empty": {"ratio": []},
    "ratio 0": {"ratio": [0]},
    "ratio is a word": {"ratio": ["x"]},
    "unknown key": {"tua": [0.1]},
    "unknown stage": {"stages": ["3"]},
    "layers are no list": {"layers": [0.5]},
    "layers above 1": {"layers": [["9/8"]]},
    "layers divided by zero": {"layers": [["1/0"]]},
    "layers with an endless fraction": {"layers": [["1e999999999"]]},
    "ratio of both names": {"ratio": [0.1], "retain_ratio": [0.2]},
    "a hundred thousand points": {
        "tau": [(n + 1) / 1e6 for n in range(400)],
        "seed": list(range(250)),
    },
    "nested": {"tau": [[0.1]]},
}


@pytest.mark.parametrize("grid", **ids(GRIDS))
def test_grids(grid: Any, capsys: pytest.CaptureFixture[str]) -> None:
    Path("sweep.yaml").write_text(json.dumps({"base": RUN, "grid": grid}))
    refused(main, ["sweep", "sweep.yaml", "--dry-run"], capsys)


FILES: dict[str, str] = {
    "a list": "- model",
    "alias bomb": BOMB,
    "base only": "base: {model: mini}",
    "base is a list": "base: []\ngrid: {ratio: [0.1]}",
}
"""What no YAML file may hold: ``test_files.py``."""


@pytest.mark.parametrize("content", **ids(FILES))
def test_files(content: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.yaml").write_text(content)
    line = refused(main, ["run", "run.yaml", "--dry-run"], capsys)
    assert "run.yaml" in line


OPTIONS: dict[str, list[str]] = {
    "missing file": ["run", "nope.yaml"],
    "folder": ["run", "."],
    "device": ["run", "/dev/zero"],
    "limit 0": ["run", "good.yaml", "--limit", "0"],
    "limit -1": ["run", "good.yaml", "--limit", "-1"],
    "limit is a word": ["run", "good.yaml", "--limit", "x"],
    "jobs 0": ["run", "good.yaml", "--jobs", "0"],
    "processes -1": ["run", "good.yaml", "--processes", "-1"],
    "gpus": ["run", "good.yaml", "--gpus", "0,,1"],
    "gpu that is not there": ["run", "good.yaml", "--gpus", "97"],
    "set without value": ["run", "good.yaml", "--set", "model"],
    "set without key": ["run", "good.yaml", "--set", "=1"],
    "set no yaml": ["run", "good.yaml", "--set", "model=["],
    "set no such date": ["run", "good.yaml", "--set", "seed=2026-13-45"],
    "set into a scalar": ["run", "good.yaml", "--set", "seed.x=1"],
    "set unknown": ["run", "good.yaml", "--set", "modell=mini"],
    "set deep": ["run", "good.yaml", "--set", f"seed={DEEP}"],
    "out has a comma": ["run", "good.yaml", "--out", "a,b"],
    "out is a file": ["run", "good.yaml", "--out", "good.yaml"],
    "out cannot be": ["run", "good.yaml", "--out", "/dev/null/x"],
    "slurm without a time": ["run", "good.yaml", "--slurm"],
    "slurm, time is a word": ["run", "good.yaml", "--slurm", "--slurm-set", "timeout_min=abc"],
    "slurm, time 0": ["run", "good.yaml", "--slurm", "--slurm-set", "timeout_min=0"],
    "slurm, not a pair": ["run", "good.yaml", "--slurm", "--slurm-set", "timeout_min"],
    "slurm, unknown": ["run", "good.yaml", "--slurm", "x", "--slurm-set", "timeout_min=9"],
    "table: unknown": ["table", "99", "--results", "."],
    "table: no folder": ["table", "1", "--results", "no_such_folder"],
    "table: a file": ["table", "1", "--results", "good.yaml"],
    "table: format": ["table", "1", "--results", ".", "--format", "pdf"],
    "table: version": ["table", "1", "--results", ".", "--version", "v9"],
    "table: out": ["table", "1", "--results", str(STORED), "--out", "no_such_folder/x.md"],
    "table: suite": ["table", "1", "--results", str(STORED), "--suite", "no_such"],
    "table: model": ["table", "1", "--results", str(STORED), "--model", "no_such"],
    "compare: missing": ["compare", "nope.json", "nope.json"],
    "compare: yaml": ["compare", "good.yaml", "good.yaml"],
    "compare: folder": ["compare", ".", "."],
    "report: missing": ["report", "no_such_folder"],
    "report: empty": ["report", "."],
    "report: a file": ["report", "good.yaml"],
    "figure: unknown": ["figure", "no_such"],
    "figure: samples": ["figure", "layers", "--samples", "0"],
    "figure: runs": ["figure", "pareto", "--runs", "no_such_folder", "--methods", "nope.json"],
    "bench: size": ["bench", "--size", "70b"],
    "bench: ratio": ["bench", "--ratios", "0", "--dry-run"],
    "bench: method": ["bench", "--compare", "tudre", "--dry-run"],
    "bench: repeats": ["bench", "--repeats", "0", "--dry-run"],
    "bench: new tokens": ["bench", "--new-tokens", "0", "--dry-run"],
    "bench: threads": ["bench", "--threads", "0", "--dry-run"],
    "bench: checkpoint": ["bench", "--checkpoint", "no_such_folder/x"],
    "bench: dtype": ["bench", "--dtype", "int3", "--dry-run"],
    "vtw-layer: samples": ["vtw-layer", "--samples", "nope.jsonl"],
    "vtw-layer: none": ["vtw-layer", "--num-samples", "0"],
    "vtw-layer: eta": ["vtw-layer", "--eta", "-1"],
    "vtw-layer: eta nan": ["vtw-layer", "--eta", "nan"],
    "vtw-layer: first": ["vtw-layer", "--first", "999"],
    "vtw-layer: model": ["vtw-layer", "--model", "no_such_folder/x"],
}


@pytest.mark.parametrize("arguments", **ids(OPTIONS))
def test_options(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("good.yaml").write_text(json.dumps(RUN))
    refused(main, arguments, capsys)


# ------------------------------------------------------------------------------ result files

GOOD = json.loads(next(STORED.glob("mini-mini-vanilla-1-*.json")).read_text())
_BENCHMARK = next(iter(GOOD["benchmarks"]))


def damaged(*path: str, value: Any = ...) -> dict[str, Any]:
    """Return a good result with one value changed, or left out."""
    result = copy.deepcopy(GOOD)
    level = result
    for key in path[:-1]:
        level = level[key]
    if value is ...:
        del level[path[-1]]
    else:
        level[path[-1]] = value
    return result


RESULTS: dict[str, Any] = {
    **{f"no {key}": damaged(key) for key in ("status", "config", "benchmarks")},
    **{f"no config {key}": damaged("config", key) for key in ("suite", "method", "model")},
    **{
        f"no benchmark {key}": damaged("benchmarks", _BENCHMARK, key)
        for key in ("score", "scale", "status")
    },
    **{f"{kind} config": damaged("config", value=value) for kind, value in
       {"null": None, "list": [], "text": "x"}.items()},
    **{f"{kind} benchmarks": damaged("benchmarks", value=value) for kind, value in
       {"null": None, "list": [1], "text": "x"}.items()},
    "score is a word": damaged("benchmarks", _BENCHMARK, "score", value="high"),
    "score is not finite": damaged("benchmarks", _BENCHMARK, "score", value=float("nan")),
    "benchmark is a number": damaged("benchmarks", _BENCHMARK, value=3),
    "items of words": damaged("benchmarks", _BENCHMARK, "items", value=[["a", "b"]]),
    "items with an id twice": damaged("benchmarks", _BENCHMARK, "items", value=[[0, 1], [0, 0]]),
    "method is a list": damaged("config", "method", value=["x"]),
    "options are a list": damaged("config", "options", value=[1]),
    "a list": [GOOD],
    "null": None,
    "a number": 3,
}  # fmt: skip


@pytest.mark.parametrize("command", ["table", "compare", "report"])
@pytest.mark.parametrize("content", **ids(RESULTS))
def test_results(content: Any, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    if command != "compare" and not isinstance(content, dict):
        pytest.skip("a folder may hold other JSON files")
    file = Path("runs") / "mini-mini-vanilla-1-1fc46c65.json"
    file.parent.mkdir()
    file.write_text(json.dumps(content))
    good = str(next(STORED.glob("mini-mini-todre-0.25-d*.json")))
    arguments = {
        "table": ["table", "1", "--results", "runs"],
        "compare": ["compare", str(file), good],
        "report": ["report", "runs"],
    }
    line = refused(main, arguments[command], capsys)
    assert file.name in line


def test_results_that_are_no_json(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.json").write_text("{")
    line = refused(main, ["compare", "run.json", "run.json"], capsys)
    assert "run.json" in line
