"""The published numbers: complete, consistent with themselves, and each tied to a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval.results.known_models import known_models, num_layers_of, settings_of
from eval.results.published import (
    NUMBERS,
    TABLES,
    models,
    ratio_row,
    relative_average,
    rows,
    suite_rows,
    table_spec,
)
from llava_todre import TodreError
from llava_todre.pruners import create_pruner

MISPRINTS = {
    # (table, version, model, row): (printed average, average of the printed scores)
    ("1", "v1", "llava_next_13b", "fastervlm 10%"): (89.1, 90.0),
    ("1", "v2", "llava_next_7b", "globalcom2 10%"): (92.2, 92.0),
    ("1", "v2", "llava_next_13b", "todre 25%"): (97.3, 97.6),
    ("2", "v2", "llava_next_7b", "divprune 10%"): (100.7, 100.9),
    ("6", "v1", "llava_next_7b", "todre_v1 stage 2, 7/8"): (100.0, 99.9),
}
"""Printed averages that do not follow from the printed scores of their own row."""
EVERY = [(table, model) for table in TABLES for model in models(table)]
RUNNABLE = [(table, model) for table, model in EVERY if model in known_models()]


def recomputed() -> dict[tuple[str, str, str, str], tuple[float, float]]:
    """Return (printed, recomputed) averages of all rows that print scores and their average."""
    found = {}
    for table, model in EVERY:
        keys = table_spec(table).benchmarks
        for version in table_spec(table).sections:
            every = rows(table, version, model)
            full = every[0].published[version]
            for row in every:
                printed = row.published[version]
                if keys[0] in printed and "average" in printed:
                    scores, unpruned = ([float(r[key]) for key in keys] for r in (printed, full))
                    average = relative_average(scores, unpruned)
                    found[table, version, model, row.label] = (float(printed["average"]), average)
    return found


def test_every_printed_average_follows_from_the_printed_scores_but_the_known_misprints() -> None:
    averages = recomputed()
    # v1: 18 + 7 + 6 + 5 + 9 rows, v2: 18 + 9 + 6 + 6, and in the supplement 9 + 5 + 8
    assert len(averages) == 106
    off = {key: pair for key, pair in averages.items() if abs(pair[0] - pair[1]) > 0.1}
    assert off.keys() == MISPRINTS.keys()
    for key, (printed, average) in MISPRINTS.items():
        assert averages[key] == (printed, pytest.approx(average, abs=0.05)), key


def test_the_efficiency_table_repeats_the_averages_of_table_1() -> None:
    averages = {row.label: row.published["v1"]["average"] for row in rows("1", "v1")}
    efficiency = {row.label: row.published["v1"] for row in rows("3", "v1")}
    assert len(efficiency) == 6 and efficiency["fastv 10%"]["tflops"] == 8.2
    assert all(numbers["average"] == averages[label] for label, numbers in efficiency.items())


def test_the_relative_average_is_the_mean_of_ratios_in_percent() -> None:
    assert relative_average([50.0, 30.0], [100.0, 40.0]) == pytest.approx((50 + 75) / 2)


@pytest.mark.parametrize(
    ("model", "version", "count"),
    [
        ("llava_next_7b", None, 15),
        ("llava_next_13b", None, 11),
        ("llava_next_7b", "v1", 11),
        ("llava_next_7b", "v2", 13),
        ("llava_next_13b", "v1", 7),
        ("llava_next_13b", "v2", 5),
    ],
)
def test_table_1_has_the_rows_of_both_versions_baselines_once(model, version, count) -> None:
    found = rows("1", version, model)
    assert len(found) == len({row.label for row in found}) == count
    assert found[0].label == "vanilla"


def test_table_1_is_ordered_by_ratio_then_as_in_the_papers() -> None:
    methods = ["fastv", "sparsevlm", "fastervlm", "globalcom2", "divprune", "todre_v1", "todre"]
    labels = ["vanilla", *(f"{m} {ratio}%" for ratio in (25, 10) for m in methods)]
    assert [row.label for row in rows("1")] == labels


def test_v1_numbers_stand_in_todre_v1_rows_and_v2_numbers_in_todre_rows() -> None:
    found = {row.label: row for row in rows("1")}
    for label, version, mme, average in (
        ("todre_v1 10%", "v1", 1413.1, 95.1),
        ("todre 10%", "v2", 1464.4, 95.0),
    ):
        assert found[label].published.keys() == {version}
        numbers = found[label].published[version]
        assert (numbers["mme"], numbers["average"]) == (mme, average)
    assert found["fastv 25%"].published.keys() == {"v1", "v2"}
    both = found["globalcom2 10%"].published
    assert (both["v1"]["vizwiz"], both["v2"]["vizwiz"]) == (57.6, 56.6)


@pytest.mark.parametrize(("table", "model"), RUNNABLE)
def test_every_row_can_be_run(table: str, model: str) -> None:
    found = rows(table, model=model)
    assert [row.method for row in found].count("vanilla") == 1
    for row in found:
        create_pruner(row.method, **row.options)
        assert row.published


def test_table_4_rows_switch_the_stages() -> None:
    found = {row.label: create_pruner(row.method, **row.options) for row in rows("4")}
    assert len(found) == 11
    for version, layers in (("todre_v1", (16, 20, 24, 28)), ("todre", (28,))):
        only_second = found[f"{version} stage 2"]
        assert only_second.num_keep(2880) == 2880 and only_second.probe_layers(32) == layers
        for share, kept in ((25, 720), (10, 288)):
            only_first = found[f"{version} {share}%, stage 1"]
            assert only_first.num_keep(2880) == kept and only_first.probe_layers(32) == ()
            both = found[f"{version} {share}%, stage 1+2"]
            assert both.num_keep(2880) == kept and both.probe_layers(32) == layers


def test_tables_5_and_6_run_stage_2_alone() -> None:
    for table, count in (("5", 9), ("6", 16)):
        pruned = rows(table)[1:]
        assert len(pruned) == count - 1
        assert {row.options["retain_ratio"] for row in pruned} == {1.0}
    taus = [(row.method, row.options["tau"]) for row in rows("5")[1:]]
    assert taus[0] == ("todre_v1", 0.01) and taus[-1] == ("todre", 0.15)


@pytest.mark.parametrize("num_layers", [8, 10, 22, 32, 40, 49])
def test_all_from_the_middle_is_every_layer_of_the_upper_half(num_layers: int) -> None:
    found = {row.label: row for row in rows("6", num_layers=num_layers)}
    for method in ("todre_v1", "todre"):
        row = found[f"{method} stage 2, all from 4/8"]
        layers = create_pruner(row.method, **row.options).probe_layers(num_layers)
        assert layers == tuple(range(num_layers // 2, num_layers))


def test_a_row_that_needs_the_number_of_layers_is_left_out_without_it() -> None:
    lost = {row.label for row in suite_rows("6", 10)} - {row.label for row in suite_rows("6")}
    assert lost == {"todre_v1 stage 2, all from 4/8", "todre stage 2, all from 4/8"}


def test_the_pivot_table_has_a_row_per_pivot_and_ratio() -> None:
    pruned = rows("pivot")[1:]
    settings = [(row.options["pivot"], row.options["retain_ratio"]) for row in pruned]
    pivots = ("cls", "random", "nearest", "farthest")
    assert settings == [(pivot, ratio) for ratio in (0.25, 0.10) for pivot in pivots]
    assert [row.published["v2"]["average"] for row in pruned[::4]] == [98.9, 96.0]


def test_suite_rows_have_the_shape_but_no_published_numbers() -> None:
    for table in TABLES:
        found = suite_rows(table, 10)
        assert found[0].method == "vanilla"
        assert not any(row.published for row in found)
    assert len(suite_rows("1")) == 11 and len(suite_rows("3")) == 6
    assert suite_rows("1")[1] == ratio_row("random", 0.25)
    assert [row.label for row in suite_rows("cross_model")] == ["vanilla", "todre 25%", "todre 10%"]


def test_where_a_table_stands_is_said_per_version() -> None:
    assert {name: spec.number for name, spec in TABLES.items()} == {
        "1": "Table 1 of v1 and v2",
        "2": "Table 2 of v1 and v2",
        "3": "Table 3 of v1; Table 4 of v2",
        "4": "Table 4 of v1; Table 5 of v2",
        "5": "Table 5 of v1; supplement Table 2 of v2",
        "6": "Table 6 of v1; supplement Table 3 of v2",
        "pivot": "supplement Table 1 of v2",
        "cross_model": "Table 3 of v2",
    }


def test_every_row_prints_the_scores_of_its_benchmarks_in_both_versions() -> None:
    for table, spec in TABLES.items():
        for model in models(table) if spec.shows_scores else ():
            for row in rows(table, model=model):
                for version, printed in row.published.items():
                    assert set(spec.benchmarks) <= set(printed), (table, version, row.label)


def test_what_v2_says_twice_and_differently_is_kept_as_printed() -> None:
    """Not misprints of one number but two statements: whoever compares must know which."""
    main = {row.label: row.published.get("v2", {}) for row in rows("1")}["todre 10%"]
    for table, label in (("4", "todre 10%, stage 1+2"), ("pivot", "todre 10%, pivot cls")):
        ablated = {row.label: row.published.get("v2", {}) for row in rows(table)}[label]
        assert [main[key] for key in ("mme", "scienceqa")] == [1464.4, 70.2]
        assert [ablated[key] for key in ("mme", "scienceqa")] == [1469.3, 70.5]
        assert [main[key] for key in ("gqa", "pope")] == [ablated[key] for key in ("gqa", "pope")]
    times = {
        row.label: row.published["v2"]["time"]
        for table in ("4", "5", "6")
        for row in rows(table, "v2")
    }
    same_setting = ("todre stage 2", "todre stage 2, 7/8", "todre stage 2, tau 0.10")
    assert [times[label] for label in same_setting] == ["70:15", "70:15", "72:35"]
    assert times["todre stage 2, tau 0.03"] == "79:22" > times["vanilla"] == "77:04"


def test_wrong_names_are_errors_with_what_is_allowed() -> None:
    with pytest.raises(TodreError, match="table '7' is unknown.*cross_model"):
        rows("7")
    with pytest.raises(TodreError, match="version 'v3' is unknown.*v1, v2"):
        rows("1", "v3")
    with pytest.raises(TodreError, match="'mini' is unknown.*llava_next_7b"):
        rows("1", model="mini")


def test_the_file_says_first_that_it_holds_no_results_of_ours() -> None:
    first = NUMBERS.read_text().splitlines()[0]
    assert first.startswith("#") and "never results of this project" in first


def test_facts_about_a_model_stand_in_its_file() -> None:
    """And in no other: tables, plans and the paper's rows take them from there."""
    layers = {key: num_layers_of(key) for key in known_models()}
    assert layers == {
        "llava_1_5_7b": 32,
        "llava_1_5_13b": 40,
        "llava_next_7b": 32,
        "llava_next_13b": 40,
        "mini": 10,
        "qwen2_5_vl_7b": 28,
    }
    assert not any(
        "num_layers" in settings_of(key) or "decoder" in settings_of(key) for key in known_models()
    )
    assert num_layers_of("internvl2_8b") is None
    config = Path(__file__).parents[2] / "checkpoints" / "mini" / "config.json"
    assert json.loads(config.read_text())["num_hidden_layers"] == layers["mini"]
