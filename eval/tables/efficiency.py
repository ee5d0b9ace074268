"""Table 3 from results of the bench: models by dimensions, next to what the papers printed.

``eval.tables.paper`` fills Table 3 from runs over a benchmark; here are FLOPs, memory and samples
per second of random weights, which need neither checkpoint nor data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.bench.dims import MODELS
from eval.results.files import checked_bench
from eval.results.published import ABLATED, VERSIONS, RowSpec, place, rows, table_spec
from eval.results.schema import read_json
from eval.tables.render import Cell

Result = Mapping[str, Any]
COLUMNS = ("paper_tflops", "tflops", "memory_gb", "samples_per_s")
MISSING = "not measured"
_WITHDRAWN = ", withdrawn"


@dataclass(frozen=True)
class Efficiency:
    """What the renderers of :mod:`eval.tables.render` draw."""

    model: str
    title: str
    rows: Sequence[tuple[RowSpec, dict[str, Cell], list[str]]]
    notes: Sequence[str]
    columns: Sequence[str] = COLUMNS
    used: Mapping[str, Result] = field(default_factory=dict)


def load_benches(folders: Sequence[Path]) -> dict[str, Result]:
    """Return the bench results in some folders of Table 3's methods, by file."""
    found: dict[str, Result] = {}
    for folder in folders:
        for file in sorted(folder.glob("*.json")):
            stored = read_json(file)
            if isinstance(stored, dict) and stored.get("what") == "bench" and stored.get("table3"):
                found[str(file)] = checked_bench(stored, file)
    return found


def efficiencies(results: Mapping[str, Result], model: str | None = None) -> list[Efficiency]:
    """Return a table per result, the smallest model first.

    Args:
        results: as :func:`load_benches` gives them.
        model: only results with the dimensions of this model of the papers.
    """
    chosen = [
        (name, result)
        for name, result in results.items()
        if model is None or MODELS.get(result["size"]) == model
    ]
    chosen.sort(key=lambda item: item[1]["methods"][0]["flops"]["prefill"])
    return [_table(name, result) for name, result in chosen]


def _table(name: str, result: Result) -> Efficiency:
    model = MODELS.get(result["size"], "")
    printed = {row.label: row.published for row in rows("3")} if model == ABLATED else {}
    weights = result["checkpoint"] or f"{result['size']} dimensions, random weights"
    body = []
    for row in result["methods"]:
        published = printed.get(row["label"], {})
        spec = RowSpec(row["label"], row["method"], row["options"], published)
        body.append((spec, _cells(row, published), [Path(name).stem]))
    body.sort(key=lambda item: (place(item[0]), item[0].label.endswith(_WITHDRAWN)))
    return Efficiency(
        model or result["size"],
        f"Efficiency ({table_spec('3').number}), {weights}",
        body,
        list(_notes(result, bool(printed))),
        used={Path(name).stem: result},
    )


def _cells(row: Result, published: Mapping[str, Mapping[str, float | str]]) -> dict[str, Cell]:
    def theirs(column: str) -> str:
        values = dict.fromkeys(v[column] for v in published.values() if column in v)
        return " / ".join(map(str, values))

    flops, timed = row["flops"], row["measured"]
    memory = f"{row['peak_memory_mib'] / 1024:.2f}" if timed else MISSING
    rate = MISSING
    if timed:
        given = row["samples_per_s"]
        rate = f"{given['median']:.2f} [{given['p20']:.2f}, {given['p80']:.2f}]"
    return {
        "paper_tflops": Cell(_tera(flops["paper_prefill"]), published=theirs("tflops")),
        "tflops": Cell(_tera(flops["prefill"])),
        "memory_gb": Cell(memory, published=theirs("memory_gb")),
        "samples_per_s": Cell(rate, published=theirs("samples_per_s")),
    }


def _tera(flops: float) -> str:
    return f"{flops / 1e12:.3g}"


def _notes(result: Result, printed: bool) -> list[str]:
    versions = result["versions"]
    dirty = " with local changes" if result["git_dirty"] else ""
    notes = [
        "TFLOPs of the decoder's prefill, from the tokens that each layer processed, without what"
        " methods compute between layers. Eq. 1 is the"
        " papers' formula (one per multiply-add, two matrices in the feed-forward block); exact"
        " counts two per multiply-add and every matrix. Never compare one with the other.",
        f"samples/s: one question per picture, one by one, {result['new_tokens']} tokens long, with"
        " view preparation and tower; median, 20th and 80th percentile.",
        "memory: the most that tensors took at one time, weights included, in GiB.",
        "Random weights never withdraw by themselves; the row 'withdrawn' is ToDRE when its Stage 2"
        " always does.",
        f"Ours: {result['device']}, {result['dtype']}, {result['attention']} attention, torch"
        f" {versions['torch']}, commit {(result['git_commit'] or 'none')[:10]}{dirty}.",
    ]
    if result["attention"] != "flash_attention_2":
        notes.append("FlashAttention was not used: not installed, or no GPU.")
    if not all(row["measured"] for row in result["methods"]):
        notes.append("not measured: these dimensions need a GPU, and there was none.")
    if printed:
        papers = " and ".join(f"{version} ({name})" for version, name in VERSIONS.items())
        notes.insert(
            0,
            f"published: as printed in {papers}, on one RTX 3090 with POPE, not a result of this"
            " project; its TFLOPs fit no formula known to us (llava_todre/flops.py).",
        )
    return notes
