"""The papers' tables row by row: what was printed, and the run that gives a number of ours.

Both versions of the ToDRE paper are read together: a row that both print (an unpruned model, a
baseline) is one row here, and ToDRE itself is two, ``todre_v1`` with the numbers of v1 and
``todre`` with those of v2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import yaml

from eval import ROOT
from eval.results import bootstrap
from eval.results.known_models import num_layers_of
from llava_todre.errors import unknown

NUMBERS = ROOT / "configs" / "paper" / "published.yaml"
VERSIONS = {"v1": "arXiv 2505.18757v1", "v2": "arXiv 2505.18757v2"}
ABLATED = "llava_next_7b"
"""The model of every table that names none."""
AVERAGE = "average"
SUITE_METHODS = ("random", "fastervlm", "divprune", "todre_v1", "todre")
"""Compared on a suite of our own, where no table of the papers says what to run."""
SUITE_RATIOS = (0.25, 0.10)
_FIRST = ("vanilla", "random", "fastv", "sparsevlm", "fastervlm", "globalcom2", "divprune")
_LAST = ("todre_v1", "todre")
_PIVOTS = {
    "cls_attention": "cls",
    "random": "random",
    "nearest_to_mean": "nearest",
    "farthest_from_mean": "farthest",
}


@cache
def numbers() -> dict[str, Any]:
    """Return ``published.yaml``."""
    loaded: dict[str, Any] = yaml.safe_load(NUMBERS.read_text(encoding="utf-8"))
    return loaded


@dataclass(frozen=True)
class TableSpec:
    """One table of the papers."""

    title: str
    sections: Mapping[str, str]
    """Paper version -> key in ``published.yaml``."""
    places: Mapping[str, str]
    """Paper version -> where the table is in it; the supplement of v2 counts anew."""
    lists: Sequence[str]
    """Keys of the benchmarks whose scores are averaged."""
    measures: Sequence[str] = ()
    """Columns before the benchmarks."""
    shows_scores: bool = True

    @property
    def benchmarks(self) -> tuple[str, ...]:
        """The benchmarks whose scores are averaged."""
        return tuple(key for name in self.lists for key in numbers()[f"{name}_benchmarks"])

    @property
    def number(self) -> str:
        """Where the table is in which version of the paper."""
        where: dict[str, list[str]] = {}
        for version, number in self.places.items():
            where.setdefault(number, []).append(version)
        return "; ".join(f"{number} of {' and '.join(found)}" for number, found in where.items())


TABLES = {name: TableSpec(**spec) for name, spec in numbers()["tables"].items()}
"""Named by their numbers in v1; what v2 added has a name."""


@dataclass(frozen=True)
class RowSpec:
    """One row: the run that fills it, and what the papers print in it."""

    label: str
    method: str
    options: Mapping[str, Any]
    """Options to run with; the others at their defaults: ``create_pruner(method, **options)``."""
    published: Mapping[str, Mapping[str, float | str]]
    """Paper version -> column (benchmark, average, time, ...) -> what is printed there."""


def table_spec(table: str) -> TableSpec:
    """Return a table by its name: 1 to 6, pivot, cross_model."""
    if table not in TABLES:
        raise unknown("table", table, TABLES)
    return TABLES[table]


def models(table: str) -> list[str]:
    """Return the models of a table, in the papers' order."""
    found: dict[str, None] = {}
    for version, section in table_spec(table).sections.items():
        block = numbers()[f"todre_{version}"][section]
        found |= dict.fromkeys(block if isinstance(block, dict) else [ABLATED])
    return list(found)


def rows(
    table: str,
    version: str | None = None,
    model: str = ABLATED,
    num_layers: int | None = None,
) -> list[RowSpec]:
    """Return the rows of a table, which are also the runs it needs; the unpruned model first.

    Args:
        table: 1 to 6, pivot or cross_model.
        version: v1 or v2; None reads both together.
        model: a key of :func:`models`.
        num_layers: decoder layers, for the row that probes all of them; those of a model of
            configs/models are known, and without them that row is left out.
    """
    if version is not None and version not in VERSIONS:
        raise unknown("version", version, VERSIONS)
    if model not in models(table):
        raise unknown(f"model of table {table}:", model, models(table))
    return _merged(table, version, model, num_layers or num_layers_of(model))


def suite_rows(table: str, num_layers: int | None = None) -> list[RowSpec]:
    """Return rows shaped like a table of the papers, for models the papers do not speak of."""
    table_spec(table)
    if table in ("4", "5", "6", "pivot"):
        return [replace(row, published={}) for row in _merged(table, None, ABLATED, num_layers)]
    methods = ("todre",) if table == "cross_model" else SUITE_METHODS
    ratios = SUITE_RATIOS[-1:] if table == "3" else SUITE_RATIOS
    return [
        RowSpec("vanilla", "vanilla", {}, {}),
        *(ratio_row(method, ratio) for ratio in ratios for method in methods),
    ]


def ratio_row(method: str, ratio: float) -> RowSpec:
    """Return the row of a method with its defaults at a retain ratio, with nothing published."""
    return RowSpec(f"{method} {ratio:.0%}", method, {"retain_ratio": ratio}, {})


def budget_row(method: str, options: Mapping[str, Any]) -> RowSpec | None:
    """Return the row of a method, or of A+B, with a ratio or a number of tokens; None of others."""
    given = {key: value for key, value in options.items() if value is not None}
    if list(given) == ["retain_ratio"]:
        return ratio_row(method, float(given["retain_ratio"]))
    if list(given) == ["retain_tokens"]:
        return RowSpec(f"{method}, {given['retain_tokens']} tokens", method, given, {})
    return None


def place(row: RowSpec) -> tuple[float, int, str]:
    """Return the place of a row in a table of methods: by budget, then in the papers' order."""
    order = [*_FIRST, row.method, *_LAST].index(row.method)
    if row.method in _LAST:
        order = len(_FIRST) + 1 + _LAST.index(row.method)
    tokens = row.options.get("retain_tokens")
    budget = -float(row.options.get("retain_ratio", 1.0)) if tokens is None else 1 / (1 + tokens)
    return budget, order, row.method


def relative_average(scores: Sequence[float], unpruned: Sequence[float]) -> float:
    """Return the papers' "Average": mean over benchmarks of score / unpruned score, in percent."""
    return 100 * float(bootstrap.relative_average(np.array(scores), np.array(unpruned)))


def _merged(table: str, version: str | None, model: str, num_layers: int | None) -> list[RowSpec]:
    """Return the rows of one version or of both, those that are the same once."""
    merged: dict[str, RowSpec] = {}
    for each in [version] if version else VERSIONS:
        if each not in TABLES[table].sections:
            continue
        for row in _version_rows(table, each, model, num_layers):
            same = f"{row.method} {sorted(row.options.items())}"
            known = merged.get(same, row)
            merged[same] = replace(known, published={**known.published, **row.published})
    found = list(merged.values())
    if table in ("1", "2", "3", "cross_model"):
        found.sort(key=place)
    return found


def _version_rows(
    table: str, version: str, model: str, num_layers: int | None
) -> Iterator[RowSpec]:
    spec = TABLES[table]
    for row in _printed(table, version, model):
        run = _run(row, "todre_v1" if version == "v1" else "todre", num_layers)
        if run is not None:
            printed: dict[str, float | str] = {}
            if "scores" in row:
                printed |= zip(spec.benchmarks, row["scores"], strict=True)
            printed |= {key: row[key] for key in (*spec.measures, AVERAGE) if key in row}
            yield RowSpec(*run, {version: printed})


def _printed(table: str, version: str, model: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of ``published.yaml``, with the unpruned one where it is printed elsewhere."""
    paper = numbers()[f"todre_{version}"]
    block = paper[TABLES[table].sections[version]]
    if isinstance(block, dict):
        block = block.get(model, [])
    printed = block["rows"] if isinstance(block, dict) else block
    if table in ("5", "6", "pivot"):
        yield from (row for row in _printed("4", version, model) if row["stages"] == "none")
    yield from printed


def _run(
    row: dict[str, Any], todre: str, num_layers: int | None
) -> tuple[str, str, dict[str, Any]] | None:
    """Return (label, method, options) of a printed row."""
    ratio = row.get("retain", SUITE_RATIOS[-1])  # the efficiency table is at 10 % throughout
    if row.get("method") == "vanilla" or row.get("stages") == "none":
        return "vanilla", "vanilla", {}
    if "method" in row:
        method = todre if row["method"] == "todre" else row["method"]
        return f"{method} {ratio:.0%}", method, {"retain_ratio": ratio}
    if "pivot" in row:
        pivot = _PIVOTS[row["pivot"]]
        return f"{todre} {ratio:.0%}, pivot {pivot}", todre, {"retain_ratio": ratio, "pivot": pivot}
    if "tau" in row:
        options = {"retain_ratio": 1.0, "tau": row["tau"]}
        return f"{todre} stage 2, tau {row['tau']:.2f}", todre, options
    if "layers" in row:
        depths = _depths(row["layers"], num_layers)
        named = row["layers"] if isinstance(row["layers"], str) else ", ".join(row["layers"])
        options = {"retain_ratio": 1.0, "probe_depths": depths}
        return (f"{todre} stage 2, {named}", todre, options) if depths else None
    if row["stages"] == "2":
        return f"{todre} stage 2", todre, {"retain_ratio": 1.0}
    options = {"retain_ratio": ratio} | ({"probe_depths": ()} if row["stages"] == "1" else {})
    return f"{todre} {ratio:.0%}, stage {row['stages']}", todre, options


def _depths(layers: str | list[str], num_layers: int | None) -> tuple[float, ...]:
    """Return probe depths; "all from 4/8" is every layer from the middle on."""
    if not isinstance(layers, str):
        return tuple(float(Fraction(depth)) for depth in layers)
    if num_layers is None:
        return ()
    first = math.floor(num_layers * Fraction(layers.removeprefix("all from ")))
    return tuple(_depth(layer, num_layers) for layer in range(first, num_layers))


def _depth(layer: int, num_layers: int) -> float:
    """Return a depth whose ``floor(depth * num_layers)`` is the layer, rounding or not."""
    depth = layer / num_layers
    return depth if math.floor(depth * num_layers) == layer else math.nextafter(depth, 1)
