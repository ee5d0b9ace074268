"""The report: one file, made from what the demo or a sweep left, that requests nothing."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from eval.__main__ import main
from eval.mini import held_out
from eval.pages.readme import REPRODUCED
from eval.report import charts, page
from eval.report.answers import of_runs
from eval.report.command import report
from eval.report.runs import pruner_of
from llava_todre.errors import TodreError
from llava_todre.model.checkpoint import bundled_checkpoint
from llava_todre.model.load import load_pretrained_model
from llava_todre.vlm import Request, answer


class Reader(HTMLParser):
    """Collects what a page links to, its pictures, marks and tables."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.alts: list[str] = []
        self.marks: list[str] = []
        self.tags: list[str] = []
        self.cells: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        self.sources += [str(given[key]) for key in ("src", "href", "action") if key in given]
        if tag == "img":
            self.alts.append(str(given["alt"]))
        if given.get("class") in ("right", "wrong"):
            self.marks.append(str(given["class"]))
        if tag in ("td", "th"):
            self.cells.append("")
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    assert not reader.open
    return reader


@pytest.fixture(scope="module")
def demo(
    finished: tuple[Path, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], str]:
    """The results of a demo and the text of its report."""
    folder = tmp_path_factory.mktemp("report")
    shutil.copy(finished[0] / "results.json", folder)
    assert main(["report", str(folder)]) == 0
    return finished[1], (folder / "report.html").read_text()


def test_the_demo_has_a_report_with_tables_images_answers_and_origin(
    demo: tuple[dict[str, Any], str],
) -> None:
    results, text = demo
    found = read(text)
    for row in results["rows"]:
        assert f"{100 * row['average']:.1f}" in found.cells
    assert {"todre 25%", "random 25% (mean of 3)", "vanilla 100%"} <= set(found.cells)
    kept = [alt for alt in found.alts if alt.startswith("Visual tokens kept by")]
    assert len(kept) == 2 * 3, "two images, three methods"
    assert "Visual tokens kept by todre 25%: 80 of 320 tokens enter the decoder" in kept
    assert {results["git_commit"], results["device"], results["versions"]["torch"]} <= set(
        found.cells
    )


def test_answers_are_marked_as_the_run_found_them(demo: tuple[dict[str, Any], str]) -> None:
    results, text = demo
    first = [run for run in results["runs"] if run["run"]["draw"] == 0]
    right = sum(hit for run in first for hits in run["hits"].values() for hit in hits)
    asked = sum(len(hits) for run in first for hits in run["hits"].values())
    marks = read(text).marks
    assert (marks.count("right"), len(marks)) == (right, asked)
    assert 0 < right < asked


def test_a_report_requests_nothing(demo: tuple[dict[str, Any], str]) -> None:
    text = demo[1]
    assert all(source.startswith(("data:", "#")) for source in read(text).sources)
    assert "default-src 'none'" in text and "<script" not in text
    assert not re.search(r"url\(|@import|https?://", text)


def test_runs_without_their_logs_have_a_report_without_answers(tmp_path: Path) -> None:
    """Of runs in the tables of the papers, one that is in none, and one that failed."""
    for name in ("vanilla-1", "todre-0.1", "divprune-0.25", "todre-1-tau-0.05", "todre-1-tau-0.03"):
        (file,) = REPRODUCED.glob(f"mini-mini-{name}-????????.json")
        shutil.copy(file, tmp_path)
    run = json.loads(next(REPRODUCED.glob("*-todre-1-tau-0.15-*.json")).read_text())
    run["config"]["options"] = {"retain_ratio": 0.3, "tau": 0.07}
    (tmp_path / "run.json").write_text(json.dumps(run))
    run = json.loads(next(REPRODUCED.glob("*random-0.1-*.json")).read_text())
    run |= {"status": "failed", "error": "the <model> broke", "benchmarks": {}}
    (tmp_path / "failed.json").write_text(json.dumps(run))
    found = read(report(tmp_path))
    assert {"todre 10%", "98.3", "[97.2, 99.3]", "todre stage 2, tau 0.05"} <= {
        line for cell in found.cells for line in cell.split("\n")
    }
    assert {"retain_ratio=0.3, tau=0.07", "the <model> broke"} <= set(found.cells)
    assert found.marks == []
    assert any(alt.startswith("Visual tokens kept by divprune 25%") for alt in found.alts)
    assert any("threshold tau" in alt for alt in found.alts), "a figure"


def test_pictures_of_runs_show_the_tokens_that_led_to_the_answers() -> None:
    """Of a random method as well, whose draw belongs to the item."""
    run = json.loads(next(REPRODUCED.glob("mini-mini-random-0.1-*.json")).read_text())
    tokenizer, model, _, _ = load_pretrained_model(bundled_checkpoint())
    for doc_id, sample in enumerate(held_out(2)):
        model.set_pruner(pruner_of(run, doc_id))
        requests = [Request(question.text, [sample.image]) for question in sample.questions]
        given = answer(model, tokenizer, requests, max_new_tokens=8)
        for question, said in zip(sample.questions, given, strict=True):
            score = dict(run["benchmarks"][question.task]["items"])[doc_id]
            assert (said.text.strip().lower() == question.answer.lower()) == bool(score)


def test_answers_of_runs_come_from_their_logs(tmp_path: Path) -> None:
    name = "mini-mini-todre-0.1-c13855e2"
    run = json.loads((REPRODUCED / f"{name}.json").read_text())
    run["benchmarks"] = {key: run["benchmarks"][key] for key in ("exist", "count")}
    count = run["benchmarks"]["count"]
    item, score = next(pair for pair in count["items"] if pair[1] == 0.0)
    count |= {"items": [[item, score]], "groups": [0]}
    line = {"task": count["task"], "split": "test", "doc_id": item, "repeat": 0, "batch": "b"}
    numbers = ("visual_tokens", "kept_tokens", "mean_visual_tokens_per_layer", "prefill_flops")
    numbers += ("prefill_flops_unpruned", "seconds", "peak_memory_mib")
    line |= {"withdrawn_from": None, **dict.fromkeys(numbers, 1)}
    line |= {"prompt": "How <many>?", "answer": "nine & more"}
    log = tmp_path / "logs" / name
    (log / "abc").mkdir(parents=True)
    (log / "current").write_text("abc")
    (log / "abc" / "count.test.rank0.jsonl").write_text(json.dumps(line) + "\n")
    raw = tmp_path / "raw" / name / "model"
    raw.mkdir(parents=True)
    record = {"doc_id": item, "target": "two"}
    (raw / f"1_samples_{count['task']}.jsonl").write_text(json.dumps(record) + "\n")

    (asked,), *rest = of_runs({"todre 10%": run}, tmp_path, 3)
    assert (asked.task, asked.question, asked.expected) == ("count", "How <many>?", "two")
    assert asked.given == {"todre 10%": ("nine & more", False)} and rest == [[], []]

    run["config"]["suite"] = "another"  # of which there are no pictures
    (tmp_path / f"{name}.json").write_text(json.dumps(run))
    text = report(tmp_path)
    assert "How &lt;many&gt;?" in text and "nine &amp; more" in text
    assert read(text).marks == ["wrong"] and "kept by" not in text


def damaged(change: Callable[[dict[str, Any]], object]) -> Callable[[Path, dict[str, Any]], None]:
    """Return what writes changed results of a demo into a folder."""

    def write(folder: Path, results: dict[str, Any]) -> None:
        results = json.loads(json.dumps(results))
        change(results)
        (folder / "results.json").write_text(json.dumps(results))

    return write


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder, _: folder.rmdir(), "is not a folder"),
        (lambda folder, _: None, "holds no results"),
        (lambda folder, _: (folder / "results.json").write_text("{"), "is not JSON"),
        (lambda folder, _: (folder / "results.json").write_text("[]"), "holds no results"),
        (damaged(lambda results: results.pop("versions")), "holds no results"),
        (damaged(lambda results: results["rows"].clear()), "holds no results"),
        (damaged(lambda results: results["runs"][0]["run"].update(old=1)), "of another version"),
    ],
)
def test_a_folder_without_whole_results_is_one_line(
    prepare: Callable[..., object],
    message: str,
    finished: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(charts, "of_demo", lambda file: [])
    folder = tmp_path / "results"
    folder.mkdir()
    prepare(folder, finished[1])
    with pytest.raises(TodreError, match=message) as caught:
        report(folder)
    assert "\n" not in str(caught.value)


def test_text_is_escaped_once() -> None:
    assert page.text("<b>") == "&lt;b&gt;" == page.text(page.text("<b>"))
    cell = page.table(["a"], [["x < y"]])
    assert "x &lt; y" in cell
