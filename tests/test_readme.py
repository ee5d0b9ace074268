"""What the README shows works as printed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from eval.readme import render
from llava_todre.cli import main
from llava_todre.pruners import PRUNERS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    for code in blocks("python"):
        exec(code, {})
    assert "of 320" in capsys.readouterr().out


def test_the_commands_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("todre ")]
    assert len(commands) >= 2
    for command in commands:
        assert main(command) == 0
    assert "visual tokens kept" in capsys.readouterr().out


def test_the_method_list_is_the_registry() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", README, flags=re.MULTILINE)
    assert set(rows) == set(PRUNERS)


def test_the_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = re.findall(r"(?:^|`)make ([a-z][a-z-]*)", README, flags=re.MULTILINE)
    assert len(named) >= 3
    for target in named:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_table_is_the_stored_one_and_the_page_is_short() -> None:
    assert render() == README, "run `make readme`"
    assert len(README.splitlines()) < 150
