"""What the pages say holds: their commands and code, their links, the numbers they derive."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pages
import pytest
import shell_lines

from eval.run.spec import CONFIGS
from eval.run.suites import load_suite
from eval.run.sweeps import plan

ROOT = pages.ROOT
DOCS = ROOT / "docs"
OWN_TEST = {ROOT / "README.md": "test_readme", DOCS / "add_a_method.md": "test_add_a_method"}
"""Pages whose blocks are carried out by a test file of their own."""
LOG = DOCS / "LOG.md"
HERE = [page for page in pages.pages() if pages.blocks(page) and page not in (*OWN_TEST, LOG)]


PATH = re.compile(r"(configs|docs|eval|llava_todre|scripts|tests)/[\w./-]+\.\w+")


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", HERE, ids=name)
def test_the_code_on_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pages.checkout(tmp_path))
    pages.carry_out(page, tmp_path)


def test_pages_with_a_test_of_their_own_are_read_by_it() -> None:
    for page, test in OWN_TEST.items():
        text = (ROOT / "tests" / f"{test}.py").read_text()
        assert "import pages" in text and page.name in text


@pytest.mark.parametrize("page", [page for page in pages.pages() if page != LOG], ids=name)
def test_commands_and_files_in_sentences_exist(page: Path) -> None:
    for span in pages.spans(page):
        if shell_lines.is_command(span):
            shell_lines.check_mention(span)
        elif page not in OWN_TEST and PATH.fullmatch(span):
            assert (ROOT / span).exists(), span


@pytest.mark.parametrize("page", pages.pages(), ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    assert pages.broken_links(page, pages.prose(page)) == []


def test_no_code_hides_in_indentation_or_in_an_open_fence() -> None:
    for page in pages.pages():
        prose = pages.prose(page)
        assert "```" not in prose, name(page)
        assert not re.search(r"\n\n {4,}\w", prose), f"{name(page)}: use a fenced block"


def test_every_page_is_in_the_index() -> None:
    index = DOCS / "README.md"
    listed = {(DOCS / link.partition("#")[0]).resolve() for link in pages.links(index.read_text())}
    assert {*DOCS.glob("*.md")} - {index} <= listed
    assert {*(DOCS / "notebooks").glob("*.ipynb")} <= listed


def test_the_pages_are_short() -> None:
    for page in ("README", "quick_start", "reproduce", "footguns", "faq"):
        lines = (DOCS / f"{page}.md").read_text().splitlines()
        assert len(lines) <= 180 and max(map(len, lines)) <= 400, page


def test_entries_of_the_log_have_the_shape_it_asks_for() -> None:
    (pattern,) = pages.blocks(LOG)
    heads = re.findall(r"^- \*\*(\w+):\*\*", pattern.code, re.MULTILINE)
    *_, entries = LOG.read_text().partition("<!-- entries start here -->")
    dates = []
    for entry in re.split(r"^## ", entries, flags=re.MULTILINE)[1:]:
        assert re.match(r"\d{4}-\d\d-\d\d \S[^\n]*\n", entry), entry[:60]
        assert re.findall(r"^- \*\*(\w+):\*\*", entry, re.MULTILINE) == heads, entry[:60]
        dates.append(entry[:10])
    assert dates == sorted(dates, reverse=True), "newest first"


def test_the_items_in_reproduce_are_those_of_the_suites() -> None:
    """A row starts with the suite's name in backticks; its last two cells are derived."""
    text = (DOCS / "reproduce.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE)
    assert {suite for suite, *_ in rows} == {"image", "image_local", "ablation"}
    per_second = [float(rate) for rate in re.findall(r"([\d.]+) items per second", text)]
    assert len(per_second) == 2
    for suite, items, *hours in rows:
        sizes = {k: n for mark in load_suite(suite).benchmarks for k, n in mark.samples.items()}
        total = sum(sizes.values())  # a task behind two benchmarks runs once
        assert int(items.replace(",", "")) == total
        for shown, rate in zip(hours, per_second, strict=True):
            assert float(shown) == pytest.approx(total / rate / 3600, abs=0.06)


def test_the_runs_in_reproduce_are_those_that_are_planned() -> None:
    text = (DOCS / "reproduce.md").read_text()
    rows = re.findall(
        r"^\| [^|]+ \| [^|]+ \| `scripts/(\w+)\.sh` \| (\d+|-) \| (\S.*?) \|", text, re.MULTILINE
    )
    assert {f"scripts/{script}.sh" for script, *_ in rows} == {
        f"scripts/{path.name}"
        for path in (ROOT / "scripts").glob("*.sh")
        if path.stem.startswith("table") or path.stem in ("pivot", "cross_model")
    }
    for script, count, suites in rows:
        config = CONFIGS / "runs" / f"{script}.yaml"
        if not config.exists():
            assert count == suites == "-", "measured, not evaluated"
            continue
        named = re.findall(r"`(\w+)`", suites)
        planned = [plan([config], [f"suite={suite}"]) for suite in named]
        assert int(count) == sum(map(len, planned)), script
        assert plan([config])[0].suite == named[0], script


@pytest.mark.parametrize("page", ["footguns", "reproduce"])
def test_the_keys_a_page_points_at_are_in_a_result(page: str) -> None:
    file = next((DOCS / "results" / "reproduce_mini").glob("mini-mini-todre-0.1-c*.json"))
    spans = pages.spans(DOCS / f"{page}.md")
    keys = [span for span in spans if re.fullmatch(r"(config|tokens|benchmarks)\.[\w.*]+", span)]
    assert keys
    for key in keys:
        level = json.loads(file.read_text())
        for part in key.split("."):
            level = next(iter(level.values())) if part == "*" else level[part]
