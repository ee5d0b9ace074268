"""The benchmark measures what it says, on sizes that take no time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval import bench


def test_last_line_is_json_and_ratios_are_sane(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(bench, "SELECTIONS", ((64, 16, 8),))
    monkeypatch.setattr(bench, "VISUAL_TOKENS", (512, 32))
    results = bench.bench(repeats=3, out=tmp_path / "bench.json")
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == json.loads((tmp_path / "bench.json").read_text())
    pruned = next(row for row in results["prefill"] if row["mode"] == "pruned")
    assert 1 < pruned["speedup"]["median"]
    assert 3 < pruned["flops_ratio"] < 6
