"""The lmms-eval model split over two processes: all answer everything, one writes."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from llava_todre.errors import TodreError
from llava_todre.lmms_plugin.answer_log import read_answers

state = pytest.importorskip("accelerate.state")
pytest.importorskip("lmms_eval.api.model")
from tests.eval import team_of_two  # noqa: E402 (needs lmms-eval)

COST = ("seconds", "cpu_seconds", "peak_memory_mib")


def one_of_two(rank: int, port: int, folder: Path) -> None:
    """Be a process that torchrun has started."""
    torchrun = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    torchrun |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": ""}
    os.environ |= {name: str(value) for name, value in torchrun.items()}
    os.environ["ACCELERATE_USE_CPU"] = "true"
    state.AcceleratorState._reset_state(reset_partial_state=True)
    sys.stderr = (folder / f"said{rank}").open("w")
    team_of_two.main(folder)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two new processes did, the second of which failed at last."""
    folder = tmp_path_factory.mktemp("split")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    start = multiprocessing.get_context("spawn").Process
    processes = [start(target=one_of_two, args=(rank, port, folder)) for rank in (0, 1)]
    for process in processes:
        process.start()
    processes[1].join(timeout=120)
    processes[0].join(timeout=0.5)  # it waits for the other until torchrun ends it
    for process in processes:
        process.kill()
    ranks = [folder / f"rank{rank}.json" for rank in (0, 1)]
    said = (folder / "said1").read_text()
    assert all(file.exists() for file in ranks), said
    return {
        "folder": folder,
        "ranks": [json.loads(file.read_text()) for file in ranks],
        "status": processes[1].exitcode,
        "said": said,
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """Answers and log of one process that has all requests."""
    folder = tmp_path_factory.mktemp("alone")
    lm = team_of_two.build(log_dir=str(folder))
    return lm.generate_until(team_of_two.requests(list(range(team_of_two.DOCUMENTS)))), folder


def test_every_process_gets_the_answers_to_its_share(
    split: dict[str, Any], alone: tuple[list[str], Path]
) -> None:
    answers = [alone[0][start : start + team_of_two.DOCUMENTS] for start in (0, 5)]
    one, other = (rank["given"] for rank in split["ranks"])
    assert one[1] == one[2] == [*answers[0][0::2], *answers[1][0::2]]
    padding = answers[1][3]
    assert other[1] == other[2] == [*answers[0][1::2], *answers[1][1::2], padding, padding]
    assert one[0] == answers[0][0::2] and other[0] == [*answers[0][1::2], answers[0][3]]


def test_all_compute_the_same_batches_and_none_twice(split: dict[str, Any]) -> None:
    asked = [rank["asked"] for rank in split["ranks"]]
    assert asked[0] == asked[1]
    assert list(map(len, asked[0])) == [3, 3, 0], "batches of two, finished ones are remembered"


def test_one_process_writes_the_log_that_one_alone_would_have_written(
    split: dict[str, Any], alone: tuple[list[str], Path]
) -> None:
    def lines(folder: Path) -> list[dict[str, Any]]:
        found = read_answers(folder)
        return [{key: v for key, v in line.items() if key not in COST} for line in found]

    assert lines(split["folder"]) == lines(alone[1])
    for pattern in ("*/*.jsonl", "*/settings.json"):
        written = [
            sorted(file.relative_to(folder) for file in folder.glob(pattern))
            for folder in (split["folder"], alone[1])
        ]
        assert written[0] == written[1] and written[0], "under the same fingerprint"
    files = split["folder"].glob("*/*.jsonl")
    assert sum(len(file.read_text().splitlines()) for file in files) == 11, (
        "the last of a task again, in company"
    )


def test_an_error_in_one_process_ends_it_with_a_status_for_torchrun(split: dict[str, Any]) -> None:
    assert split["status"] == 1
    assert "RuntimeError: process 1 is planted to fail" in split["said"]
    assert not list(split["folder"].glob("survived*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tp_plan": "auto"}, "this is the only one; start them with torchrun"),
        ({"tp_plan": "auto", "device": "cpu"}, "device 'cpu' and tp_plan 'auto' were both given"),
        ({"tp_plan": "auto", "device_map": "auto"}, "device_map 'auto' and tp_plan 'auto'"),
    ],
)
def test_a_plan_that_cannot_be_is_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TodreError, match=message) as caught:
        team_of_two.build(**arguments)
    assert "\n" not in str(caught.value)
