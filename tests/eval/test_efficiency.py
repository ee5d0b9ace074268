"""Table 3 by dimensions: the bench's results beside the published numbers, labelled as such."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from eval.bench.methods import table3
from eval.results.published import rows
from eval.tables import command as table_command
from eval.tables import render as drawing
from eval.tables.efficiency import MISSING, efficiencies, load_benches

TABLE3 = [each.label for each in table3()]


def bench(size: str = "7b", measured: bool = False, **changes: Any) -> dict[str, Any]:
    """Return a result as ``python -m eval bench --table3`` writes it."""
    methods = []
    for index, each in enumerate(table3()):
        flops = {"paper_prefill": 17.12e12 / (index + 1), "prefill": 42.69e12 / (index + 1)}
        row = {"label": each.label, "method": each.method, "options": dict(each.options)}
        row |= {"flops": flops, "measured": measured}
        if measured:
            row |= {"peak_memory_mib": 15360.0 - index}
            row |= {"samples_per_s": {"median": 1.5 + index, "p20": 1.25, "p80": 9.75, "count": 3}}
        methods.append(row)
    return {
        **{"what": "bench", "format": 1, "size": size, "checkpoint": None, "table3": True},
        **{"attention": "sdpa", "dtype": "float16", "new_tokens": 3, "methods": methods},
        **{"versions": {"torch": "2"}, "git_dirty": False, "git_commit": "0" * 40},
        **{"device": "a device"},
    } | changes


def cells(table: Any, label: str) -> dict[str, drawing.Cell]:
    return next(cells for spec, cells, _ in table.rows if spec.label == label)


def test_the_bench_runs_every_row_of_the_papers_table_and_todre_withdrawn() -> None:
    assert TABLE3[:-1] == [row.label for row in rows("3")]
    assert TABLE3[-1] == "todre 10%, withdrawn" and table3()[-1].pruner.tau == 1.0


def test_flops_memory_and_speed_stand_beside_the_published_numbers() -> None:
    (table,) = efficiencies({"7b.json": bench(measured=True)})
    vanilla = cells(table, "vanilla")
    assert vanilla["paper_tflops"] == drawing.Cell("17.1", published="31.4")
    assert vanilla["tflops"] == drawing.Cell("42.7"), "exact counts are not compared with Eq. 1's"
    assert vanilla["memory_gb"] == drawing.Cell("15.00", published="15.9")
    assert vanilla["samples_per_s"] == drawing.Cell("1.50 [1.25, 9.75]", published="1.5")
    assert cells(table, "todre 10%")["samples_per_s"].published == "2.9"
    assert cells(table, "todre_v1 10%")["samples_per_s"].published == "2.8"
    assert "not a result of this project" in " ".join(table.notes)
    assert not any(note.startswith(MISSING) for note in table.notes)


def test_without_a_gpu_time_and_memory_say_so_and_flops_stay() -> None:
    (table,) = efficiencies({"7b.json": bench()})
    for _, row, _ in table.rows:
        assert row["memory_gb"].ours == row["samples_per_s"].ours == MISSING
        assert float(row["tflops"].ours) > 0
    notes = " ".join(table.notes)
    assert "need a GPU" in notes and "FlashAttention was not used" in notes
    flash = bench(attention="flash_attention_2")
    assert "was not used" not in " ".join(efficiencies({"7b.json": flash})[0].notes)


@pytest.mark.parametrize("size", ["13b", "cpu"])
def test_what_the_papers_did_not_measure_has_no_published_numbers(size: str) -> None:
    (table,) = efficiencies({"x.json": bench(size)})
    assert {cell.published for _, row, _ in table.rows for cell in row.values()} == {""}
    assert "published" not in " ".join(table.notes)


def test_the_table_command_shows_the_bench_and_not_other_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large = bench("13b")
    large["methods"][0]["flops"]["prefill"] *= 2
    stored = {"13b": large, "7b": bench(), "other": bench(table3=False)}
    for name, result in stored.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    assert [Path(file).name for file in load_benches([tmp_path])] == ["13b.json", "7b.json"]
    parser = argparse.ArgumentParser()
    table_command.add_parser(parser.add_subparsers())

    def show(*arguments: str) -> str:
        given = ["table", *arguments, "--results", str(tmp_path)]
        assert table_command.run(parser.parse_args(given)) == 0
        return capsys.readouterr().out

    text = show("3")
    assert text.index("7b dimensions") < text.index("13b dimensions")
    assert "not run" not in text, "runs over a benchmark are another thing"
    assert show("3", "--model", "llava_next_13b").count("dimensions, random") == 1
    assert "dimensions, random" not in show("1")
    header, *lines = show("3", "--format", "csv").splitlines()
    assert "paper_tflops published" in header and len(lines) == 2 * len(TABLE3)
    for style in ("md", "latex"):
        assert "not measured" in show("3", "--format", style)
