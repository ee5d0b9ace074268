"""Whatever ends a command early is one line on standard error, and never a traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from eval.__main__ import main as evaluation
from llava_todre.cli import main as todre
from llava_todre.command import run_command
from llava_todre.errors import TodreError

ROOT = Path(__file__).parents[1]
CODE = "import sys; from llava_todre.command import run_command\ndef call():\n{}\n"
CODE += "sys.exit(run_command('it', call))"


def raising(error: BaseException) -> Callable[[], int]:
    def call() -> int:
        raise error

    return call


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (TodreError("tau 2 is\nout of range."), 1, "it: error: tau 2 is out of range."),
        (OSError(28, "No space left on device", "a.json"), 1, "it: error: 'a.json': No space left"),
        (OSError(30, "Read-only file system"), 1, "it: error: output: Read-only file system."),
        (KeyError("doc_id"), 1, "it: error: KeyError: 'doc_id' (--debug shows where)"),
        (KeyboardInterrupt(), 130, "it: interrupted"),
    ],
)
def test_an_error_is_one_line_and_a_status(
    error: BaseException, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("it", raising(error)) == status
    printed = capsys.readouterr()
    assert printed.err.startswith(said) and printed.err.count("\n") == 1 and not printed.out


def test_debug_shows_where() -> None:
    with pytest.raises(KeyError):
        run_command("it", raising(KeyError("doc_id")), debug=True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_told() -> None:
    code = CODE.format("  print('x'); return 0")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )
    assert done.returncode == 1
    assert done.stderr == "it: error: output: No space left on device.\n"


def test_a_reader_that_has_enough_is_no_error() -> None:
    code = CODE.format("  for _ in range(9999): print('x' * 99)\n  return 0")
    line = f'set -o pipefail; "{sys.executable}" -c "$CODE" | head -1'
    done = subprocess.run(
        ["bash", "-c", line], env=os.environ | {"CODE": code}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (141, "x" * 99 + "\n", "")


@pytest.mark.parametrize("module", ["eval", "llava_todre.cli"])
def test_ctrl_c_while_modules_are_imported_is_one_line(module: str, tmp_path: Path) -> None:
    slow = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n"
    (tmp_path / "torch.py").write_text(slow)  # in place of the real one, which takes seconds
    done = subprocess.run(
        [sys.executable, "-m", module, "list"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert done.returncode == 130
    assert done.stderr.endswith(": interrupted\n") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["convert", "--model", "x", "--out", ""], "out must have a value or be left out, got ''"),
        (["demo", "--out="], "out must have a value or be left out, got ''"),
        (["generate", "--model", "", "--image", "x", "--question", "y"], "model must have a value"),
        (["demo", "--num-images", "1000000000000"], "num_images 1000000000000 is out of range"),
        (["demo", "--num-images", "-1"], "num_images -1 is out of range"),
    ],
)
def test_values_that_would_be_taken_for_something_else_are_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert todre(arguments) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("argument", ["", "--out="])
def test_empty_arguments_of_eval_are_refused(
    argument: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*(["--out"] if not argument else []), argument]
    assert evaluation(["run", "configs/runs/mini.yaml", "--dry-run", *given]) == 1
    assert f"argument {argument!r} is empty" in capsys.readouterr().err


def test_config_files_of_the_command_are_read_with_care(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "demo.yaml"
    file.write_text("num_images: 2\nnum_images: 3")
    assert todre(["demo", "--config", str(file)]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"todre: error: config {str(file)!r} ")
    assert "key 'num_images' is there twice" in told


def test_what_is_wrong_stays_in_a_message_that_quotes_something_long() -> None:
    told = str(TodreError(f"model {'x' * 5000!r} does not load: no {'y' * 5000!r} is there."))
    assert len(told) < 400
    assert "...xxx" in told
    assert " does not load: no 'yyy" in told
    assert told.endswith("yyy' is there.")
