"""Stored results: one reader, and what it says about files that were damaged or edited."""

from __future__ import annotations

import copy
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from eval.__main__ import main
from eval.results.files import BENCHMARK, load_runs, read_run
from eval.run.collect import read_record
from llava_todre import TodreError

ROOT = Path(__file__).resolve().parents[2]
STORED = ROOT / "docs" / "results" / "reproduce_mini"
RUN = json.loads(next(STORED.glob("*-vanilla-*.json")).read_text())
DROP = object()
REQUIRED = ["name", "status", "error", "config"]
REQUIRED += [f"config.{key}" for key in ("model", "method", "options", "suite")]
REQUIRED += [f"benchmarks.read.{key}" for key in BENCHMARK if not key.endswith("?")]
WRONG: list[tuple[tuple[str, ...], Any, str]] = [
    (("name",), 3, "has name 3; expected: text"),
    (("status",), "weird", "has status 'weird'; expected: complete or failed"),
    (("status",), "failed", "has status failed and no error"),
    (("config",), 3, "has config 3; expected: keys"),
    (("config", "options"), [], r"has config.options \[\]; expected: keys"),
    (("config", "options", "retain_ratio"), "x", "has config.options.retain_ratio 'x'"),
    (("config", "benchmarks"), 3, "has config.benchmarks 3; expected: a list"),
    (("config", "model", "num_layers"), "x", "has config.model.num_layers 'x'"),
    (("name",), "\ud800", r"has name '\\ud800'; expected: text"),
    (("config", "limit"), 0, "has config.limit 0; expected: a whole number, 1 or more, or null"),
    (("config", "seed"), True, "has config.seed True; expected: a whole number"),
    (("config", "method"), None, "has config.method None; expected: text"),
    (("benchmarks",), [1], r"has benchmarks \[1\]; expected: keys"),
    (("benchmarks", "read"), 1, "has benchmarks.read 1"),
    (("benchmarks", "read", "score"), "high", "read.score 'high'; expected: a finite number"),
    (("benchmarks", "read", "score"), float("nan"), "read.score nan"),
    (("benchmarks", "read", "score"), 10**400, "read.score 1000"),
    (("benchmarks", "read", "score"), None, "has no score for 'read'"),
    (("benchmarks", "read", "scale"), "feet", "read.scale 'feet'; expected: percent or points"),
    (("benchmarks", "read", "status"), {}, "read.status {}; expected: complete or submission"),
    (("benchmarks", "read", "items"), [[0, "x"], 3], "read.items"),
    (("benchmarks", "read", "items"), [[0, 1.0], [0, 1.0]], r"read.items .* \(each once\)"),
    (("benchmarks", "read", "items"), [[0, 2.0]], "read.items .* between 0 and 1"),
    (("benchmarks", "read", "items"), [[0.5, 1.0]], "read.items"),
    (("benchmarks", "read", "groups"), [0], "1 groups for 96 items of 'read'"),
    (("benchmarks", "read", "watched_answer"), {"x": 1}, "expected: an answer and its share"),
    (("benchmarks", "read", "spread"), "x", "read.spread 'x'; expected: no such key"),
    (("benchmarks", "read", "provenance"), {}, "read.provenance {}; expected: no such key"),
    (("members",), [1], r"has members \[1\]; expected: no such key in a file"),
    (("tokens",), {"kept_tokens": "x"}, "has tokens"),
    (("seconds",), "long", "has seconds 'long'"),
    *((tuple(key.split(".")), DROP, f"has no {key}; expected: ") for key in REQUIRED),
]


def changed(path: tuple[str, ...], value: Any) -> Any:
    run = copy.deepcopy(RUN)
    holder = run
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    if value is DROP:
        del holder[path[-1]]
    return run


def refused(file: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line with which every reader refuses a file."""
    with pytest.raises(TodreError) as caught:
        read_run(file)
    with pytest.raises(TodreError) as again:
        load_runs([file.parent])
    assert str(again.value) == str(caught.value) and "\n" not in str(caught.value)
    assert read_record(file) is None  # the runner makes it again
    capsys.readouterr()
    folder = str(file.parent)
    for command in (
        ["compare", str(file), str(file)],
        ["table", "1", "--results", folder],
        ["table", "all", "--results", folder],
        ["report", folder],
        ["figure", "sweep_tau", "--runs", folder, "--out", folder],
    ):
        assert main(command) == 1, command
        printed, said = capsys.readouterr()
        assert not printed and said == f"eval: error: {caught.value}\n", command
    return str(caught.value)


def test_a_damaged_run_is_one_line_wherever_it_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps(changed(("config", "method"), DROP)))
    assert f"{str(file)!r} has no config.method; expected: " in refused(file, capsys)


@pytest.mark.parametrize(("path", "value", "message"), WRONG)
def test_a_run_with_a_wrong_value_is_one_line_with_file_and_key(
    path: tuple[str, ...], value: Any, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps(changed(path, value)))
    for read in (read_run, lambda file: load_runs([file.parent])):
        with pytest.raises(TodreError, match=message) as caught:
            read(file)
        assert str(file) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"\xff\xfe{}",
        b"[" * 100_000,
        b'{"format": 1, "benchmarks": {}, "x": ' + b"[" * 5_000 + b"]" * 5_000 + b"}",
        b'{"format": 1, "benchmarks": {"gqa": ' + b"1" * 5_000 + b"}}",
        b'{"format": 1, "name": "a", "name": "b", "benchmarks": {}}',
    ],
    ids=["cut", "binary", "open lists", "nested", "digits", "a key twice"],
)
def test_what_is_not_json_is_one_line(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.json"
    file.write_bytes(content)
    assert re.search("is not JSON|must be UTF-8 text", refused(file, capsys))


def test_what_is_no_file_of_a_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(TodreError, match="cannot be read"):
        read_run(tmp_path / "missing.json")
    (tmp_path / "other.json").write_text('{"format": 2, "benchmarks": {}}')
    with pytest.raises(TodreError, match="not the result of a run"):
        read_run(tmp_path / "other.json")
    os.mkfifo(tmp_path / "pipe.json")  # reading it would wait for ever
    for read in (read_run, read_record, lambda file: load_runs([file.parent])):
        if read is read_record:
            assert read(tmp_path / "pipe.json") is None
            continue
        with pytest.raises(TodreError, match="it is not a regular file"):
            read(tmp_path / "pipe.json")


def test_stored_runs_and_those_of_earlier_versions_are_sound() -> None:
    assert len(load_runs([STORED])) == 26
    assert len(load_runs([ROOT / "docs" / "results" / "stock_mini"])) == 3
