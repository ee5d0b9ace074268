"""docs/add_a_method.md works as printed."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pages
import pytest
import shell_lines

from llava_todre import load_pretrained_model
from llava_todre.catalogue import reads_text, where
from llava_todre.cli import main
from llava_todre.pruners import PRUNERS, About, LayerView, Pruner, Todre, create_pruner
from llava_todre.spans import VisualTokens
from llava_todre.vlm import Request, answer

ROOT = Path(__file__).parents[1]
FILE = ROOT / "docs" / "add_a_method.md"
PAGE = FILE.read_text()
FILES = dict(re.findall(r"^`(\S+)`[^\n]*:\n\n```\w+\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE))
METHOD = "llava_todre/pruners/norm.py"
REGISTRY, TEST = "llava_todre/pruners/__init__.py", "tests/methods/test_norm.py"
(GLANCE,) = (block.code for block in pages.blocks(FILE, "python") if "Glance" in block.code)
COMMANDS = [block.code for block in pages.blocks(FILE, "bash")]
SCENE = "checkpoints/mini/examples/scene_0.png"


def module(name: str, code: str, folder: Path, patch: pytest.MonkeyPatch) -> ModuleType:
    file = folder / (name.rpartition(".")[2] + ".py")
    file.write_text(code)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    patch.setitem(sys.modules, name, loaded)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in which the steps of the page have been done."""
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    (tmp_path / "configs" / "methods").mkdir(parents=True)
    module("llava_todre.pruners.norm", FILES[METHOD], tmp_path, monkeypatch)
    imports, _, lines = FILES[REGISTRY].partition("\n\n")
    names: dict[str, object] = {}
    exec(imports, names)
    for name, method in eval("{" + textwrap.dedent(lines) + "}", names).items():
        monkeypatch.setitem(PRUNERS, name, method)
    monkeypatch.chdir(tmp_path)
    yield tmp_path


def test_the_commands_run_and_keep_what_was_asked_for(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = COMMANDS
    listing, generate, demo = (words[1:] for words in shell_lines.lines_of(code))
    assert listing[2] == ">" and main(listing[:2]) == 0
    Path(listing[3]).write_text(capsys.readouterr().out)
    assert main([*generate, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept_tokens"] == 80
    demo[demo.index("--num-images") + 1] = "1"
    demo.remove("random")
    assert main([*demo, "--ratios", "0.25"]) == 0
    rows = capsys.readouterr().out
    assert re.search(r"^norm 25% +80 ", rows, re.MULTILINE)
    assert re.search(r"^norm\+todre 25% +80 ", rows, re.MULTILINE)
    assert (project / "outputs" / "norm" / "runs" / "norm-todre_0.25.json").exists()


def test_a_bad_option_is_refused_and_the_catalogue_knows_the_method(project: Path) -> None:
    with pytest.raises(ValueError, match=r"p must be a number, p >= 1, got 0\.5"):
        create_pruner("norm", p=0.5)
    assert where(PRUNERS["norm"]) == "before" and not reads_text(PRUNERS["norm"])


def test_the_test_passes_and_would_notice_a_wrong_order(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = module("test_norm", FILES[TEST], project, monkeypatch)
    (name,) = (name for name in vars(test) if name.startswith("test_"))
    function = getattr(test, name)
    function()
    shortest = FILES[METHOD].replace("length.topk", "(-length).topk")
    wrong = module("llava_todre.pruners.norm", shortest, project, monkeypatch)
    monkeypatch.setitem(PRUNERS, "norm", wrong.Norm)
    with pytest.raises(AssertionError):
        function()


def test_the_method_inside_the_decoder_drops_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    glance = module("llava_todre.pruners.glance", GLANCE, tmp_path, monkeypatch).Glance
    monkeypatch.setitem(PRUNERS, "glance", glance)
    assert where(glance) == "inside" and reads_text(glance)
    tokenizer, model, _, _ = load_pretrained_model(ROOT / "checkpoints" / "mini")
    model.set_pruner("glance", retain_ratio=0.25)
    given = answer(model, tokenizer, [Request("What does the sign say?", [str(ROOT / SCENE)])])
    layers = given[0].stats.visual_tokens_per_layer
    assert given[0].stats.kept_tokens == 320
    assert layers[:4] == (336,) * 4, "layers 0 to 3 see everything"
    assert len(set(layers[4:])) == 1 and 80 <= layers[4] <= 96


def names_in(code: str) -> set[str]:
    """Return the names of the contract that code uses: imported, overridden or read."""
    nodes = [vars(node) for node in ast.walk(ast.parse(code))]
    used = {node.get("id", node.get("attr", node.get("name"))) for node in nodes}
    classes = (About, LayerView, Todre, VisualTokens)
    fields = {field.name for each in classes for field in dataclasses.fields(each)}
    names = {each.__name__ for each in (*classes, Pruner)} | {"option"}
    known = names | fields | {*dir(LayerView), *dir(Pruner)}
    return used & known - {"view"}  # the argument of at_layer


def test_a_method_inside_the_decoder_needs_six_more_names() -> None:
    first = names_in(FILES[METHOD])
    assert first == {
        "About", "Pruner", "VisualTokens", "about", "features", "num_keep", "option", "select"
    }  # fmt: skip
    assert names_in(GLANCE) - first == {
        "LayerView", "at_layer", "attention", "patches", "probe_depths", "visual_counts"
    }  # fmt: skip


def test_the_page_is_short_and_all_of_its_code_is_run_here() -> None:
    assert set(FILES) == {METHOD, REGISTRY, TEST}
    assert {block.code for block in pages.blocks(FILE)} == {*FILES.values(), GLANCE, *COMMANDS}
    assert len(PAGE.splitlines()) <= 130
