"""What the README shows works as printed."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from eval.readme import TABLES, readme, tables
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
    names: dict[str, Any] = {}
    for code in blocks("python"):
        exec(code, names)
    said = capsys.readouterr().out
    assert "of 320" in said and names["memory"].prefixes.hits == 1


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


def test_every_method_is_named_once() -> None:
    (section,) = re.findall(r"^## Methods\n(.*?)^## ", README, flags=re.DOTALL | re.MULTILINE)
    named = re.findall(r"`(\w+)`", section)
    assert {name: named.count(name) for name in PRUNERS} == dict.fromkeys(PRUNERS, 1)
    (others,) = re.findall(r"^Also: (.*?)\.$", section, flags=re.DOTALL | re.MULTILINE)
    rows = re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE)
    assert {*rows, *re.findall(r"\w+", others)} == set(PRUNERS), "and nothing else"


def test_the_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = re.findall(r"(?:^|`)make ([a-z][a-z-]*)", README, flags=re.MULTILINE)
    assert len(named) >= 3
    variables = set(re.findall(r"\b([A-Z]{3,})=", README))
    assert variables <= set(re.findall(r"\$\(if \$\(([A-Z]+)\)", makefile))
    for target in named:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_make_demo_passes_on_what_it_is_given() -> None:
    given = ["METHODS=all todre+vtw", "RATIOS=0.5 0.25", "IMAGES=2", "OUT=outputs/x y"]
    for arguments, expected, out in (
        (given, "--methods all todre+vtw --ratios 0.5 0.25 --num-images 2 --out", "outputs/x y"),
        ([], "", "outputs/demo"),
    ):
        shown = subprocess.run(
            ["make", "--no-print-directory", "-n", "demo", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        command, report = map(shlex.split, shown.stdout.splitlines()[-2:])
        assert command[1:4] == ["-m", "llava_todre.cli", "demo"]
        assert command[4:] == [*expected.split(), *([out] if arguments else [])]
        assert report[1:] == ["-m", "eval", "report", out]


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_table_and_list_are_current_and_the_page_is_short() -> None:
    assert readme() == README, "run `make readme`"
    assert tables() == TABLES.read_text(), "run `make readme`"
    assert len(README.splitlines()) < 180
