"""A result of the bench as tables: rows of text for the terminal and for docs/performance.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eval.bench.answers import STAGES
from eval.bench.timing import CLOCK, COMPUTING
from eval.tables.render import aligned

Result = Mapping[str, Any]
MISSING = "not measured"
SPLIT, SPEED = "Time of an answer (ms, median)", "Speed-ups, and what FLOPs and bytes allow"
WORK, LOADS = "Work and memory of a sample", "Loads of a benchmark"
SELECTION, ADDED, BARS = "Selection kernel", "What pruning adds", "Bars"


def as_text(result: Result) -> str:
    """Return all tables with aligned columns."""
    parts = [headline(result)]
    for title, table in tables(result).items():
        parts += ["", title, *aligned(table)]
    return "\n".join(parts)


def tables(result: Result) -> dict[str, list[list[str]]]:
    """Return what a result has, as title -> header and rows."""
    found = {}
    if any(row["measured"] for row in result["methods"]):
        found[SPLIT] = split(result)
    found |= {SPEED: speed(result), WORK: work(result)}
    for key, title, make in (
        ("loads", LOADS, _loads),
        ("selection", SELECTION, _selection),
        ("probe", ADDED, _added),
        ("bars", BARS, bars),
    ):
        if result.get(key):
            found[title] = make(result)
    return found


def headline(result: Result) -> str:
    """Return what was measured where."""
    versions = result["versions"]
    dirty = ", with local changes" if result["git_dirty"] else ""
    threads = f"{result['torch_threads']} thread" + "s" * (result["torch_threads"] != 1)
    return (
        f"{result['checkpoint'] or 'size ' + result['size']}, {result['dtype']},"
        f" {result['attention']} attention; {result['device']}, {threads};"
        f" torch {versions['torch']}, transformers {versions['transformers']}; commit"
        f" {(result['git_commit'] or 'none')[:10]}{dirty}; {result['repeats']} turns."
    )


def split(result: Result) -> list[list[str]]:
    """Return where the time of one answer goes, per method."""
    names = [*STAGES, *_other_stages(result), "other"]
    table = [["method", *names, "total", "TTFT", "tokens/s", "samples/s"]]
    for row in result["methods"]:
        if not row["measured"]:
            table.append([row["label"], *[MISSING] * (len(table[0]) - 1)])
            continue
        stages = row["stages_ms"]
        cells = [_ms(stages[name]) if name in stages else "-" for name in names]
        cells += [_ms(row["total_ms"]), _ms(row["first_token_ms"])]
        cells += [f"{row['tokens_per_s']['median']:.0f}", f"{row['samples_per_s']['median']:.2f}"]
        table.append([row["label"], *cells])
    return table


def speed(result: Result) -> list[list[str]]:
    """Return speed-ups over the unpruned model and what FLOPs and bytes would allow."""
    table = [
        [
            *("method", "prefill", "FLOPs allow", "reached", "TTFT", "FLOPs allow"),
            *("decode", "bytes allow", "whole answer", "selection / prefill"),
        ]
    ]
    for row in result["methods"][1:]:
        limit = {name: f"{value:.2f}x" for name, value in row["limit"].items()}
        given = {name: MISSING for name in ("prefill", "first_token", "decode", "total")}
        reached = share = MISSING
        if row["measured"]:
            given = {name: _times(value) for name, value in row["speedup"].items()}
            reached = f"{row['prefill_of_limit']['median']:.2f}"
            share = f"{row['selection_of_prefill']['median']:.1%}"
        cells = [row["label"], given["prefill"], limit["prefill"], reached]
        cells += [given["first_token"], limit["first_token"], given["decode"], limit["decode"]]
        table.append([*cells, given["total"], share])
    return table


def work(result: Result) -> list[list[str]]:
    """Return tokens, exact FLOPs and bytes."""
    table = [
        [
            *("method", "tokens", "vision GFLOP", "prefill GFLOP", "causal", "decode GFLOP"),
            *("KV cache MiB", "MiB per step", "peak MiB"),
        ]
    ]
    for row in result["methods"]:
        flops = row["flops"]
        names = ("vision", "prefill", "prefill_causal", "decode")
        peak = f"{row['peak_memory_mib']:.0f}" if row["measured"] else MISSING
        table.append(
            [
                row["label"],
                f"{row['kept_tokens']}",
                *(_significant(flops[name] / 1e9) for name in names),
                f"{row['prompt_kv_bytes'] / 2**20:.1f}",
                f"{row['bytes_per_step'] / 2**20:.1f}",
                peak,
            ]
        )
    return table


def bars(result: Result) -> list[list[str]]:
    """Return the goals and what became of them."""
    return [
        ["goal", "bar", "measured", "verdict"],
        *([bar["what"], bar["goal"], bar["written"], bar["verdict"]] for bar in result["bars"]),
    ]


def _loads(result: Result) -> list[list[str]]:
    given = result["loads"]
    rates = given["samples_per_s"]
    many = f"{given['questions_per_picture']} questions per picture"
    table = [
        ["load", "samples/s", "against one by one"],
        ["unpruned, one by one", f"{rates['one by one']['median']:.3g}", ""],
        [
            f"10 %, {many}, prefix kept",
            f"{rates['per picture']['median']:.3g}",
            _times(given["per_picture"]),
        ],
        [
            f"10 %, a question per picture, batch {given['batch']}",
            f"{rates['batch']['median']:.3g}",
            _times(given["batched"]),
        ],
    ]
    stock = result.get("stock_loads")
    if stock:
        rates = stock["samples_per_s"]
        before = f"{rates['one by one']['median']:.3g}"
        after = f"{rates['per picture']['median']:.3g}"
        table += [
            ["stock LLaVA-NeXT, unpruned, one by one", before, ""],
            [f"stock LLaVA-NeXT, 10 %, {many}", after, _times(stock["per_picture"])],
        ]
    return table


def _selection(result: Result) -> list[list[str]]:
    table = [["tokens x width, kept", "ms", "over a loop of products"]]
    for row in result["selection"]:
        name = f"{row['tokens']} x {row['width']}, {row['kept']}"
        table.append([name, f"{row['ms']['median']:.2f}", _times(row["speedup"])])
    return table


def _added(result: Result) -> list[list[str]]:
    own = {CLOCK: "own time", COMPUTING: "own computing time, one thread"}
    table = [["part", own[result["probe"][0].get("clock", CLOCK)], "added to the whole"]]
    for row in result["probe"]:
        name = f"{row['probes']} probes / prefill of {row['visual_tokens']} visual tokens"
        table.append([name, _share(row["inside"]), _share(row["added"])])
    row = result["cls_row"]
    table.append(["attention of [CLS] / tower", _share(row["inside"]), _share(row["added"])])
    off = result["attached_but_off"]
    table.append(["attached but off / untouched model", "-", _share(off["added"])])
    return table


def _other_stages(result: Result) -> list[str]:
    """Return stages of the model's clock that are not among ours, in a fixed order."""
    named = {name for row in result["methods"] for name in row.get("stages_ms", ())}
    return sorted(named - {*STAGES, "other"})


def _ms(value: Mapping[str, float]) -> str:
    return _significant(value["median"])


def _significant(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _times(value: Mapping[str, float]) -> str:
    return f"{value['median']:.2f}x [{value['p20']:.2f}, {value['p80']:.2f}]"


def _share(value: Mapping[str, float]) -> str:
    return f"{value['median']:.2%} [{100 * value['p20']:.2f}, {100 * value['p80']:.2f}]"
