"""What the README shows works as printed."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pages
import pytest

from eval.figures.registry import FIGURES
from eval.pages.readme import RESULTS, TABLES, readme, tables
from llava_todre.mini import NUM_IMAGES
from llava_todre.pruners import PRUNERS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pages.Outcome]:
    """What came of the README's code and commands."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("checkout")
        patch.chdir(pages.checkout(folder))
        yield pages.carry_out(ROOT / "README.md", folder)


def test_the_code_runs(outcome: pages.Outcome) -> None:
    said = "".join(outcome.said)
    assert "of 320" in said and outcome.names["cache"].prefixes.hits == 1
    assert outcome.names["output"].shape[1] > outcome.names["inputs"]["input_ids"].shape[1]


def test_the_commands_run(outcome: pages.Outcome) -> None:
    said = "".join(outcome.said)
    assert "visual tokens kept" in said, "todre generate"
    assert "--model llava_todre" in said, "scripts/table1_image.sh --dry-run"


def test_the_table_is_of_the_full_run_and_the_page_says_so() -> None:
    assert json.loads(RESULTS.read_text())["num_images"] == NUM_IMAGES
    assert f"from the full run, `make demo IMAGES={NUM_IMAGES}`" in " ".join(README.split())


def test_every_method_is_named_once() -> None:
    (section,) = re.findall(r"^## Methods\n(.*?)^## ", README, flags=re.DOTALL | re.MULTILINE)
    named = re.findall(r"`(\w+)`", section)
    assert {name: named.count(name) for name in PRUNERS} == dict.fromkeys(PRUNERS, 1)
    (others,) = re.findall(r"^Also: (.*?)\.$", section, flags=re.DOTALL | re.MULTILINE)
    rows = re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE)
    assert {*rows, *re.findall(r"\w+", others)} == set(PRUNERS), "and nothing else"


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


def test_table_and_list_are_current_and_the_page_is_short() -> None:
    assert readme() == README, "run `make readme`"
    assert tables() == TABLES.read_text(), "run `make readme`"
    assert len(README.splitlines()) < 200


def test_the_first_picture_is_a_figure() -> None:
    first, *_ = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    assert first.removeprefix("docs/figures/").removesuffix(".png") in FIGURES
