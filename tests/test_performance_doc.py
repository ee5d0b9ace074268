"""docs/performance.md is current, and keeps measured, published and estimated numbers apart."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from eval.__main__ import main
from eval.bench import report
from eval.bench.dims import SIZES
from eval.bench.roofline import DEVICES, bound
from eval.pages import performance
from eval.pages.fill import template
from llava_todre import TodreError

STORED = performance.RESULTS


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the stored CPU result only."""
    monkeypatch.setattr(performance, "RESULTS", tmp_path)
    shutil.copy(STORED / performance.CPU, tmp_path)
    return tmp_path


def section(page: str, title: str) -> str:
    (found,) = re.findall(rf"^## {title}.*?$\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    return str(found)


def test_the_page_in_the_repository_is_current() -> None:
    page = performance.PAGE.read_text()
    assert page == performance.render(), "run `make docs`"
    assert "{{" not in page
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", page):
        assert (performance.PAGE.parent / target).exists(), target


def test_a_stale_page_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(performance, "PAGE", tmp_path / "performance.md")
    assert main(["docs", "--check"]) == 1
    stale = f"{performance.PAGE} is stale: run `make docs`.\n"
    assert capsys.readouterr().out == stale


def test_without_a_cpu_result_there_is_one_clear_line(results: Path) -> None:
    (results / performance.CPU).unlink()
    with pytest.raises(TodreError, match="bench_cpu.json is missing; make it with"):
        performance.render()


def test_every_number_of_the_result_is_on_the_page_with_its_machine(results: Path) -> None:
    stored = json.loads((results / performance.CPU).read_text())
    measured = section(performance.render(), "Measured on a CPU")
    assert report.headline(stored) in measured and stored["device"] in measured
    for table in report.tables(stored).values():
        for row in table:
            assert "| " + " | ".join(row) + " |" in measured


def test_without_a_gpu_the_page_says_so_and_with_one_it_shows_it(results: Path) -> None:
    assert section(performance.render(), "Measured on a GPU").strip().startswith("Not measured")
    stored = json.loads((results / performance.CPU).read_text()) | {"device": "some GPU"}
    (results / performance.GPU).write_text(json.dumps(stored))
    assert "some GPU" in section(performance.render(), "Measured on a GPU")


def test_estimates_stand_in_a_section_of_their_own(results: Path) -> None:
    page = performance.render()
    estimate = section(page, "Estimate, not measured")
    full, tenth = (bound(DEVICES[0], SIZES["7b"].decoder, [n + 65] * 32) for n in (2880, 288))
    row = f"| RTX 3090 | 288 (10 %) | {1e3 * tenth.prefill_s:.1f} ms |"
    assert row in estimate
    assert f"| {full.prefill_s / tenth.prefill_s:.1f}x |" in estimate
    for device in DEVICES:
        assert device.source in estimate
        assert device.name not in page.replace(estimate, "")


def test_the_cpu_size_is_as_the_page_describes_it() -> None:
    text = " ".join(template("performance").split())
    decoder = SIZES["cpu"].decoder
    assert f"a decoder of {decoder.layers} layers of width {decoder.width}" in text
