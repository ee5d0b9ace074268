"""What ends an interrupted run's use of its own answers: code that computes them, nothing else."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from llava_todre import source
from llava_todre.source import what_changed

ROOTS = ("lmms_plugin.model",)
NOT_NEEDED = ("ui/page.py", "cli.py", "viz.py", "demo.py", "table.py", "mini/loop.py")
CHANGES = (
    ("pruners/todre.py", "tau: float = 0.10", "tau: float = 0.11"),
    ("selection_triton.py", "import triton", "import triton, torch"),  # imported in a function
    ("hf/qwen.py", "_MAX_ENTRIES = 2**26", "_MAX_ENTRIES = 2**25"),
    ("stage2/probe.py", "self._num_stored", "self._number_stored"),
    ("lmms_plugin/__init__.py", "NAME = ", "OTHER = NAME = "),
    ("flops.py", "return 2 * 2 *", "return 2 * 3 *"),  # in the stored lines
)


@pytest.fixture(scope="module")
def before() -> dict[str, str]:
    return source.digests(*ROOTS)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the package whose sources may be changed."""
    copy = tmp_path / source.PACKAGE.name
    shutil.copytree(source.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(source, "PACKAGE", copy)
    source._file.cache_clear()
    yield copy
    source._file.cache_clear()


def digests() -> dict[str, str]:
    return source.digests.__wrapped__(*ROOTS)


def test_comments_docstrings_and_what_computes_no_answer_do_not_count(
    package: Path, before: dict[str, str]
) -> None:
    for file in package.rglob("*.py"):
        text = file.read_text()
        file.write_text(ast.unparse(ast.parse(text)) if len(text) % 2 else f"# more\n\n{text}")
    file = package / "pruners" / "todre.py"
    file.write_text(file.read_text().replace("Stage 1: grow", "Other words: grow"))
    for name in NOT_NEEDED:
        (package / name).write_text("raise SystemExit\n")
    (package / "new.py").write_text("x = 1\n")
    assert digests() == before


def test_code_that_computes_answers_counts_and_is_named(
    package: Path, before: dict[str, str]
) -> None:
    for name, old, new in CHANGES:
        text = (package / name).read_text()
        assert old in text
        (package / name).write_text(text.replace(old, new))
    after = digests()
    names = [name.removesuffix(".py").removesuffix("/__init__") for name, _, _ in CHANGES]
    differ = {name for name in before if before[name] != after[name]}
    assert differ == {name.replace("/", ".") for name in names}
    one = before | {"flops": after["flops"]}
    assert what_changed({"source": before}, {"source": one}) == "source (flops)"


def test_one_module_can_count_without_what_it_needs() -> None:
    alone = source.digests("errors", alone="demo")
    assert {"demo", "errors"} < set(alone) and not {"viz", "generate"} & set(alone)


def test_what_changed_names_parts_and_few_of_many() -> None:
    many = {name: 1 for name in "abcdef"}
    assert what_changed({"x": 1, "y": many}, {"x": 1, "y": many}) == ""
    assert what_changed({"x": 1, "y": {}}, {"y": many}) == "x, y (a, b, c and 3 more)"
    assert what_changed({"source": "text"}, {"source": many}) == "source"
