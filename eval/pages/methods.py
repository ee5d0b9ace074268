"""Write ``docs/methods.md`` and ``configs/methods`` from the registry and the stored results.

``docs/performance.md`` and ``docs/models.md`` are written along with it, see
:mod:`eval.pages.performance` and :mod:`eval.pages.models`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eval import ROOT
from eval.mini import NUM_IMAGES
from eval.pages import models as models_doc
from eval.pages import performance
from eval.pages.fill import filled
from eval.results.bootstrap import difference
from eval.tables.demo import columns, draws, note
from eval.tables.render import markdown_lines
from llava_todre.catalogue import reads_text, where
from llava_todre.errors import TodreError
from llava_todre.pruners import PRUNERS, Need
from llava_todre.pruners.method_file import method_yaml

PAGE = ROOT / "docs" / "methods.md"
METHOD_FILES = ROOT / "configs" / "methods"
RESULTS = ROOT / "docs" / "results" / "methods_mini.json"
REFERENCE = "todre"


def render() -> str:
    """Return the page."""
    if not RESULTS.exists():
        raise TodreError(
            f"{RESULTS.relative_to(ROOT)} is missing; make it with `make demo METHODS=all"
            f" IMAGES={NUM_IMAGES} OUT=outputs/methods` and copy outputs/methods/results.json"
            " there."
        )
    results = json.loads(RESULTS.read_text())
    parts = {
        "methods": _methods(),
        "deviations": _deviations(),
        "results": _results(results),
        "resamples": f"{results['interval']['resamples']:,}",
        "note": note(results),
        "patch_tokens": f"{results['rows'][0]['kept_tokens']:.0f}",
    }
    return filled("methods", parts)


def _methods() -> str:
    header = ["method", "paper", "where", "text", "needs", "budget", "count"]
    table = [header]
    for name, method in PRUNERS.items():
        about = method.about
        text = "yes" if reads_text(method) else "no"
        needs = ", ".join(_need(need) for need in sorted(method().needs, key=str)) or "-"
        cells = [about.paper, where(method), text, needs, about.budget_note, about.count]
        table.append([f"`{name}`", *(cell.replace("|", "\\|") for cell in cells)])
    return "\n".join(markdown_lines(table, left=len(header)))


def _need(need: Need) -> str:
    return f"`{need}`" if isinstance(need, str) else f"`{need[0]}` {need[1]}"


def _deviations() -> str:
    lines = []
    for name, method in PRUNERS.items():
        if method.about.deviations:
            lines.append(f"**`{name}`**\n")
            lines += [f"- {sentence}" for sentence in method.about.deviations]
            lines.append("")
    return "\n".join(lines).rstrip()


def _results(results: dict[str, Any]) -> str:
    """Return a table per ratio, methods in the order of the registry, and those without result."""
    order = {name: place for place, name in enumerate(PRUNERS)}
    rows = sorted(results["rows"], key=lambda row: order.get(row["method"], len(order)))
    unpruned, pruned = rows[0], [row for row in rows if row["method"] != "vanilla"]
    parts = []
    for ratio in sorted({row["retain_ratio"] for row in pruned}, reverse=True):
        chosen = [unpruned, *(row for row in pruned if row["retain_ratio"] == ratio)]
        parts.append(f"### `retain_ratio` {ratio:.0%}\n")
        parts += [*markdown_lines(list(_table(results, chosen))), ""]
    missing = [f"`{name}`" for name in PRUNERS if name not in {row["method"] for row in rows}]
    if missing:
        parts.append(f"No stored result yet: {', '.join(missing)}.\n")
    return "\n".join(parts).rstrip()


def _table(results: dict[str, Any], rows: list[dict[str, Any]]) -> Iterator[list[str]]:
    before, after = ("tokens", "per layer", "FLOPs", "mean", "relative"), ("prefill", "TTFT")
    yield ["method", *before, f"minus `{REFERENCE}`", *after]
    for row in rows:
        numbers = columns(row)
        label, lead = f"`{row['method']}`{draws(row)}", _lead(results, row, rows)
        yield [label, *(numbers[k] for k in before), lead, *(numbers[k] for k in after)]


def _lead(results: dict[str, Any], row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Return the lead over the reference method at the same ratio, with its interval."""
    reference = next((other for other in rows if other["method"] == REFERENCE), None)
    if reference is None or row["method"] in (REFERENCE, "vanilla"):
        return ""
    unpruned = _hits(results, rows[0])[0]
    low, high = difference(_hits(results, row), _hits(results, reference), unpruned)["relative"]
    lead = row["relative_average"] - reference["relative_average"]
    return f"{100 * lead:+.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _hits(results: dict[str, Any], row: dict[str, Any]) -> list[dict[str, list[int]]]:
    """Return the hits of every draw of a row."""
    wanted = row["method"], row["retain_ratio"]
    return [
        stored["hits"]
        for stored in results["runs"]
        if (stored["run"]["method"], stored["run"]["retain_ratio"]) == wanted
    ]


def docs() -> dict[Path, str]:
    """Return the generated pages of docs/."""
    files = {METHOD_FILES / f"{name}.yaml": method_yaml(name) for name in PRUNERS}
    pages = {models_doc.PAGE: models_doc.render(), performance.PAGE: performance.render()}
    return {PAGE: render(), **pages, **files}
