"""Write ``docs/performance.md``: measurements of the bench, estimates, and reasons."""

from __future__ import annotations

import json
from typing import Any

from eval import ROOT
from eval.bench import report
from eval.bench.answers import QUESTION_TOKENS, SYSTEM_TOKENS
from eval.bench.dims import SIZES
from eval.bench.roofline import DEVICES, bound
from eval.pages.fill import filled
from eval.tables.efficiency import efficiencies, load_benches
from eval.tables.render import as_markdown, markdown_lines, stacked
from llava_todre.errors import TodreError

PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "docs" / "results"
CPU, GPU = "bench_cpu.json", "bench_gpu.json"
TABLE3 = "table3"
VISUAL_TOKENS = 2880
"""Of the papers' protocol: five views of CLIP-L at 336 pixels."""
SHARES = {"unpruned": 1.0, "25 %": 0.25, "10 %": 0.10}


def render() -> str:
    """Return the page."""
    if not (RESULTS / CPU).exists():
        raise TodreError(
            f"docs/results/{CPU} is missing; make it with `python -m eval bench --out"
            f" docs/results/{CPU}`."
        )
    parts = {"cpu": _bench(CPU), "gpu": _gpu(), "table3": _table3(), "roofline": _roofline()}
    return filled("performance", parts)


def _bench(file: str) -> str:
    """Return every table of a result, with its provenance."""
    result: dict[str, Any] = json.loads((RESULTS / file).read_text())
    parts = []
    for title, table in report.tables(result).items():
        parts += [f"### {title}", "", *markdown_lines(table), ""]
    return "\n".join([*parts, f"[{file}](results/{file}): {report.headline(result)}"])


def _gpu() -> str:
    if (RESULTS / GPU).exists():
        return _bench(GPU)
    return (
        f"Not measured yet. `python -m eval bench --size 7b --out docs/results/{GPU}` measures it,"
        " and `make docs` shows it here."
    )


def _table3() -> str:
    folder = RESULTS / TABLE3
    found = efficiencies(load_benches([folder])) if folder.is_dir() else []
    if not found:
        return "No stored result yet."
    return "\n".join(as_markdown(stacked(each)) for each in found).rstrip()


def _roofline() -> str:
    """Return bounds of a 7B decoder by device and share of visual tokens."""
    shape = SIZES["7b"].decoder
    table = [
        [
            *("device", "visual tokens", "prefill, at least", "token, at least"),
            *("prefill speed-up, at most", "decode speed-up, at most"),
        ]
    ]
    for device in DEVICES:
        bounds = {
            name: bound(device, shape, [_prompt(share)] * shape.layers)
            for name, share in SHARES.items()
        }
        full = bounds["unpruned"]
        for name, each in bounds.items():
            table.append(
                [
                    device.name,
                    f"{round(SHARES[name] * VISUAL_TOKENS)} ({name})",
                    f"{1e3 * each.prefill_s:.1f} ms",
                    f"{1e3 * each.token_s:.2f} ms",
                    f"{full.prefill_s / each.prefill_s:.1f}x",
                    f"{full.token_s / each.token_s:.2f}x",
                ]
            )
    peaks = [
        f"- {device.name}: {device.flops_per_s / 1e12:.0f} TFLOP/s in 16 bit with float32"
        f" accumulation, dense; {device.bytes_per_s / 1e9:,.0f} GB/s. Source: {device.source}."
        for device in DEVICES
    ]
    return "\n".join([*markdown_lines(table, left=2), "", *peaks])


def _prompt(share: float) -> int:
    return SYSTEM_TOKENS + round(share * VISUAL_TOKENS) + QUESTION_TOKENS
