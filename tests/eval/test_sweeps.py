"""Config files become the runs they mean; an array of jobs carries them out as one command does."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from eval.run import launch, slurm
from eval.run.collect import read_record
from eval.run.processes import Launch
from eval.run.spec import CONFIGS, Run
from eval.run.sweeps import plan
from llava_todre.errors import TodreError

FAKE = Path(__file__).with_name("fake_lmms_eval.py")
BASE: dict[str, Any] = {"model": "mini", "suite": "mini", "method": "todre"}


def planned(tmp_path: Path, content: dict[str, Any], *changes: str) -> list[Run]:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return plan([file], changes)


def options(found: list[Run]) -> list[tuple[str, dict[str, Any]]]:
    return [(run.method, dict(run.options)) for run in found]


def test_a_grid_is_every_combination(tmp_path: Path) -> None:
    grid = {"method": ["todre", "todre_v1"], "ratio": [0.5, 0.25], "seed": [0, 1]}
    found = planned(tmp_path, {"base": BASE, "grid": grid})
    assert len({run.name for run in found}) == len(found) == 8
    assert Counter(run.seed for run in found) == {0: 4, 1: 4}
    assert {run.options["retain_ratio"] for run in found} == {0.5, 0.25}


def test_several_grids_add_up_and_equal_runs_count_once(tmp_path: Path) -> None:
    grids = [{"tau": [0.05, 0.10]}, {"method": ["vanilla", "todre"]}]
    found = planned(tmp_path, {"base": BASE, "grid": grids})
    assert [run.method for run in found] == ["todre", "todre", "vanilla"]


def test_short_names_stand_for_options(tmp_path: Path) -> None:
    grid = {"layers": [["7/8"], ["4/8", 0.75], []], "ratio": [0.5], "similarity": ["centred"]}
    found = options(planned(tmp_path, {"base": BASE, "grid": grid}))
    shared = {"retain_ratio": 0.5, "similarity": "centred"}
    assert found == [
        ("todre", shared),
        ("todre", shared | {"probe_depths": (0.5, 0.75)}),
        ("todre", shared | {"probe_depths": ()}),
    ]


def test_stages_leave_out_what_they_do_not_name(tmp_path: Path) -> None:
    grid = {"stages": ["none", 1, "2", "1+2"], "ratio": [0.25, 0.10]}
    found = options(planned(tmp_path, {"base": BASE, "grid": grid}))
    assert found == [
        ("vanilla", {"retain_ratio": 1.0}),
        ("todre", {"retain_ratio": 0.25, "probe_depths": ()}),
        ("todre", {"retain_ratio": 0.10, "probe_depths": ()}),
        ("todre", {"retain_ratio": 1.0}),
        ("todre", {"retain_ratio": 0.25}),
        ("todre", {"retain_ratio": 0.10}),
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"base": BASE, "grid": {"tua": [0.1]}}, "'tua' is unknown. Did you mean 'tau'?"),
        ({"base": BASE, "grid": {"tau": 0.1}}, r"grid key 'tau' is 0.1; allowed: \[values\]"),
        ({"base": BASE, "grid": {"tau": []}}, r"grid key 'tau' is \[\]"),
        ({"base": BASE, "grid": ["tau"]}, "grid must hold"),
        ({"base": BASE, "grid": {"stages": ["3"]}}, "stages '3' is unknown"),
        ({"base": BASE, "grid": {"layers": [0.5]}}, "layers 0.5; allowed: a list of depths"),
        ({"base": BASE, "grid": {"layers": [["x"]]}}, "a list of depths"),
        ({"base": BASE, "grid": {"tau": [2.0]}}, "0 <= tau <= 1, got 2.0"),
        ({"base": "mini", "grid": {"tau": [0.1]}}, "base must hold"),
        ({"grid": {"tau": [0.1]}}, "key 'base' is missing"),
        ({"base": BASE, "grids": {}, "grid": {"tau": [0.1]}}, "Did you mean 'grid'?"),
        ({"table": 9, "model": "mini", "suite": "mini"}, "table '9' is unknown"),
        ({"table": 1, "model": "mini", "suite": "mini", "method": "todre"}, "key 'method'"),
        ({"table": 1, "model": "llava_next_7b", "suite": "image", "version": "v3"}, "'v3'"),
        ({"table": 1, "suite": "image"}, "key 'model' is missing"),
        ({"table": 4, "model": "mini", "suite": "mini", "version": "v9"}, "version 'v9' is unkn"),
        ({"table": 4, "model": "mini", "suite": "mini", "version": 2}, "version 2 is unknown"),
        ({"table": [], "model": "mini", "suite": "mini"}, "no run is planned"),
        ({"base": BASE, "grid": []}, "no run is planned"),
        ({"base": BASE, "grid": {}}, "grid must hold"),
        ({"base": BASE, "grid": {"ratio": [0.1], "retain_ratio": [0.2]}}, "are the same; give one"),
        ({"base": BASE, "grid": {"layers": [[0.5]], "probe_depths": [[1]]}}, "'layers' and 'probe"),
        (
            {"base": BASE | {"options": {"retain_tokens": 9}}, "grid": {"ratio": [0.1]}},
            "retain_ratio and retain_tokens were both given",
        ),
        ({"base": BASE, "grid": {"layers": [["1e999999999"]]}}, "0 < each <= 1, got .inf"),
        ({"base": BASE, "grid": {"layers": [["1/1e999999999"]]}}, "0 < each <= 1, got .0.0"),
        ({"base": BASE, "grid": {"layers": [["nan"]]}}, "0 < each <= 1, got .nan"),
        ({"base": BASE, "grid": {"layers": [["1/0"]]}}, "a list of depths"),
        ({"base": BASE, "grid": {"layers": ["55"]}}, "layers '55'; allowed: a list of depths"),
        ({"base": BASE, "grid": {"seed": [*range(400)], "tau": [0.1, 0.2, 0.3]}}, "1,200 runs are"),
        (BASE | {"options": {"tau": 2.0}}, "0 <= tau <= 1, got 2.0"),
        (BASE | {"suite": "none"}, "suite 'none' is unknown"),
    ],
)
def test_a_wrong_sweep_is_one_line(tmp_path: Path, content: dict[str, Any], said: str) -> None:
    with pytest.raises(TodreError, match=said) as raised:
        planned(tmp_path, content)
    assert str(raised.value).startswith(f"{tmp_path / 'config.yaml'}: ")
    assert "\n" not in str(raised.value)


def test_changes_reach_the_base_but_not_what_the_grid_sets(tmp_path: Path) -> None:
    content = {"base": BASE, "grid": {"tau": [0.05, 0.10]}}
    found = planned(tmp_path, content, "limit=4", "options.retain_ratio=0.5")
    assert {(run.limit, run.options["retain_ratio"]) for run in found} == {(4, 0.5)}
    with pytest.raises(TodreError, match="'tau' was set, but the grid sets it too"):
        planned(tmp_path, content, "options.tau=0.2")
    with pytest.raises(TodreError, match="'ratio' was set, but the grid sets it too"):
        planned(tmp_path, {"base": BASE, "grid": {"ratio": [0.1]}}, "options.retain_ratio=0.5")


@pytest.mark.parametrize(
    ("model", "count", "methods"),
    [
        ("llava_next_7b", 15, "fastv sparsevlm fastervlm globalcom2 divprune todre_v1 todre"),
        ("llava_next_13b", 11, "fastervlm globalcom2 divprune todre_v1 todre"),
    ],
)
def test_table_1_is_every_row_the_papers_print(model: str, count: int, methods: str) -> None:
    found = plan([CONFIGS / "runs" / "table1_image.yaml"], [f"model={model}"])
    assert len(found) == count
    pairs = {(run.method, run.options["retain_ratio"]) for run in found}
    assert pairs == {("vanilla", 1.0)} | {(m, r) for m in methods.split() for r in (0.25, 0.10)}
    assert {run.suite for run in found} == {"image"}


def test_a_version_picks_the_rows_of_one_paper() -> None:
    file = CONFIGS / "runs" / "table1_image.yaml"
    methods = {run.method for run in plan([file], ["version=v1"])}
    assert "todre_v1" in methods and not methods & {"todre", "divprune"}
    small = [CONFIGS / "runs" / "mini_tables56.yaml"]
    assert {run.method for run in plan(small)} == {"vanilla", "todre"}
    assert "todre_v1" in {run.method for run in plan(small, ["version=null"])}


@pytest.mark.parametrize(
    "file", sorted([*CONFIGS.glob("runs/*.yaml"), *CONFIGS.glob("sweeps/*.yaml")]), ids=str
)
def test_every_config_file_resolves_and_says_what_it_is(file: Path) -> None:
    assert file.read_text().startswith("# ")
    assert plan([file])


# ------------------------------------------------------------------------------- SLURM


def test_a_job_carries_out_its_run_or_raises_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "prepare", lambda suite: None)
    monkeypatch.setenv("PYTHONPATH", str(CONFIGS.parent))
    (run,) = planned(tmp_path, BASE | {"limit": 2})
    with pytest.raises(TodreError, match="document 1 of todre_mini_exist is broken"):
        slurm.Job(run, Launch(tmp_path, program=(str(FAKE), "--fault", "raises")))()
    how = Launch(tmp_path, program=(str(FAKE),))
    with pytest.raises(TodreError, match="document 1 of todre_mini_exist is broken"):
        slurm.Job(run, how)()  # it failed before and was not told to try again
    assert slurm.Job(run, dataclasses.replace(how, retry_failed=True))() == run.name


@pytest.mark.slow
def test_an_array_of_local_jobs_gives_the_results_of_one_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit")
    pytest.importorskip("datasets")  # the jobs draw the suite's data if it is not there
    monkeypatch.setenv("PYTHONPATH", str(CONFIGS.parent))
    found = planned(tmp_path, {"base": BASE, "grid": {"tau": [0.05, 0.10]}}, "limit=2")
    how = Launch(tmp_path / "out", program=(str(FAKE), "--fault", "raises", "--only", "tau-0.05"))
    jobs = slurm.submit(found, how, "local", {"timeout_min": 2})
    assert jobs[1].result() == found[1].name
    assert "document 1 of todre_mini_exist is broken" in str(jobs[0].exception())
    states = [read_record(how.file(run)) for run in found]
    assert [state and state["status"] for state in states] == ["failed", "complete"]


def test_a_cluster_that_is_unknown_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TodreError, match="slurm 'slrum' is unknown. Did you mean 'slurm'?"):
        slurm.submit([], Launch(tmp_path), "slrum", {})


def test_a_machine_without_slurm_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TodreError, match="slurm 'slurm' refused: ") as raised:
        slurm.submit(planned(tmp_path, BASE), Launch(tmp_path), "slurm", {"timeout_min": 60})
    assert "\n" not in str(raised.value)


def test_parameters_that_submitit_does_not_know_are_told(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    with pytest.raises(TodreError, match="slurm 'local' refused: .*slurm_partitoin"):
        wrong = {"timeout_min": 60, "slurm_partitoin": "x"}
        slurm.submit(planned(tmp_path, BASE), Launch(tmp_path), "local", wrong)


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({}, "timeout_min is missing; give the minutes"),
        ({"slurm_partition": "gpu"}, "timeout_min is missing"),
        ({"timeout_min": "abc"}, "timeout_min 'abc' is out of range"),
        ({"timeout_min": 0}, "timeout_min 0 is out of range"),
        ({"timeout_min": True}, "timeout_min True is out of range"),
        ({"timeout_min": 1.5}, "timeout_min 1.5 is out of range"),
        ({"timeout_min": 60, "slurm_time": 5}, "slurm_time is not taken"),
        ({"timeout_min": 60, "gpus_per_node": "x"}, "refused: .*gpus_per_node"),
    ],
)
def test_jobs_need_a_time_limit_that_is_one(
    tmp_path: Path, parameters: dict[str, Any], said: str
) -> None:
    pytest.importorskip("submitit")
    with pytest.raises(TodreError, match=said) as raised:
        slurm.submit(planned(tmp_path, BASE), Launch(tmp_path), "local", parameters)
    assert "\n" not in str(raised.value)


def test_a_job_may_reach_its_time_limit_as_often_as_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitit = pytest.importorskip("submitit")
    monkeypatch.setattr(submitit.SlurmExecutor, "affinity", classmethod(lambda cls: 2))
    monkeypatch.setattr(submitit.SlurmExecutor, "__init__", noting := Noting())
    with pytest.raises(TodreError, match="this is only a test"):
        slurm.submit(planned(tmp_path, BASE), Launch(tmp_path), "slurm", {"timeout_min": 60})
    assert noting.given["max_num_timeout"] >= 1000


class Noting:
    """Stands in for the constructor of an executor."""

    def __call__(self, folder: Path, **given: Any) -> None:
        self.given = given
        raise RuntimeError("this is only a test")


def test_a_job_at_its_time_limit_is_submitted_again(tmp_path: Path) -> None:
    submitit = pytest.importorskip("submitit")
    job = slurm.Job(planned(tmp_path, BASE)[0], Launch(tmp_path))
    again = job.checkpoint()
    assert isinstance(again, submitit.helpers.DelayedSubmission) and again.function is job
