"""docs/methods.md is current, complete, and says of the bundled model what is so."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eval.__main__ import main
from eval.mini import TASKS, held_out
from eval.pages import methods as docs
from eval.pages import performance
from eval.pages.fill import template
from eval.results.bootstrap import difference
from llava_todre import load_pretrained_model
from llava_todre.pruners import PRUNERS, Pruner
from llava_todre.spans import VisualTokens
from llava_todre.viz import token_boxes
from llava_todre.vlm import Request, answer

ROOT = Path(__file__).parents[1]


def stored(methods: list[str]) -> dict[str, Any]:
    """Results as `todre demo` writes them, of made-up hits."""
    draw = torch.Generator().manual_seed(0)

    def hits() -> dict[str, list[int]]:
        return {task: (torch.rand(6, generator=draw) < 0.7).int().tolist() for task in TASKS}

    runs = [{"run": {"method": "vanilla", "retain_ratio": 1.0, "draw": 0}, "hits": hits()}]
    for ratio in (0.25, 0.1):
        for method in methods:
            for n in range(3 if method == "random" else 1):
                run = {"method": method, "retain_ratio": ratio, "draw": n}
                runs.append({"run": run, "hits": hits()})
    rows = []
    for method, ratio in dict.fromkeys(
        (run["run"]["method"], run["run"]["retain_ratio"]) for run in runs
    ):
        row = {"method": method, "retain_ratio": ratio, "draws": 3 if method == "random" else 1}
        row |= {"kept_tokens": 320 * ratio, "mean_visual_tokens_per_layer": 336 * ratio}
        row |= {"flops_share": ratio, "average": 0.5, "relative_average": 0.75}
        row |= {"relative_interval": [0.7, 0.8], "prefill_speedup": {"median": 2.0}}
        row |= {"first_token_speedup": {"median": 1.5}}
        rows.append(row)
    return {
        "rows": rows,
        "runs": runs,
        "interval": {"resamples": 2000},
        "versions": {"torch": "2", "transformers": "5"},
        **{"git_dirty": False, "git_commit": "0" * 40, "device": "a CPU", "tasks": list(TASKS)},
        **{"questions": 54, "num_images": 6, "seed": 1},
    }


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the page goes; its results are made up and know three methods."""
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    monkeypatch.setattr(docs, "PAGE", tmp_path / "methods.md")
    monkeypatch.setattr(docs, "METHOD_FILES", tmp_path)
    monkeypatch.setattr(performance, "PAGE", tmp_path / "performance.md")
    monkeypatch.setattr(docs, "RESULTS", tmp_path / "results.json")
    (tmp_path / "results.json").write_text(json.dumps(stored(["todre", "random", "todre_v1"])))
    return tmp_path / "methods.md"


def test_the_page_in_the_repository_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["docs", "--check"])
    assert status == 0, "".join(capsys.readouterr())
    text = docs.PAGE.read_text()
    assert "{{" not in text
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (docs.PAGE.parent / target).exists(), target


def test_write_then_check(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["docs", "--check"]) == 1
    assert "make docs" in capsys.readouterr().out
    assert main(["docs"]) == main(["docs", "--check"]) == 0
    page.write_text(page.read_text().replace("FLOPs", "flops", 1))
    assert main(["docs", "--check"]) == 1


def test_missing_results_are_one_clear_line(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    docs.RESULTS.unlink()
    for arguments in (["docs"], ["docs", "--check"]):
        assert main(arguments) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "results.json is missing" in line and "make demo METHODS=all" in line
    assert not page.exists()


def test_every_method_is_described_in_the_order_of_the_registry(page: Path) -> None:
    text = docs.render()
    table, rest = text.split("## How cost is counted")
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", table, re.MULTILINE)
    assert [name for name, _ in rows] == list(PRUNERS)
    for name, cells in rows:
        about = PRUNERS[name].about
        paper, _, _, _, *rule = (cell.replace("\\|", "|") for cell in cells.split(" | "))
        assert paper == about.paper
        assert rule == [about.budget_note, about.count]
    assert "`cls_attention` -1 |" in dict(rows)["todre"]
    listed = re.findall(r"^\*\*`(\w+)`\*\*$", rest, re.MULTILINE)
    assert listed == [name for name in PRUNERS if PRUNERS[name].about.deviations]
    for method in PRUNERS.values():
        assert all(f"\n- {sentence}\n" in rest for sentence in method.about.deviations)


def test_results_stand_in_the_order_of_the_registry_with_intervals_and_leads(page: Path) -> None:
    results = json.loads(docs.RESULTS.read_text())
    text = docs.render()
    quarter = text[text.index("### `retain_ratio` 25%") : text.index("### `retain_ratio` 10%")]
    rows = re.findall(r"^\| `(\w+)`(.*?) \| (.*) \|$", quarter, re.MULTILINE)
    assert [name for name, _, _ in rows] == ["vanilla", "random", "todre", "todre_v1"]
    assert rows[1][1] == " (mean of 3)"
    vanilla, random, todre, v1 = (cells.split(" | ") for _, _, cells in rows)
    assert todre == ["80", "84", "25%", "50.0", "75.0% [70.0, 80.0]", "", "2.0x", "1.5x"]
    assert vanilla[5] == ""
    hits = [run["hits"] for run in results["runs"]]  # vanilla, todre, random three times, todre_v1
    for cells, draws in ((random, hits[2:5]), (v1, hits[5:6])):
        low, high = difference(draws, hits[1:2], hits[0])["relative"]
        assert cells[5] == f"+0.0 [{100 * low:.1f}, {100 * high:.1f}]"
    missing = [name for name in PRUNERS if name not in ("vanilla", "random", "todre", "todre_v1")]
    assert f"No stored result yet: `{'`, `'.join(missing)}`." in text


def test_facts_about_the_model_are_those_of_its_card() -> None:
    text = " ".join(template("methods").split())
    card = " ".join((ROOT / "checkpoints" / "mini" / "README.md").read_text().split())
    assert "5.6 million parameters" in text and "5.6 million parameter LLaVA" in card
    assert "decoder of ten layers" in text and "10 layers" in card
    assert "In half of the AnyRes steps" in card and "Half of the AnyRes training steps" in text
    assert "of the second half of the layers" in card and "second half of the decoder" in text


@dataclass(frozen=True, kw_only=True)
class LooksAtCls(Pruner):
    """Keeps the crops' tokens of highest [CLS] attention and notes how many show foreground."""

    layer: int = -1

    @property
    def needs(self) -> set[Any]:
        return {("cls_attention", self.layer)}

    def select(self, tokens: VisualTokens, num_keep: int) -> Tensor:
        score = tokens.vision["cls_attention", self.layer].masked_fill(tokens.view == 0, -1)
        return score.topk(num_keep).indices


def test_what_the_page_says_of_attention_is_so() -> None:
    """[CLS] looks at objects in tower layer -2, at background in -1; text looks late."""
    tokenizer, model, _, _ = load_pretrained_model(ROOT / "checkpoints" / "mini")
    on_objects = dict.fromkeys((-2, -1), 0.0)
    right = {2: 0, 6: 0}
    samples = held_out(4)
    for sample in samples:
        ask = [Request(question.text, [sample.image]) for question in sample.questions]
        for layer in on_objects:
            model.set_pruner(LooksAtCls(layer=layer))
            stats = answer(model, tokenizer, ask[:1], max_new_tokens=1)[0].stats.images[0]
            boxes = token_boxes(stats, sample.image.size, model.config, 112)
            kept = [[round(edge) for edge in boxes[i]] for i in stats.keep_idx.tolist()]
            seen = [sample.foreground[y0:y1, x0:x1].mean() > 0.2 for x0, y0, x1, y1 in kept]
            on_objects[layer] += sum(seen) / len(seen) / len(samples)
        for layer in right:
            model.set_pruner("fastv", retain_ratio=0.25, layer=layer)
            given = answer(model, tokenizer, ask, max_new_tokens=6)
            pairs = zip(given, sample.questions, strict=True)
            right[layer] += sum(one.text == question.answer for one, question in pairs)
    assert on_objects[-1] < 0.4 < 0.6 < on_objects[-2], on_objects
    assert right[6] > 1.4 * right[2], right
