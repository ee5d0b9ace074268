"""Tables from planted runs: every cell says what was run, or that it was not."""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from eval.results.files import load_runs
from eval.results.lookup import identity, model_key
from eval.results.published import TABLES, table_spec
from eval.results.seeds import members, over_seeds
from eval.run.sweeps import plan
from eval.tables import command as table_command
from eval.tables import render as drawing
from eval.tables.paper import Sheet, sheets, unshown
from eval.tables.render import Cell, Table, render, stacked
from llava_todre import TodreError
from tests.eval.planted import FULL, LESS, hits, planted, pruned, scored

MINI = ("colour", "where")


def sheet(runs: list[dict[str, Any]], table: str = "1", **given: Any) -> Sheet:
    """Return the sheet of the 7B model, or of the suite."""
    return sheets(table, runs, **given)[0]


def cells(found: Sheet, label: str) -> dict[str, Cell]:
    return next(row for spec, row, _ in found.rows if spec.label == label)


def said(found: Sheet) -> str:
    return "\n".join(found.notes)


# ------------------------------------------------------------------------------ filling rows


def test_a_run_fills_its_row_with_ours_published_and_difference() -> None:
    found = sheet([planted("vanilla", scores=FULL), pruned()])
    row = cells(found, "todre 10%")
    assert row["mme"] == Cell("1350.0", "", "1464.4", "-114.4", "100")
    assert row["scienceqa"] == Cell("63.0", "", "70.2", "-7.2", "100")
    # seven benchmarks at 90 %, VQAv2 at 80 %
    assert row["average"] == Cell("88.8", "", "95.0", "-6.2", "")
    assert cells(found, "vanilla")["average"] == Cell("100.0", "", "100.0", "0.0", "")


def test_where_the_versions_print_different_numbers_both_are_shown_and_compared() -> None:
    found = sheet([pruned(method="globalcom2")])
    assert cells(found, "globalcom2 10%")["vizwiz"].published == "57.6 / 56.6"
    assert cells(found, "globalcom2 10%")["vizwiz"].difference == "-12.6 / -11.6"
    assert "v1 / v2 where they differ" in said(found)


def test_what_was_not_run_says_so_and_has_no_number() -> None:
    found = sheet([planted("vanilla", scores=FULL)])
    row = cells(found, "todre 10%")
    assert {(c.ours, c.interval, c.difference, c.samples) for c in row.values()} == {
        ("not run", "", "", "")
    }
    assert row["mme"].published == "1464.4"


def test_a_failed_run_says_failed_and_why_and_its_scores_are_not_shown() -> None:
    found = sheet(
        [planted("vanilla", scores=FULL), pruned(status="failed", error="CUDA out of memory")]
    )
    row = cells(found, "todre 10%")
    assert {(cell.ours, cell.difference) for cell in row.values()} == {("failed", "")}
    assert "todre_0.1_image_None failed: CUDA out of memory" in said(found)
    without_scores = pruned(status="failed", error="lost", scores={})
    without_scores["config"]["benchmarks"] = ["mme"]
    row = cells(sheet([without_scores]), "todre 10%")
    assert (row["mme"].ours, row["gqa"].ours) == ("failed", "not run")
    del without_scores["config"]["benchmarks"]
    assert {c.ours for c in cells(sheet([without_scores]), "todre 10%").values()} == {"failed"}


def test_a_finished_run_comes_before_a_failed_one() -> None:
    failed = pruned(status="failed", error="lost", time_utc="2026-12-01", name="later")
    found = sheet([failed, pruned()])
    assert cells(found, "todre 10%")["gqa"].ours == "54.0"
    assert "lost" not in said(found)
    found = sheet([failed, pruned(limit=50)])
    assert cells(found, "todre 10%")["gqa"].ours == "54.0" and found.title.endswith("limit 50")


def test_a_submission_says_server_and_the_average_is_over_the_other_benchmarks() -> None:
    part = LESS | {"vqav2": scored(None, status="submission", note="send it to EvalAI")}
    found = sheet([planted("vanilla", scores=FULL), pruned(scores=part)])
    row = cells(found, "todre 10%")
    assert (row["vqav2"].ours, row["vqav2"].difference, row["vqav2"].samples) == ("server", "", "")
    # ours 90.0 without VQAv2; the printed scores without it: 95.32
    assert (row["average"].ours, row["average"].published) == ("90.0 (7 of 8)", "95.0")
    assert row["average"].difference == "-5.3"
    assert "VQAv2: send it to EvalAI (in: todre 10%)" in said(found)
    assert "over k benchmarks" in said(found)


def test_without_the_unpruned_run_there_is_no_average() -> None:
    found = sheet([pruned()])
    assert cells(found, "todre 10%")["average"] == Cell("", "", "95.0", "", "")
    assert "No average without a run of the unpruned model" in said(found)


def test_a_score_of_zero_is_shown_as_zero() -> None:
    row = cells(sheet([pruned(scores=LESS | {"gqa": 0.0})]), "todre 10%")
    assert (row["gqa"].ours, row["gqa"].difference) == ("0.0", "-59.4")


def test_different_sample_counts_are_flagged() -> None:
    found = sheet([planted("vanilla", scores=FULL), pruned(scores=LESS | {"gqa": scored(54, 99)})])
    assert cells(found, "todre 10%")["gqa"].samples == "99!"
    assert cells(found, "todre 10%")["mme"].samples == "100"
    assert "! other samples than the unpruned row's" in said(found)


def test_a_limit_is_in_the_title_and_a_run_without_one_is_preferred() -> None:
    limited = pruned(limit=50, scores=LESS | {"gqa": 20.0}, time_utc="2026-12-01")
    found = sheet([limited])
    assert found.title.endswith(", limit 50")
    assert cells(found, "todre 10%")["gqa"].ours == "20.0"
    found = sheet([limited, pruned()])
    assert "limit" not in found.title
    assert cells(found, "todre 10%")["gqa"].ours == "54.0"


@pytest.mark.parametrize(
    "other",
    [
        pruned(0.11),
        pruned(method="todre_v1"),
        planted("todre", {"retain_ratio": 0.1, "tau": 0.05}, LESS),
        planted("todre", {"retain_ratio": 0.1, "probe_depths": []}, LESS),
        planted("todre", {"retain_ratio": 0.1, "pivot": "random"}, LESS),
        planted("todre", {"retain_tokens": 288}, LESS),
        pruned(model={"key": "llava_next_13b"}),
        pruned(model={"pretrained": "checkpoints/mini"}),
        pruned(scores={"videomme": 33.0}),
    ],
    ids=["ratio", "method", "tau", "probes", "pivot", "tokens", "13b", "mini", "benchmarks"],
)
def test_a_run_of_something_else_does_not_fill_the_row(other: dict[str, Any]) -> None:
    assert {c.ours for c in cells(sheet([other]), "todre 10%").values()} == {"not run"}


def test_runs_of_the_13b_model_fill_the_second_table() -> None:
    larger = pruned(model={"pretrained": "liuhaotian/llava-v1.6-vicuna-13b"})
    found = sheets("1", [planted("vanilla", scores=FULL), larger])
    assert [s.model for s in found] == ["llava_next_7b", "llava_next_13b"]
    assert cells(found[1], "todre 10%")["mme"].difference == "-140.2"
    assert cells(found[1], "vanilla")["mme"].ours == "not run"
    assert cells(found[0], "todre 10%")["mme"].ours == "not run"


def test_one_run_serves_several_tables() -> None:
    runs = [planted("vanilla", scores=FULL), pruned()]
    row = cells(sheet(runs, "4"), "todre 10%, stage 1+2")
    assert [row[key].ours for key in ("mme", "pope", "average")] == ["1350.0", "72.0", "90.0"]
    assert row["time"] == Cell(published="29:43")  # it has four more benchmarks
    assert cells(sheet(runs, "pivot"), "todre 10%, pivot cls")["average"].difference == "-6.0"


def test_the_time_is_that_of_a_run_over_just_these_benchmarks() -> None:
    four = {key: FULL[key] for key in table_spec("4").benchmarks}
    row = cells(sheet([planted("vanilla", scores=four)], "4"), "vanilla")
    assert row["time"] == Cell("73:10", published="77:04")


def test_a_time_that_other_work_decides_stands_in_no_table() -> None:
    """On processors, that is: on a GPU a run is alone."""
    four = {key: FULL[key] for key in table_spec("4").benchmarks}
    on_cpu = planted("vanilla", scores=four, device="AMD EPYC, 2 cores")
    row = cells(sheet([on_cpu], "4"), "vanilla")
    assert row["time"] == Cell(published="77:04")
    computed = on_cpu | {"cpu_seconds": 61.2}
    assert cells(sheet([computed], "4"), "vanilla")["time"] == Cell(published="77:04")
    assert cells(sheet([on_cpu], "3"), "vanilla")["samples_per_s"] == Cell(published="1.5")
    mini = [run | {"device": "AMD EPYC, 2 cores"} for run in mini_runs()]
    assert "time" not in sheet(mini, "5", suite="mini").columns
    assert "time:" not in said(sheet(mini, "5", suite="mini"))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("todre+vanilla", {"retain_ratio": 0.25}),
        ("todre", {"retain_ratio": 0.25, "probe_depths": []}),
        ("todre_v1+vanilla", {"retain_ratio": 0.25, "objective": "max_sum"}),
    ],
)
def test_stage_1_alone_is_found_however_it_was_spelled(method: str, options: Any) -> None:
    row = cells(sheet([planted(method, options, LESS)], "4"), "todre 25%, stage 1")
    assert row["gqa"].ours == "54.0"


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("vanilla+todre", {}),
        ("todre", {"retain_ratio": 1.0}),
        ("todre", {"retain_ratio": 1.0, "probe_depths": [0.875], "tau": 0.1}),
        ("todre_v1", {"retain_ratio": 1.0, "probe_depths": [0.88], "tau": 0.1}),
    ],
)
def test_stage_2_alone_is_found_in_all_three_tables(method: str, options: Any) -> None:
    run = planted(method, options, LESS)
    for table, label in (
        ("4", "todre stage 2"),
        ("5", "todre stage 2, tau 0.10"),
        ("6", "todre stage 2, 7/8"),
    ):
        assert cells(sheet([run], table), label)["gqa"].ours == "54.0", table


def test_every_layer_from_the_middle_is_found() -> None:
    depths = [layer / 32 for layer in range(16, 32)]
    run = planted("todre_v1", {"retain_ratio": 1.0, "probe_depths": depths}, LESS)
    found = sheet([run], "6")
    assert cells(found, "todre_v1 stage 2, all from 4/8")["gqa"].ours == "54.0"
    filled = [spec.label for spec, row, _ in found.rows if row["gqa"].ours != "not run"]
    assert filled == ["todre_v1 stage 2, all from 4/8"]


def test_identity_tells_apart_what_differs_and_ignores_a_seed() -> None:
    same = identity("random", {"retain_ratio": 0.1, "seed": 3}, 32)
    assert same == identity("random", {"retain_ratio": 0.1}, 32)
    assert same != identity("uniform", {"retain_ratio": 0.1}, 32)
    assert identity("fastv", {"retain_ratio": 0.1}, 32) != identity(
        "fastv", {"retain_ratio": 0.1, "layer": 3}, 32
    )
    assert identity("todre+vtw", {}, 32) != identity("todre+vanilla", {}, 32)
    assert identity("todre", {"text_set": "all"}, 32) != identity("todre", {}, 32)
    depths = {"probe_depths": [0.88]}  # the same layer of 10, another of 200
    assert identity("todre", depths, 10) == identity("todre", {}, 10)
    assert identity("todre", depths, 200) != identity("todre", {}, 200)
    assert identity("todre", depths, None) != identity("todre", {}, None)


def test_of_two_runs_that_fit_the_newest_is_shown_and_it_is_said() -> None:
    old = pruned(scores=LESS | {"gqa": 1.0}, name="z old", time_utc="2026-10-01")
    found = sheet(runs := [old, pruned(name="a new")])
    assert cells(found, "todre 10%")["gqa"].ours == "54.0"
    assert unshown([found], runs) == [], "the older one fits the row too"
    assert "todre 10%: 2 runs fit; the newest is shown, a new." in said(found)


def test_a_run_with_a_score_comes_before_one_with_a_submission() -> None:
    sent = pruned(
        scores={"vqav2": scored(None, status="submission")}, name="sent", time_utc="2026-12-01"
    )
    note = "val split; the papers say test-dev"
    local = pruned(scores={"vqav2": scored(60.0, note=note)}, suite="image_local")
    found = sheet([sent, local])
    assert cells(found, "todre 10%")["vqav2"].ours == "60.0"
    assert f"VQAv2: {note}" in said(found)


def test_below_the_table_stand_device_versions_commits_and_number_of_runs() -> None:
    dirty = pruned(git_commit="fedcba9876543210", git_dirty=True, device="another device")
    unused = planted("todre", {"retain_ratio": 0.3, "tau": 0.2}, LESS, name="unused")
    found = sheet([planted("vanilla", scores=FULL), dirty, unused])
    assert (
        "Ours: 2 runs; a device, another device; torch 2.13.0, transformers 5.23.0;"
        " commit 0123456789, fedcba9876 with local changes."
    ) in said(found)
    assert "differ" not in said(found).split("Ours:")[1]
    assert "Ours: no runs yet." in said(sheet([]))


def test_runs_with_different_settings_in_one_table_are_told() -> None:
    native = pruned(model={"key": "llava_next_7b", "protocol": "native"})
    found = sheet([planted("vanilla", scores=FULL), native])
    assert "These runs differ in: protocol native | paper." in said(found)


def test_a_run_of_an_unknown_method_is_named_not_swallowed() -> None:
    found = sheet([planted("no_such_method", {}, LESS, name="odd")])
    assert "odd fits no row: method 'no_such_method' is unknown" in said(found)


def test_published_numbers_are_always_labelled() -> None:
    for table in TABLES:
        for found in sheets(table, []):
            lines = {line for row in stacked(found).rows for line in row[1].split("\n")}
            assert lines <= {"ours", "published"} and "published" in lines
            assert "not a result of this project" in said(found)


def test_a_model_that_nobody_can_run_here_has_published_numbers_only() -> None:
    qwen, internvl = sheets("cross_model", [])
    assert (qwen.model, internvl.model) == ("qwen2_5_vl_7b", "internvl2_8b")
    assert not any(cell.ours for _, row, _ in internvl.rows for cell in row.values())
    assert "Published only" in said(internvl)
    assert cells(qwen, "todre 25%")["gqa"].ours == "not run"


@pytest.mark.parametrize(
    "model",
    [{"key": "qwen2_5_vl_7b"}, {"pretrained": "/data/Qwen2.5-VL-7B-Instruct"}],
    ids=["key", "path"],
)
def test_finished_runs_of_other_models_stand_in_their_table(model: dict[str, Any]) -> None:
    runs = [planted("vanilla", scores=FULL, model=model), pruned(0.25, model=model)]
    found = sheet(runs, "cross_model")
    row = cells(found, "todre 25%")
    assert (row["gqa"].ours, row["gqa"].published, row["gqa"].difference) == (
        "54.0",
        "57.3",
        "-3.3",
    )
    assert row["average"].ours == "88.8 (8 of 12)"
    assert "no runs of this model" not in said(found) and unshown([found], runs) == []


def test_a_model_without_a_table_of_the_papers_has_its_own_per_suite() -> None:
    """As `MODEL=llava_1_5_7b bash scripts/table1_image.sh` ends."""
    model = {"key": "llava_1_5_7b"}
    runs = [
        planted("vanilla", {"retain_ratio": 1.0}, FULL, model),
        pruned(0.25, model=model),
        planted("vanilla", {}, {"where": 50.0}, model, "own"),
    ]
    found = sheets("1", runs)
    assert [each.model for each in found] == [
        "llava_next_7b",
        "llava_next_13b",
        *2 * ["llava_1_5_7b"],
    ]
    image, own = found[2:]
    assert "Suite image, in the shape of: Image benchmarks" in image.title
    assert cells(image, "todre 25%")["average"].ours == "88.8"
    assert cells(image, "random 10%")["gqa"].ours == "not run"
    assert cells(own, "vanilla")["where"].ours == "50.0" and list(own.columns) == [
        "where",
        "average",
    ]
    assert unshown(found, runs) == []
    (only,) = sheets("1", runs[:2], suite="image", model="llava_1_5_7b")
    assert cells(only, "todre 25%") == cells(image, "todre 25%")


def test_ablations_of_a_model_that_the_papers_did_not_ablate_are_shown() -> None:
    model = {"key": "llava_next_13b"}
    runs = [
        planted("vanilla", {}, {"gqa": 60.0}, model, "ablation"),
        planted("todre", {"retain_ratio": 1.0, "tau": 0.05}, {"gqa": 57.0}, model, "ablation"),
    ]
    found = sheets("5", runs)[-1]
    assert found.model == "llava_next_13b" and "no published numbers" in found.title
    assert cells(found, "todre stage 2, tau 0.05")["average"].ours == "95.0"


# -------------------------------------------------------------------- runs of no printed row


def test_every_run_with_a_budget_has_a_row_and_the_others_are_counted() -> None:
    more = [
        pruned(method="visionzip"),
        planted("divprune+todre", {"retain_ratio": 0.25}, LESS, name="combined"),
        *(planted("todre", {"retain_tokens": n}, LESS, name=f"{n}") for n in (64, 192, 128)),
    ]
    odd = [
        planted("todre", {"retain_ratio": 0.1, "tau": 0.05}, LESS, name="tau"),
        planted("todre", {"retain_ratio": 0.1, "probe_depths": [0.3]}, LESS, name="layers"),
        planted("vanilla", {}, {"where": 50.0}, suite="mini", name="another suite"),
    ]
    runs = [planted("vanilla", scores=FULL), *more, *odd]
    found = sheets("1", runs)
    labels = [row.label for row, _, _ in found[0].rows]
    assert labels[-3:] == ["todre, 192 tokens", "todre, 128 tokens", "todre, 64 tokens"]
    assert labels[0] == "vanilla" and {"visionzip 10%", "divprune+todre 25%"} <= set(labels)
    assert cells(found[0], "todre, 64 tokens")["gqa"] == Cell("54.0", samples="100")
    assert {run["name"] for run in unshown(found, runs)} == {"tau", "layers", "another suite"}


def test_the_command_counts_what_fits_no_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [pruned(), planted("todre", {"retain_ratio": 0.1, "tau": 0.05}, LESS, name="tau")]
    for run in runs:
        (tmp_path / f"{run['name']}.json").write_text(json.dumps(run))
    line = "1 runs fit no row (python -m eval table all shows them)."
    run_command("1", "--results", str(tmp_path))
    assert line in capsys.readouterr().out
    run_command("1", "--results", str(tmp_path), "--format", "csv")
    printed, told = capsys.readouterr()
    assert line in told and line not in printed
    (tmp_path / "tau.json").unlink()
    run_command("1", "--results", str(tmp_path))
    assert "fit no row" not in capsys.readouterr().out


def seeds_of(*scores: float, **given: Any) -> list[dict[str, Any]]:
    """Return runs of a random method that differ in their seed."""
    found = []
    for seed, score in enumerate(scores):
        run = planted("random", {"retain_ratio": 0.25}, {"gqa": hits(int(score), seed)}, **given)
        run["config"]["seed"] = seed
        found.append(run | {"name": f"random seed {seed}"})
    return found


def test_seeds_are_averaged_with_their_spread() -> None:
    full = planted("vanilla", {}, {"gqa": hits(80)})
    runs = [full, *seeds_of(40, 50, 60)]
    (found,) = sheets("1", runs, model="llava_next_7b")
    row = cells(found, "random 25%")
    assert row["gqa"].ours == "50.0 ± 10.0"
    assert row["average"].ours == "62.5 ± 12.5 (1 of 8)"
    low, high = interval(row["gqa"])
    assert 40 < low < 50 < high < 60, "of the items' means over the seeds"
    assert "random 25%: mean ± standard deviation over seeds 0, 1, 2." in said(found)
    assert "Ours: 4 runs" in said(found) and "seed 0 | 1 | 2" in said(found)
    assert unshown([found], runs) == []


def test_a_mean_over_fewer_seeds_than_were_run_says_so() -> None:
    runs = seeds_of(40, 50, 60)
    runs[1]["benchmarks"]["gqa"] = scored(None, status="submission")
    (merged,) = over_seeds(runs)
    assert merged["benchmarks"]["gqa"]["score"] == 50.0
    assert merged["benchmarks"]["gqa"]["note"] == "of 2 of 3 seeds; the others have no score"


def test_runs_of_a_suite_before_and_after_an_edit_are_told_apart() -> None:
    full = planted("vanilla", {"retain_ratio": 1.0}, FULL) | {"suite_digest": "before"}
    (found,) = sheets("1", [full, pruned() | {"suite_digest": "after"}], model="llava_next_7b")
    assert "These runs differ in: suite_digest after | before." in said(found)


def test_of_two_runs_with_one_seed_the_newest_counts() -> None:
    first, second = seeds_of(40, 60)
    old = first | {"time_utc": "2026-01-01", "name": "old"}
    old["benchmarks"] = {"gqa": hits(10)}
    merged, alone = sorted(over_seeds([old, first, second]), key=lambda run: len(members(run)))[
        ::-1
    ]
    assert merged["benchmarks"]["gqa"]["score"] == 50.0 and alone == old
    failed = first | {"status": "failed", "error": "x", "benchmarks": {}}
    assert len(over_seeds([failed, second])) == 2
    other = second | {"config": second["config"] | {"limit": 5}}
    assert len(over_seeds([first, other])) == 2


# -------------------------------------------------------------------------------- intervals


def test_scores_that_are_means_of_their_items_have_an_interval() -> None:
    runs = [planted("vanilla", scores=FULL | {"gqa": hits(60)})]
    low, high = interval(cells(sheet(runs), "vanilla")["gqa"])
    assert low == pytest.approx(60 - 9.6, abs=1.1) and high == pytest.approx(60 + 9.6, abs=1.1)
    off = hits(60) | {"score": 64.0}  # an F1 score, say
    points = hits(60) | {"scale": "points"}
    for other in (off, points, hits(60) | {"items": None}):
        row = cells(sheet([planted("vanilla", scores=FULL | {"gqa": other})]), "vanilla")
        assert row["gqa"].interval == ""


def interval(cell: Cell) -> tuple[float, float]:
    low, high = re.fullmatch(r"\[(.*), (.*)\]", cell.interval).groups()  # type: ignore[union-attr]
    return float(low), float(high)


def mini_runs() -> list[dict[str, Any]]:
    model = {"key": "mini", "pretrained": "checkpoints/mini"}
    full = {key: hits(80, seed) for seed, key in enumerate(MINI)}
    less = {key: hits(60, seed + 9) for seed, key in enumerate(MINI)}
    given = {"model": model, "suite": "mini"}
    return [
        planted("vanilla", {}, full, **given),
        planted("todre", {"retain_ratio": 0.10}, less, **given),
        planted("todre", {"retain_ratio": 1.0, "tau": 0.15}, less, **given),
        planted("visionzip", {"retain_ratio": 0.10}, less, **given),
    ]


def test_benchmarks_at_which_the_unpruned_model_scores_0_are_in_no_count() -> None:
    full = FULL | {"gqa": 0.0, "vqav2": scored(None, status="submission")}
    found = sheet([planted("vanilla", scores=full), pruned(scores=LESS)])
    average = cells(found, "todre 10%")["average"]
    assert average.ours == "90.0 (6 of 8)"
    assert average.difference == "-5.8"  # the papers' over the same six: 95.8
    assert "as the unpruned model scores 0 there: GQA." in said(found)
    nothing = sheet([planted("vanilla", scores={"gqa": 0.0}), pruned(scores={"gqa": 0.0})])
    assert cells(nothing, "todre 10%")["average"].ours == ""


def test_mmes_total_is_shown_and_not_averaged() -> None:
    total = {"mme_total": scored(1800.0, scale="points", averaged=False)}
    model = {"key": "llava_1_5_7b"}
    full, less = (
        planted("vanilla", {}, FULL | total, model),
        pruned(scores=LESS | total, model=model),
    )
    found = sheets("1", [full, less], model="llava_1_5_7b")[0]
    row = cells(found, "todre 10%")
    assert (row["mme_total"].ours, row["average"].ours) == ("1800.0", "88.8")
    papers = sheet([planted("vanilla", {}, FULL | total), pruned(scores=LESS | total)])
    assert cells(papers, "todre 10%")["average"].ours == "88.8"


def test_a_watched_answer_stands_beside_the_score() -> None:
    told = scored(54.0, watched_answer={"answer": "unanswerable", "share": 0.312})
    found = sheet([pruned(scores={"vizwiz": told})])
    assert cells(found, "todre 10%")["vizwiz"].answers == "31% unanswerable"
    assert "31% unanswerable" in render([found], "text")


def test_intervals_say_what_was_drawn() -> None:
    pope = hits(60) | {"groups": [i // 18 for i in range(100)]}
    single = hits(60) | {"groups": [*range(100)]}
    runs = [planted("vanilla", {}, {"pope": pope, "gqa": single, "scienceqa": hits(60)})]
    row = cells(sheet(runs), "vanilla")
    assert interval(row["pope"]) != interval(row["gqa"])
    assert (
        "bootstrap over images: POPE; over items: GQA; over items (whether they share images is"
        " not on record): ScienceQA, paired"
    ) in said(sheet(runs))


def test_the_average_has_an_interval_where_all_benchmarks_have_items() -> None:
    found = sheet(mini_runs(), suite="mini")
    average = cells(found, "todre 10%")["average"]
    assert average.ours == "75.0"
    low, high = interval(average)
    assert 55 < low < 70 and 80 < high < 95
    assert cells(found, "vanilla")["average"] == Cell("100.0")
    runs = mini_runs()
    runs[1]["benchmarks"]["where"]["items"] = [[i + 7, 1] for i in range(60)] + [
        [i + 67, 0] for i in range(40)
    ]
    found = sheet(runs, suite="mini")
    assert cells(found, "todre 10%")["average"].interval == ""
    assert "No interval of an average over other items" in said(found)


# ------------------------------------------------------------------------- the bundled suite


def test_the_bundled_suite_has_its_own_benchmarks_and_no_published_numbers() -> None:
    stage_2 = planted("todre", {"retain_ratio": 1.0}, model={"key": "mini"}, suite="mini")
    found = sheet([*mini_runs(), stage_2], suite="mini")
    assert "bundled mini model, not evidence about 7B models" in found.title
    assert tuple(found.columns) == (*MINI, "average")
    table = stacked(found)
    assert "published" not in {line for row in table.rows for line in row[1].split("\n")}
    assert "as printed" not in said(found)
    labels = [row[0] for row in table.rows]
    assert labels[0] == "vanilla" and len(labels) == 12
    assert labels[-2:] == ["todre_v1 10%", "todre 10%"]
    assert "visionzip 10%" in labels  # it was run, though no list asks for it
    assert cells(found, "random 25%")["where"].ours == "not run"


def test_the_bundled_suite_has_ablation_tables_too() -> None:
    found = sheet(mini_runs(), "5", suite="mini")
    assert cells(found, "todre stage 2, tau 0.15")["average"].ours == "75.0"
    assert cells(found, "todre stage 2, tau 0.10")["average"].ours == "not run"
    both, second = (
        {row.method for row, _, _ in sheet(mini_runs(), "5", suite="mini", version=version).rows}
        for version in (None, "v2")
    )
    assert both == {"vanilla", "todre", "todre_v1"} and second == {"vanilla", "todre"}
    found = sheet(mini_runs(), "3", suite="mini")
    assert cells(found, "todre 10%")["tflops"].ours == "6.5"


@pytest.mark.parametrize(
    ("model", "num_layers"), [({"key": "mini"}, 10), ({"key": "other", "num_layers": 6}, 6)]
)
def test_probe_layers_of_a_suite_are_those_of_its_model(model: Any, num_layers: int) -> None:
    depths = [layer / num_layers for layer in range(num_layers // 2, num_layers)]
    options = {"retain_ratio": 1.0, "probe_depths": depths}
    found = sheet([planted("todre", options, {"where": 50.0}, model, "own")], "6", suite="own")
    assert cells(found, "todre stage 2, all from 4/8")["where"].ours == "50.0"
    assert cells(found, "todre stage 2, 7/8")["where"].ours == "not run"


def test_runs_of_the_bundled_model_stay_out_of_the_papers_tables() -> None:
    rows = sheet(mini_runs()).rows
    assert {cell.ours for _, row, _ in rows for cell in row.values()} == {"not run"}


def test_a_suite_nobody_ran_is_an_error_with_those_that_were() -> None:
    with pytest.raises(TodreError, match="suite 'minl' is unknown.*Did you mean 'mini'"):
        sheet(mini_runs(), suite="minl")
    with pytest.raises(TodreError, match="table '2' has none of the benchmarks of these runs"):
        sheet(mini_runs(), "2", suite="mini")


def test_a_suite_of_a_papers_model_only_narrows_the_runs() -> None:
    local = pruned(suite="image_local", scores=LESS | {"gqa": 33.0})
    found = sheet([pruned(), local], suite="image_local")
    assert cells(found, "todre 10%")["gqa"].ours == "33.0"
    assert cells(found, "todre 10%")["gqa"].published == "59.4"


# ------------------------------------------------------------------------------- efficiency


def test_the_efficiency_table_prefers_a_run_over_pope_alone() -> None:
    pope = pruned(
        scores={"pope": 80.0},
        suite="pope",
        items_per_second=2.9,
        tokens={"prefill_flops": 6.04e12},
        time_utc="2026-01-01",
    )
    row = cells(sheet([planted("vanilla", scores=FULL), pruned(), pope], "3"), "todre 10%")
    assert row["tflops"] == Cell("6.0", "", "6.0", "0.0")
    assert row["memory_gb"] == Cell("14.0", "", "13.6", "+0.4")
    assert row["samples_per_s"] == Cell("2.9", "", "2.9", "0.0")
    assert row["average"].ours == "88.8"
    failed = pruned(status="failed", error="lost", tokens=None, scores={})
    assert cells(sheet([failed], "3"), "todre 10%")["tflops"].ours == "failed"


# ---------------------------------------------------------------------------- reading, formats


def test_runs_are_read_from_folders_and_other_json_files_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text(json.dumps(pruned(name="b")))
    (tmp_path / "a.json").write_text(json.dumps(pruned(name="a")))
    (tmp_path / "other.json").write_text(json.dumps({"results": {}}))
    (tmp_path / "list.json").write_text("[]")
    assert [run["name"] for run in load_runs([tmp_path])] == ["a", "b"]
    (tmp_path / "cut.json").write_text('{"format": 1,')
    with pytest.raises(TodreError, match="cut.json.*is not JSON"):
        load_runs([tmp_path])
    with pytest.raises(TodreError, match="is not a folder"):
        load_runs([tmp_path / "missing"])


def test_the_model_is_the_stated_key_or_guessed_from_the_checkpoint() -> None:
    for model, key in (
        ({"key": "llava_next_7b", "pretrained": "x/y"}, "llava_next_7b"),
        ({"key": "llava-v1.6-vicuna-7b", "pretrained": "x/llava-v1.6-vicuna-7b"}, "llava_next_7b"),
        ({"key": "mine", "pretrained": "x/y"}, "mine"),
        ({"pretrained": "llava-hf/llava-v1.6-vicuna-13b-hf"}, "llava_next_13b"),
        ({"pretrained": "somewhere/checkpoints/mini/"}, "mini"),
        ({"pretrained": "liuhaotian/llava-v1.6-34b"}, "llava-v1.6-34b"),
    ):
        assert model_key(planted("vanilla", model=model)) == key


def all_runs() -> list[dict[str, Any]]:
    part = LESS | {"gqa": hits(54), "vqav2": scored(None, status="submission", note="5 % & #1_x")}
    return [planted("vanilla", scores=FULL), pruned(scores=part)]


def test_csv_parses_back_with_a_column_for_every_number() -> None:
    text = render(sheets("1", all_runs()), "csv")
    header, *lines = csv.reader(io.StringIO(text))
    assert {len(line) for line in lines} == {len(header)}
    assert len(lines) == 15 + 11
    row = next(dict(zip(header, line, strict=True)) for line in lines if line[1] == "todre 10%")
    assert (row["model"], row["gqa ours"], row["gqa published"]) == (
        "llava_next_7b",
        "54.0",
        "59.4",
    )
    assert row["gqa difference"] == "-5.4" and row["gqa samples"] == "100"
    assert row["gqa interval"].startswith("[") and row["vqav2 ours"] == "server"
    assert (row["runs"], row["commits"]) == ("todre_0.1_image_None", "0123456789abcdef")


def test_latex_has_the_same_number_of_columns_in_every_line_and_escapes_its_text() -> None:
    text = render(sheets("1", all_runs()), "latex")
    lines = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {10}
    assert r"todre\_v1 10\%" in text and r"5 \% \& \#1\_x" in text
    assert not re.search(r"(?<!\\)[%#_$]", text)
    assert text.count(r"\begin{tabular}{llrrrrrrrrr}") == 2


def test_latex_escapes_every_special_character() -> None:
    text = drawing.as_latex(Table("t", ["a"], [["\\ & % $ # _ { } ~ ^ | < >"]]))
    assert r"\textbackslash{} \& \% \$ \# \_ \{ \} \textasciitilde{} \textasciicircum{}" in text
    assert r"\textbar{} \textless{} \textgreater{}" in text


def test_markdown_has_a_row_per_printed_row_and_the_notes_below() -> None:
    text = render(sheets("1", all_runs(), model="llava_next_7b"), "md")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 15
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {12}
    assert re.search(r"\| todre 10% \| ours<br>95 % interval<br>published<br>difference", text)
    assert "54.0<br>[" in text and "- Ours: 2 runs;" in text


def test_text_has_aligned_columns() -> None:
    table = Table("title", ["method", "", "GQA"], [["a", "ours\npublished", "1.0\n59.4"]], [], 2)
    lines = drawing.as_text(table).splitlines()
    assert lines[:2] == ["title", ""]
    assert lines[2] == "method              GQA"
    assert lines[4:6] == ["a       ours        1.0", "        published  59.4"]


def run_command(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    table_command.add_parser(parser.add_subparsers(dest="command"))
    return table_command.run(parser.parse_args(["table", *arguments]))


def test_the_command_prints_or_writes_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text(json.dumps(pruned()))
    assert run_command("1", "--results", str(tmp_path), "--model", "llava_next_7b") == 0
    printed = capsys.readouterr().out
    assert "1350.0" in printed and "llava_next_13b" not in printed
    out = tmp_path / "table.md"
    assert run_command("1", "--results", str(tmp_path), "--format", "md", "--out", str(out)) == 0
    assert "| todre 10% |" in out.read_text() and not capsys.readouterr().out
    with pytest.raises(TodreError, match="cannot be written"):
        run_command("1", "--results", str(tmp_path), "--out", str(tmp_path / "no" / "x"))


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("style", drawing.RENDERERS)
def test_every_table_can_be_drawn_in_every_format_before_anything_is_run(table, style) -> None:
    assert render(sheets(table, []), style)


def test_one_version_of_the_paper_can_be_shown_alone() -> None:
    found = sheet([], version="v2")
    assert [spec.label for spec, _, _ in found.rows].count("todre_v1 10%") == 0
    assert cells(found, "globalcom2 10%")["vizwiz"].published == "56.6"
    assert "v1 (" not in said(found)


def test_what_a_script_plans_for_another_model_fills_its_own_table() -> None:
    """As `MODEL=llava_1_5_7b bash scripts/table1_image.sh` does: no cell stays without a run."""
    configs = Path(__file__).resolve().parents[2] / "configs" / "runs"
    for name, table in (
        ("table1_image", "1"),
        ("table2_video", "2"),
        ("cross_model", "cross_model"),
    ):
        planned = plan([configs / f"{name}.yaml"], ["model=llava_1_5_7b"])
        assert len(planned) == {"1": 11, "2": 11, "cross_model": 3}[table]
        runs = []
        for run in planned:
            stored = planted("x", scores=dict.fromkeys(run.config()["benchmarks"], 50.0))
            runs.append(stored | {"name": run.name, "config": run.config()})
        found = sheets(table, runs)
        own = found[-1]
        assert own.model == "llava_1_5_7b" and unshown(found, runs) == []
        assert "not run" not in {cell.ours for _, row, _ in own.rows for cell in row.values()}
