"""Runs become results: done ones are kept, failures are told, a kill costs the items in flight."""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from eval.run import collect as outcome
from eval.run import commands, launch, processes
from eval.run.collect import complete, last_error, read_record
from eval.run.launch import execute
from eval.run.processes import Launch, command
from eval.run.spec import ROOT, Run, resolve
from llava_todre import files
from llava_todre.errors import TodreError

FAKE = Path(__file__).with_name("fake_lmms_eval.py")
CONFIG: dict[str, Any] = {"model": "mini", "suite": "mini", "limit": 2}
SWEEP = """
base: {model: mini, suite: mini, limit: 2}
grid:
  - {method: [vanilla]}
  - {method: [todre, divprune], ratio: [0.25]}
"""


_provenance = functools.cache(outcome.provenance)
"""It calls git and reads the versions of all packages."""


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(launch, "prepare", lambda suite: None)
    monkeypatch.setattr(launch, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(outcome, "provenance", _provenance)
    monkeypatch.setattr(launch, "visible_gpus", lambda: ())
    monkeypatch.setattr(commands, "visible_gpus", lambda: ())


@pytest.fixture
def evaluate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run ``sweep`` on three runs, with faults of the fake; returns status, stdout and stderr."""
    (tmp_path / "sweep.yaml").write_text(SWEEP)

    def run(
        *arguments: str, fault: str = "", only: str = "", pause: float = 0.0
    ) -> tuple[int, str, str]:
        program = (str(FAKE), "--fault", fault, "--only", only, "--pause", str(pause))
        monkeypatch.setattr(commands, "Launch", functools.partial(Launch, program=program))
        parser = argparse.ArgumentParser()
        commands.add_parser(parser.add_subparsers(dest="command"))
        given = ["sweep", str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "out"), *arguments]
        capsys.readouterr()
        status = commands.run(parser.parse_args(given))
        return status, *capsys.readouterr()

    return run


def records(out: Path) -> dict[str, dict[str, Any]]:
    """Return the stored runs by method."""
    found = [json.loads(file.read_text()) for file in out.glob("*.json")]
    return {record["config"]["method"]: record for record in found}


def run_of(method: str = "todre", **changes: Any) -> Run:
    return resolve(CONFIG | {"method": method} | changes)


def carried_out(out: Path, fault: str = "", **changes: Any) -> dict[str, Any]:
    """Carry out one run; returns what it stored."""
    run, how = run_of(**changes), Launch(out, program=(str(FAKE), "--fault", fault))
    execute([run], how)
    return read_record(how.file(run)) or {}


# ------------------------------------------------------------------------------- results


def test_a_run_leaves_one_json_with_everything(
    evaluate: Callable[..., Any], tmp_path: Path
) -> None:
    status, _, said = evaluate()
    assert status == 0 and "3 runs complete, 0 failed" in said
    found = records(tmp_path / "out")
    assert set(found) == {"vanilla", "todre", "divprune"}
    record = found["todre"]
    assert record["format"] == 1 and record["status"] == "complete" and record["error"] is None
    assert record["name"] in {file.stem for file in (tmp_path / "out").glob("*.json")}
    assert record["config"]["options"] == {"retain_ratio": 0.25}
    assert list(record["benchmarks"]) == record["config"]["benchmarks"]
    exist = record["benchmarks"]["exist"]
    assert exist["num_samples"] == 2 and [doc for doc, _ in exist["items"]] == [0, 1]
    assert exist["score"] == 50 * sum(score for _, score in exist["items"])
    assert record["seconds"] == pytest.approx(18 * 0.25)
    assert record["items_per_second"] == pytest.approx(4.0)
    assert record["tokens"]["kept_tokens"] == 80 and record["tokens"]["withdrawn_share"] == 0
    assert record["peak_memory_mib"] == 100
    assert {"git_commit", "versions", "device", "time_utc"} <= set(record)
    assert record["versions"].keys() >= {"torch", "lmms_eval"}


def test_time_is_that_of_the_scored_items_and_shared_by_processes(tmp_path: Path) -> None:
    run, how = run_of(), Launch(tmp_path, program=(str(FAKE),))
    execute([run], how)
    work, log_dir = tmp_path / "raw" / run.name, tmp_path / "logs" / run.name
    log = log_dir / "fingerprint" / "todre_mini_exist.test.rank0.jsonl"
    line = json.loads(log.read_text().splitlines()[0])
    log.write_text(log.read_text() + json.dumps(line | {"doc_id": 9, "seconds": 99.0}) + "\n")
    record = complete(run, work, log_dir, processes=2)
    assert record["seconds"] == pytest.approx(18 * 0.25 / 2) and record["processes"] == 2
    split = run_of(model={"key": "mini", "tp_plan": "auto"})
    assert complete(split, work, log_dir, processes=2)["seconds"] == pytest.approx(18 * 0.25)


def test_means_are_over_prompts_that_show_something(tmp_path: Path) -> None:
    """ScienceQA has questions without an image, on which nothing can be pruned."""
    found = carried_out(tmp_path, "text only", limit=3)
    tokens = found["tokens"]
    tasks = len(found["benchmarks"])
    assert (tokens["prompts"], tokens["prompts_with_visuals"]) == (3 * tasks, 2 * tasks)
    assert (tokens["visual_tokens"], tokens["kept_tokens"]) == (320, 80)
    assert (tokens["prefill_flops"], tokens["withdrawn_share"]) == (1e9, 0.0)
    tokens = carried_out(tmp_path, "text only", limit=1)["tokens"]  # none has an image
    assert tokens["prompts_with_visuals"] == 0 and tokens["kept_tokens"] is None


@pytest.mark.parametrize(
    ("fault", "seconds", "groups"),
    [("", 4 * 0.5, [0, 0, 1, 1]), ("old log", None, None)],
)
def test_computing_time_and_images_of_items_come_from_the_log(
    fault: str, seconds: float | None, groups: list[int] | None, tmp_path: Path
) -> None:
    """A log of an earlier version has neither."""
    found = carried_out(tmp_path, fault, limit=4)
    marks = found["benchmarks"].values()
    assert found["cpu_seconds"] == (seconds and seconds * len(marks))
    assert [mark["groups"] for mark in marks] == [groups] * len(marks)


def test_what_is_done_is_not_done_again(evaluate: Callable[..., Any], tmp_path: Path) -> None:
    evaluate()
    before = {file: file.read_bytes() for file in (tmp_path / "out").glob("*.json")}
    status, _, said = evaluate(fault="no data")
    assert status == 0 and "3 runs complete" in said
    assert before == {file: file.read_bytes() for file in (tmp_path / "out").glob("*.json")}


def test_a_damaged_result_is_made_again(tmp_path: Path) -> None:
    run, how = run_of(), Launch(tmp_path, program=(str(FAKE),))
    file = how.file(run)
    for content in ("{", "[]", '{"format": 0, "status": "complete"}', '{"format": 1}'):
        file.write_text(content)
        assert read_record(file) is None, content
    execute([run], how)
    assert (read_record(file) or {})["status"] == "complete"


FAULTS = {
    "no data": "FileNotFoundError: Couldn't find any data file",
    "raises": "ValueError: image of document 1 of todre_mini_exist is broken",
    "killed": "ended by signal 9",
    "truncated": "_results.json' are damaged",
    "few": "task 'todre_mini_exist': 1 items were scored; suite 'mini' expects 2",
    "no metric": "metric 'exact_match' is missing; found: something_else",
    "nan": "metric 'exact_match' is nan",
    "no samples": "left 0 samples files; expected: 1",
    "odd samples": "KeyError: 'doc_id'",
    "torn samples": "samples_todre_mini_exist.jsonl' are damaged",
}


def test_a_failed_run_has_a_reason_and_never_a_score(tmp_path: Path) -> None:
    """Each of the runs fails in another way, and the last one is complete."""
    program, runs = [str(FAKE)], {}
    for seed, fault in enumerate(FAULTS):
        # With a limit, a metric may be missing because none of its items were scored.
        runs[fault] = run_of(seed=seed, limit=96 if fault == "no metric" else 2)
        program += ["--fault", fault, "--only", runs[fault].name]
    whole = run_of("divprune")
    how = Launch(tmp_path, program=tuple(program))
    report = execute([*runs.values(), whole], how)
    assert report.done == [whole.name]
    for fault, run in runs.items():
        record = read_record(how.file(run)) or {}
        assert record["status"] == "failed" and record["error"] == report.failed[run.name]
        assert FAULTS[fault] in record["error"]
        assert record["benchmarks"] == {} and record["tokens"] is None


def test_a_failed_run_is_repeated_on_demand_and_keeps_its_answers(
    evaluate: Callable[..., Any], tmp_path: Path
) -> None:
    status, printed, said = evaluate(fault="raises", only="divprune")
    assert status == 1 and not printed and "2 runs complete, 1 failed" in said
    (line,) = [line for line in said.splitlines() if line.startswith("eval: FAILED mini-mini-div")]
    assert FAULTS["raises"] in line
    status, _, said = evaluate()
    assert status == 1 and "1 runs failed earlier; --retry-failed repeats them" in said
    assert "FAILED mini-mini-divprune" in said and "document 1" in said
    status, _, said = evaluate("--retry-failed")
    assert status == 0 and records(tmp_path / "out")["divprune"]["status"] == "complete"
    (log,) = (tmp_path / "out" / "logs").glob("*divprune*/fingerprint/todre_mini_exist.*")
    assert log.read_text().count('"doc_id": 0,') == 1


def test_other_data_than_the_suite_expects_fails_with_advice(tmp_path: Path) -> None:
    error = carried_out(tmp_path, "other data", limit=3)["error"]
    assert "2 items were scored; suite 'mini' expects 3. The data here has 2; if that" in error


def test_answers_that_were_not_logged_fail_the_run(tmp_path: Path) -> None:
    name = carried_out(tmp_path)["name"]
    (tmp_path / f"{name}.json").unlink()
    log = tmp_path / "logs" / name / "fingerprint" / "todre_mini_exist.test.rank0.jsonl"
    log.write_text(log.read_text().splitlines()[0].replace("_exist", "_other"))
    error = carried_out(tmp_path)["error"]
    assert "lacks items that were scored: 1 of todre_mini_exist" in error


def test_a_folder_that_cannot_be_made_is_said_first(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(TodreError, match="out '.*out' cannot be a folder"):
        execute([run_of()], Launch(tmp_path / "out", program=(str(FAKE),)))


def test_a_file_that_cannot_be_written_is_one_line_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, how = run_of(), Launch(tmp_path, program=(str(FAKE),))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(TodreError, match="cannot be written: No space left on dev") as raised:
            execute([run], how)
        assert f"{run.name}.json'" in str(raised.value) and "goes on" in str(raised.value)
    answers = logged(tmp_path)
    assert execute([run], how).done == [run.name] and logged(tmp_path) == answers, "nothing is lost"
    (tmp_path / "logs" / f"{run_of(seed=1).name}.txt").mkdir()
    for _ in range(2):  # the second does not wait for a lock that the first one kept
        with pytest.raises(TodreError, match="txt' cannot be used: Is a directory. Make room"):
            execute([run_of(seed=1)], how)
    other = run_of("vanilla")
    (tmp_path / "raw" / f"{other.name}.lock").mkdir()  # as good as a folder that is read only
    with pytest.raises(TodreError, match="lock' cannot be used: Is a directory. Make room"):
        execute([other], how)


def test_items_that_the_model_cannot_read_fail_alone_and_are_marked(tmp_path: Path) -> None:
    run = run_of()
    how = Launch(tmp_path, program=(str(FAKE), "--fault", "too long"))
    assert execute([run], how).done == [run.name]
    record = read_record(how.file(run)) or {}
    assert record["failed_items"] == 4 and record["tokens"]["kept_tokens"] == 80
    marks = record["benchmarks"]
    assert {key: mark["failed_items"] for key, mark in marks.items() if mark["failed_items"]} == {
        "exist": 2,
        "count": 2,
    }
    assert "2 items failed and count as wrong: prompt of 9 tokens is" in marks["exist"]["note"]
    assert "items failed" not in str(marks["where"]["note"])


def test_how_many_items_there_must_be_is_told_before_the_first_answer(tmp_path: Path) -> None:
    (_, arguments) = command(run_of(), Launch(tmp_path), (), 1)
    told = arguments[arguments.index("--model_args") + 1]
    assert ",num_items=todre_mini_exist:2;todre_mini_colour:2;" in told


def test_a_missing_lmms_eval_is_said_once_with_how_to_install_it(tmp_path: Path) -> None:
    with pytest.raises(TodreError, match="no_lmms_eval is not installed: pip install"):
        execute([run_of()], Launch(tmp_path, program=("-m", "no_lmms_eval")))
    assert not list(tmp_path.iterdir())


def test_the_last_error_is_what_the_child_said_last(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    for text, said in (
        ("a\nlib.errors.TodreError: bad key\n  more\n", "lib.errors.TodreError: bad key"),
        ("\x1b[31mx | ERROR | m:f:1 - \x1b[0mno such task\nbye\n", "no such task"),
        ("Segmentation fault\n\n", "Segmentation fault"),
        ("[rank1]: ValueError: odd\nx.ChildFailedError: \n", "[rank1]: ValueError: odd"),
        ("ValueError: odd\nRuntimeError: [] Connection closed by peer\n", "ValueError: odd"),
        ("RuntimeError: Connection closed by peer\n", "RuntimeError: Connection closed by peer"),
        ("OSError: no hub\ntenacity.RetryError: RetryError[<Future>]\n", "OSError: no hub"),
        ("", "nothing was printed"),
    ):
        log.write_text(text)
        assert last_error(log, 0) == f"{said} (exit status 0, all output in {log})"
    assert "ended by signal 9" in last_error(tmp_path / "none", -9)


# ------------------------------------------------------------------------------- commands


def test_a_dry_run_prints_commands_that_a_shell_runs_as_they_are(
    evaluate: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_python", lambda: sys.executable)
    status, printed, said = evaluate("--dry-run", "--offline", "--jobs", "2")
    assert status == 0 and "python -m eval.mini.data" in said
    assert not (tmp_path / "out").exists()
    lines = printed.splitlines()
    assert len(lines) == 3
    settings, words = {}, shlex.split(lines[1])
    while "=" in words[0]:
        key, _, value = words.pop(0).partition("=")
        settings[key] = value
    assert {"HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "OMP_NUM_THREADS"} <= set(settings)
    assert words[:2] == [sys.executable, str(FAKE)]
    assert words[words.index("--limit") + 1] == "2" and "--log_samples" in words
    assert words[words.index("--seed") + 1] == "0"
    subprocess.run(lines[1], shell=True, check=True, capture_output=True, cwd=ROOT)
    assert list((tmp_path / "out" / "raw").rglob("*_results.json"))


def test_the_program_is_lmms_eval_and_python_is_named_shortly_if_it_is_the_one_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes.shutil, "which", lambda name: sys.executable)
    environment, arguments = command(run_of(), Launch(tmp_path), (), 1)
    assert arguments[:5] == ["python", "-m", "lmms_eval", "--model", "llava_todre"]
    assert environment == {"HF_DATASETS_OFFLINE": "1"}, "the mini suite's data is drawn here"
    monkeypatch.setattr(processes.shutil, "which", lambda name: "/elsewhere/python")
    assert command(run_of(), Launch(tmp_path), (), 1)[1][0] == sys.executable


def test_several_processes_are_started_by_torchrun(tmp_path: Path) -> None:
    environment, arguments = command(run_of(), Launch(tmp_path, processes=2), (), 1)
    start = arguments.index("torch.distributed.run") - 1
    assert arguments[start : start + 7] == (
        "-m torch.distributed.run --standalone --nproc_per_node 2 -m lmms_eval".split()
    )
    assert environment["ACCELERATE_USE_CPU"] == "true"
    environment, _ = command(run_of(), Launch(tmp_path, processes=2), ("4", "5"), 1)
    assert environment == {"HF_DATASETS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "4,5"}


@pytest.mark.parametrize(
    ("changes", "is_spread", "slots"),
    [
        ({}, False, [()]),
        ({"jobs": 2}, False, [(), ()]),
        ({"gpus": "0123"}, False, ["0", "1", "2", "3"]),
        ({"gpus": "0123", "jobs": 2}, False, ["0", "1"]),
        ({"gpus": "01", "jobs": 4}, False, ["0", "1", "0", "1"]),
        ({"gpus": "0123", "processes": 2}, False, ["01", "23"]),
        ({"gpus": "0123"}, True, ["0123"]),
        ({"gpus": "0123", "jobs": 2}, True, ["01", "23"]),
    ],
)
def test_every_job_has_gpus_of_its_own(
    changes: dict[str, Any], is_spread: bool, slots: list[Any], tmp_path: Path
) -> None:
    model = {"key": "mini", "device_map": "auto"} if is_spread else "mini"
    changes = {**changes, "gpus": tuple(changes.get("gpus", ()))}
    assert Launch(tmp_path, **changes).slots([run_of(model=model)]) == [tuple(s) for s in slots]


def test_processes_need_as_many_gpus_and_a_model_that_fits_one(tmp_path: Path) -> None:
    with pytest.raises(TodreError, match="processes 2 needs as many GPUs; given: 0"):
        Launch(tmp_path, gpus=("0",), processes=2).slots([run_of()])
    spread = run_of(model={"key": "mini", "device_map": "auto"})
    with pytest.raises(TodreError, match="processes 2 with a device_map that spreads"):
        Launch(tmp_path, gpus=("0", "1"), processes=2).slots([spread])


def test_a_model_that_is_split_takes_all_processes_of_its_run(tmp_path: Path) -> None:
    run = run_of(model={"key": "mini", "tp_plan": "auto"})
    with pytest.raises(TodreError, match="processes 1 with a tp_plan that splits the model"):
        Launch(tmp_path, gpus=("0", "1")).slots([run_of(), run])
    how = Launch(tmp_path, gpus=tuple("0123"), processes=2)
    assert how.slots([run]) == [("0", "1"), ("2", "3")]
    environment, arguments = command(run, how, ("2", "3"), 2)
    assert environment["CUDA_VISIBLE_DEVICES"] == "2,3" and "--nproc_per_node" in arguments
    assert ",tp_plan=auto," in arguments[arguments.index("--model_args") + 1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--jobs", "0"], "jobs 0 is out of range"),
        (["--processes", "0"], "processes 0 is out of range"),
        (["--gpus", "0"], "gpus '0': 0 not found here; allowed: none"),
        (["--gpus", "0,,1"], "gpus '0,,1' is not a list"),
        (["--limit", "0"], "limit must be a whole number, 1 or more or null, got 0"),
        (["--set", "base.limit=3"], "key 'base' is unknown"),
        (["--slurm", "slrum"], "slurm 'slrum' is unknown"),
        (["--slurm", "--slurm-set", "x"], "slurm-set 'x' is not of the form"),
        (["--out", "a,b"], "out 'a,b' has a comma"),
    ],
)
def test_wrong_arguments_are_one_line_before_anything_starts(
    arguments: list[str], said: str, evaluate: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(TodreError, match=said) as raised:
        evaluate(*arguments)
    assert "\n" not in str(raised.value) and not (tmp_path / "out" / "raw").exists()


def test_gpus_may_be_named_in_a_dry_run_without_having_them(
    evaluate: Callable[..., Any],
) -> None:
    _, printed, _ = evaluate("--dry-run", "--gpus", "4,5")
    starts = [line.split()[0] for line in printed.splitlines()]
    assert starts == [f"CUDA_VISIBLE_DEVICES={gpu}" for gpu in (4, 5, 4)]


def test_children_are_told_the_names_of_the_gpus_we_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(launch.torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert launch.visible_gpus() == ("0", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert launch.visible_gpus() == ("3", "5")


# ------------------------------------------------------------------------------- interruptions


@pytest.fixture
def start(tmp_path: Path, evaluate: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Run the three runs in a process of their own, which needs no imports: a fork of this one."""
    started = []

    def run(**fake: Any) -> Any:
        def target() -> None:
            # A shell that starts the tests in the background makes them deaf to it.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.exit(evaluate("--limit", "4", **fake)[0])

        process = multiprocessing.get_context("fork").Process(target=target)
        process.start()
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.join()


def logged(out: Path) -> int:
    return sum(len(file.read_text().splitlines()) for file in out.glob("logs/*/*/*.jsonl"))


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within a minute"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "zombie" not in Path(f"/proc/{pid}/status").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere children outlive a killed parent")
def test_a_killed_sweep_goes_on_and_ends_with_the_same_scores(
    start: Callable[..., Any], evaluate: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start(pause=0.05)
    wait_for(lambda: len(list(out.glob("*.json"))) == 1 and logged(out) > 40)
    before = logged(out)
    process.kill()
    process.join()
    pids = [int(pid) for file in out.glob("logs/*/pid") for pid in file.read_text().split()]
    wait_for(lambda: not any(map(is_alive, pids)))
    assert logged(out) < before + 12 < 72, "the child ended too"
    assert len(list(out.glob("*.json"))) == 1
    assert evaluate("--limit", "4")[0] == 0
    assert logged(out) == 3 * 36, "no answer that was there was asked for again"
    interrupted = records(out)
    shutil.rmtree(out)
    assert evaluate("--limit", "4")[0] == 0
    for method, record in records(out).items():
        same = [json.dumps(each["benchmarks"]) for each in (record, interrupted[method])]
        assert same[0] == same[1]
    assert set(interrupted) == {"vanilla", "todre", "divprune"}


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
)
def test_a_signal_stops_the_children_and_records_nothing(
    number: int, status: int, start: Callable[..., Any], tmp_path: Path
) -> None:
    process = start(pause=60)
    out = tmp_path / "out"
    wait_for(lambda: any(file.read_text() for file in out.glob("logs/*/pid")))
    (pid,) = [int(file.read_text()) for file in out.glob("logs/*/pid")]
    os.kill(process.pid, number)
    process.join(processes._GRACE_SECONDS - 3)
    assert process.exitcode == status, "without waiting for the children to be forced"
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not list(out.glob("*.json"))


def test_two_commands_do_not_work_on_the_same_run(
    tmp_path: Path,
) -> None:
    run, how = run_of(), Launch(tmp_path, program=(str(FAKE), "--pause", "0.05"))
    reports = []
    threads = [
        threading.Thread(target=lambda: reports.append(execute([run], how))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [report.done for report in reports] == [[run.name], [run.name]]
    assert logged(tmp_path) == 18, "each item was asked once"
    (starts,) = tmp_path.glob("logs/*/pid")
    assert len(starts.read_text().splitlines()) == 1


def test_what_an_interrupted_attempt_left_is_not_taken_for_a_result(tmp_path: Path) -> None:
    run = run_of()
    left = tmp_path / "raw" / run.name / "checkpoints__mini" / "20260101_000000_results.json"
    left.parent.mkdir(parents=True)
    left.write_text("{}")
    assert execute([run], Launch(tmp_path, program=(str(FAKE),))).done == [run.name]


def test_jobs_go_on_at_the_same_time(tmp_path: Path) -> None:
    runs = [run_of(seed=seed) for seed in range(3)]
    report = execute(runs, Launch(tmp_path, jobs=3, program=(str(FAKE), "--pause", "0.1")))
    assert len(report.done) == 3
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    (record,) = records(tmp_path).values()
    assert record["torch_threads"] == max(1, cores // 3), "the cores are shared"
    starts = [file.stat().st_mtime for file in tmp_path.glob("logs/*/pid")]
    ends = [file.stat().st_mtime for file in tmp_path.glob("*.json")]
    assert len(starts) == len(ends) == 3 and max(starts) < min(ends)


def test_a_mean_is_not_told_where_a_part_of_it_is_not_known() -> None:
    assert outcome._mean([1.0, 3.0]) == 2 and outcome._mean([1.0, None, 3.0]) is None
