"""Runs through lmms-eval itself, on the bundled model; a quarter of a minute per start."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eval.mini import TASKS, held_out
from eval.run.collect import read_record
from eval.run.launch import execute
from eval.run.processes import Launch
from eval.run.spec import ROOT, Run, resolve
from llava_todre import ask, load_pretrained_model
from llava_todre.cli import main
from llava_todre.model.checkpoint import bundled_checkpoint

pytest.importorskip("lmms_eval")
slow = pytest.mark.slow

CONFIG = {"model": "mini", "suite": "mini", "method": "todre", "batch_size": 2, "limit": 4}


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def scores(run: Run, launch: Launch) -> str:
    """Carry out a run; returns its scores as text."""
    report = execute([run], launch)
    assert not report.failed, report.failed
    return json.dumps((read_record(launch.file(run)) or {})["benchmarks"])


LISTENING = """
import runpy, socket, sys
def hear(event, arguments):
    is_local = event == "socket.connect" and arguments[0].family == socket.AF_UNIX
    if event in ("socket.getaddrinfo", "socket.connect", "socket.sendto") and not is_local:
        print(event, arguments[-1], file=open({heard!r}, "a"))
sys.addaudithook(hear)
runpy.run_module("lmms_eval", run_name="__main__", alter_sys=True)
"""


def interrupted(run: Run, launch: Launch, is_time: Callable[[], bool]) -> None:
    """Carry out a run in a process of its own and kill that without warning."""
    process = multiprocessing.get_context("fork").Process(target=execute, args=([run], launch))
    process.start()
    deadline = time.monotonic() + 300
    while not is_time():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.join()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere children outlive a killed parent")
def test_killed_and_finished_by_two_processes_a_run_has_the_scores_of_the_library(
    tmp_path: Path,
) -> None:
    # Two processes would form other batches than one, and a batch is answered as a whole.
    run = resolve(CONFIG | {"batch_size": 1})
    program, heard = tmp_path / "program.py", tmp_path / "heard"
    program.write_text(LISTENING.format(heard=str(heard)))
    launch = Launch(tmp_path / "out", program=(str(program),))

    def answers() -> int:
        files = launch.out.glob("logs/*/*/*.jsonl")
        return sum(len(file.read_text().splitlines()) for file in files)

    interrupted(run, launch, lambda: answers() >= 7)
    assert 7 <= answers() < 36 and not launch.file(run).exists()
    found = json.loads(scores(run, dataclasses.replace(launch, processes=2)))
    assert answers() == 36, "nothing was asked twice"
    assert not heard.exists(), f"looked up outside: {heard.read_text()}"
    tokenizer, model, _, _ = load_pretrained_model(bundled_checkpoint())
    model.set_pruner("todre")
    right: dict[str, list[float]] = {task: [] for task in TASKS}
    for sample in held_out(4):
        for question in sample.questions:
            text = ask(model, tokenizer, sample.image, question.text, max_new_tokens=8).text
            right[question.task].append(float(text.strip().lower() == question.answer.lower()))
    assert {task: found[task]["items"] for task in TASKS} == {
        task: [list(pair) for pair in enumerate(hits)] for task, hits in right.items()
    }


@slow
def test_a_model_split_over_two_processes_gives_the_same_scores(tmp_path: Path) -> None:
    run, split = resolve(CONFIG), resolve(CONFIG | {"model": {"key": "mini", "tp_plan": "auto"}})
    whole = scores(run, Launch(tmp_path / "whole", offline=True))
    how = Launch(tmp_path / "split", offline=True, processes=2)
    assert scores(split, how) == whole
    record = read_record(how.file(split)) or {}
    assert record["processes"] == 2 and record["config"]["model"]["tp_plan"] == "auto"
    assert not list(how.out.glob("logs/*/*/*.rank1.jsonl"))


@slow
def test_an_error_in_one_of_two_processes_of_a_model_fails_the_run(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import os, runpy\n"
        "from llava_todre.lmms_plugin.model import LlavaTodre\n"
        "compute = LlavaTodre._compute\n"
        "def broken(self, batch, *arguments):\n"
        "    if os.environ['RANK'] == '1' and batch.items[0].doc_id == 2:\n"
        "        raise RuntimeError('process 1 is planted to fail')\n"
        "    return compute(self, batch, *arguments)\n"
        "LlavaTodre._compute = broken\n"
        "runpy.run_module('lmms_eval', run_name='__main__', alter_sys=True)\n"
    )
    run = resolve(CONFIG | {"model": {"key": "mini", "tp_plan": "auto"}})
    how = Launch(tmp_path, offline=True, processes=2, program=(str(program),))
    report = execute([run], how)
    assert "RuntimeError: process 1 is planted to fail" in report.failed[run.name]


@slow
def test_missing_data_fails_the_run_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    run = resolve(CONFIG | {"suite": "ablation", "limit": 2})
    report = execute([run], Launch(tmp_path, offline=True))
    assert "lmms-eval left no results: " in report.failed[run.name]
    record = read_record(tmp_path / f"{run.name}.json")
    assert record is not None and record["status"] == "failed" and record["benchmarks"] == {}


@slow
def test_a_model_that_raises_on_one_item_fails_the_run_with_what_it_said(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import runpy\n"
        "from llava_todre.lmms_plugin.model import LlavaTodre\n"
        "compute = LlavaTodre._compute\n"
        "def broken(self, batch, *arguments):\n"
        "    if any((item.task, item.doc_id) == ('todre_mini_count', 3) for item in batch.items):\n"
        "        raise RuntimeError('item 3 is planted')\n"
        "    return compute(self, batch, *arguments)\n"
        "LlavaTodre._compute = broken\n"
        "runpy.run_module('lmms_eval', run_name='__main__', alter_sys=True)\n"
    )
    run: Any = resolve(CONFIG)
    report = execute([run], Launch(tmp_path, offline=True, program=(str(program),)))
    assert "RuntimeError: item 3 is planted" in report.failed[run.name]


@slow
def test_the_converted_model_gives_the_same_scores_through_transformers(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    assert main(["convert", "--model", "checkpoints/mini", "--out", str(folder)]) == 0
    stock = {"pretrained": str(folder), "dtype": "float32", "backend": "transformers"}
    runs = [resolve(CONFIG), resolve(CONFIG | {"model": stock})]
    ours, theirs = (scores(run, Launch(tmp_path / "out", offline=True)) for run in runs)
    assert ours == theirs
