"""What to run: the runs of one run config, a table of the papers, or a grid of settings.

    configs/runs/X.yaml      one run, or ``table``: the rows of a table on one model
    configs/sweeps/Y.yaml    ``base``: one run, and ``grid``: values for some of its keys

A grid is every combination of its values; of several grids, all that each of them gives. The keys
are those of a run, any option of the method, and short names: ``ratio``, ``layers`` (probe depths,
also as 7/8) and ``stages`` (none, 1, 2, 1+2).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.results.known_models import num_layers_of
from eval.results.published import VERSIONS, RowSpec, models, rows, suite_rows
from eval.run.config import check_keys, with_changes, within
from eval.run.spec import RUN_KEYS, Run, resolve
from llava_todre.errors import TodreError, unknown
from llava_todre.files import read_mapping

SHORT = {"ratio": "retain_ratio", "layers": "probe_depths"}
STAGES: dict[str, dict[str, Any]] = {
    "none": {},
    "1": {"probe_depths": ()},
    "2": {"retain_ratio": 1.0},
    "1+2": {},
}
"""What each choice of stages changes about the options; none is the method ``vanilla``."""
_ABLATIONS = ("4", "5", "6", "pivot")
_MOST_RUNS = 1000
_TABLE_KEYS = ("table", "version", *(key for key in RUN_KEYS if key not in ("method", "options")))


def plan(files: Iterable[Path], changes: Sequence[str] = ()) -> list[Run]:
    """Return the runs of config files, each once, checked.

    Raises:
        TodreError: a wrong key or value, in one line with the file's name.
    """
    runs: dict[str, Run] = {}
    for file in files:
        content = read_mapping(file, "config")
        with within(str(file)):
            found = _runs(str(file), content, changes)
            if not found:
                raise TodreError("no run is planned; give at least one.")
            for run in found:
                runs.setdefault(run.name, run)
            if len(runs) > _MOST_RUNS:
                raise _too_many(len(runs))
    return list(runs.values())


def _too_many(count: int) -> TodreError:
    return TodreError(f"{count:,} runs are planned; allowed: {_MOST_RUNS:,} at most.")


def _runs(where: str, content: Mapping[str, Any], changes: Sequence[str]) -> list[Run]:
    if "grid" in content:
        return sweep(where, content, changes)
    content = with_changes(content, changes)
    return table(where, content) if "table" in content else [resolve(content, where)]


def table(where: str, content: Mapping[str, Any]) -> list[Run]:
    """Return the runs of one or several tables, on one model and suite.

    On models the papers speak of, the rows are theirs (``version``: v1, v2, or null for both);
    elsewhere those of a comparison of the same shape.
    """
    check_keys(where, content, _TABLE_KEYS, required=("table", "model", "suite"))
    names = content["table"] if isinstance(content["table"], list) else [content["table"]]
    version = content.get("version")
    if version not in (None, *VERSIONS):
        raise unknown(f"{where}: version", version, VERSIONS)
    shared = {key: content[key] for key in _TABLE_KEYS[2:] if key in content}
    key = resolve({**shared, "method": "vanilla"}, where).model_key
    found = []
    for name in map(str, names):
        found += [
            resolve({**shared, "method": row.method, "options": row.options}, where)
            for row in _rows(name, version, key)
        ]
    return found


def _rows(name: str, version: str | None, model: str) -> list[RowSpec]:
    if model in models(name):
        return rows(name, version, model, num_layers_of(model))
    if name in _ABLATIONS:  # the same settings of ToDRE for any model
        return rows(name, version, num_layers=num_layers_of(model))
    return suite_rows(name, num_layers_of(model))


def sweep(where: str, content: Mapping[str, Any], changes: Sequence[str] = ()) -> list[Run]:
    """Return the runs of a base and its grid, or list of grids."""
    check_keys(where, content, ("base", "grid"), required=("base", "grid"))
    if not isinstance(content["base"], Mapping):
        raise TodreError(f"{where}: base must hold 'key: value' lines.")
    base = with_changes(content["base"], changes)
    grids = content["grid"] if isinstance(content["grid"], list) else [content["grid"]]
    for grid in grids:
        _check_grid(where, grid, [change.partition("=")[0] for change in changes])
    count = sum(math.prod(map(len, grid.values())) for grid in grids)
    if count > _MOST_RUNS:
        raise _too_many(count)
    found = []
    for grid in grids:
        for values in itertools.product(*grid.values()):
            found.append(resolve(_at(where, base, dict(zip(grid, values, strict=True))), where))
    return found


def _check_grid(where: str, grid: Any, changed: Sequence[str]) -> None:
    """Raise unless a grid gives several keys a list of values each, once."""
    if not isinstance(grid, Mapping) or not grid:
        raise TodreError(f"{where}: grid must hold 'key: [values]' lines.")
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            shown = f"{values!r}"[:60]
            raise TodreError(f"{where}: grid key {key!r} is {shown}; allowed: [values].")
        if SHORT.get(key) in grid:
            raise TodreError(
                f"{where}: grid keys {key!r} and {SHORT[key]!r} are the same; give one."
            )
        names = {key, SHORT.get(key, key)}
        if names & {change.removeprefix("options.") for change in changed}:
            raise TodreError(f"{where}: {key!r} was set, but the grid sets it too.")


def _at(where: str, base: Mapping[str, Any], point: dict[str, Any]) -> dict[str, Any]:
    """Return the run at one point of a grid."""
    stages = point.pop("stages", None)
    config = {**base, **{key: value for key, value in point.items() if key in RUN_KEYS}}
    options = dict(config.get("options") or {})
    for key, value in point.items():
        if key not in RUN_KEYS:
            options[SHORT.get(key, key)] = _depths(where, value) if key == "layers" else value
    if stages is not None:
        if str(stages) not in STAGES:
            raise unknown(f"{where}: stages", stages, STAGES)
        options |= STAGES[str(stages)]
        if str(stages) == "none":
            config["method"], options = "vanilla", {}
    return {**config, "options": options}


def _depths(where: str, value: Any) -> tuple[float, ...]:
    """Return probe depths, each a number or a fraction such as 7/8."""
    try:
        if isinstance(value, str):
            raise TypeError
        return tuple(_depth(str(depth)) for depth in value)
    except (TypeError, ValueError, ZeroDivisionError):
        raise TodreError(
            f"{where}: layers {value!r}; allowed: a list of depths such as 0.875 or 7/8."
        ) from None


def _depth(text: str) -> float:
    above, _, below = text.partition("/")
    return float(above) / float(below or 1)  # no Fraction, for which 1e999999999 is a large number
