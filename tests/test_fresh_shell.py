"""README's commands as a newcomer types them: in order, in one new shell with the system's PATH.

Three things differ. ``make`` and ``pip`` say what they would do: what ``make`` does takes half an
hour, and this test is part of it. And the hub cannot be reached: lmms-eval comes as far as our
plug-in, which does not find the 7B checkpoint.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pages
import pytest

ROOT = Path(__file__).parents[1]
HERE = Path(sys.prefix)
pytestmark = pytest.mark.skipif(
    not (HERE / "bin" / "activate").exists(), reason="needs the environment of `make setup`"
)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a checkout after ``make setup``."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    (pages.checkout(folder) / ".venv").symlink_to(HERE)
    return folder


def new_shell(script: str, folder: Path) -> str:
    """Carry out a script that stops at the first failure; returns what it and its trace say."""
    home = folder.parent / "home"
    home.mkdir()
    clean = {"PATH": "/usr/bin:/bin", "HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = ["bash", "--norc", "-ex", "-c", script]
    done = subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-3000:]
    return said


def test_readme_from_top_to_bottom(checkout: Path) -> None:
    typed = "".join(block.code for block in pages.blocks(ROOT / "README.md", "bash"))
    stubs = """
        make() { command make -n "$@" > /dev/null; }
        pip() { command pip "$1" --dry-run --no-deps --no-build-isolation --quiet "${@:2}"; }
    """
    said = new_shell(f"{stubs}\n{typed}", checkout)
    assert "visual tokens kept" in said, "todre generate"
    assert "before the decoder" in said, "todre list"
    assert "TodreError: model_path 'liuhaotian/llava-v1.6-vicuna-7b'" in said, "lmms-eval"
    assert said.count("--model llava_todre --model_args") == 15, "scripts/table1_image.sh"


def test_a_script_needs_no_activated_environment(checkout: Path) -> None:
    (checkout / ".venv").unlink()
    (checkout / ".venv" / "bin").mkdir(parents=True)
    stub = checkout / ".venv" / "bin" / "python"
    stub.write_text('#!/bin/sh\necho "the own python: $*"\n')
    stub.chmod(0o755)
    said = new_shell("bash scripts/table1_image.sh --dry-run", checkout)
    assert "the own python: -m eval run configs/runs/table1_image.yaml" in said


def test_a_script_without_an_environment_says_in_one_line_what_is_missing(checkout: Path) -> None:
    (checkout / ".venv").unlink()
    script = "ln -s /usr/bin/false python; PATH=.:$PATH bash scripts/smoke.sh --dry-run || true"
    said = new_shell(script, checkout)
    assert said.splitlines()[-2:] == ["llava_todre is not installed here: make setup", "+ true"]
