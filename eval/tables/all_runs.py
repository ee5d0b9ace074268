"""``python -m eval table all``: every run once, whatever table it is of.

Runs that differ in their seed only are one row, with mean and standard deviation. For readers there
is a table per model and suite; for machines one CSV with a column for every number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.results.averages import (
    Relative,
    average_interval,
    average_spread,
    counts,
    relative,
    score_of,
)
from eval.results.bootstrap import Interval, groups_of, mean_interval
from eval.results.compare import drawn_over, is_mean, over_what
from eval.results.files import StoredRun
from eval.results.known_models import num_layers_of
from eval.results.lookup import UNREADABLE, identity, model_key, ran, rank_of
from eval.results.seeds import members, over_seeds, seed_of
from eval.tables.cells import clock, mixed_settings, shown, watched, with_spread
from eval.tables.render import Table, name_of
from llava_todre.errors import TodreError

_TOKENS = {
    "kept": "kept_tokens",
    "per_layer": "mean_visual_tokens_per_layer",
    "flops": "prefill_flops",
    "withdrawn_share": "withdrawn_share",
}
_NO_SCORE = ("key", "device_map", "tp_plan")
"""Keys of a model that say where it computes, or what it is called."""
_HEADER = ("method", "options", "seeds", "limit", "tokens", "per layer", "TFLOPs", "CPU", "wall")
_LEFT = 4


@dataclass(frozen=True)
class Row:
    """One run, or the seeds of one."""

    run: StoredRun
    full: StoredRun | None
    """The unpruned run of the same model with the same settings, suite and limit."""

    @property
    def place(self) -> tuple[str, str]:
        """Model and suite."""
        return model_key(self.run), str(self.run["config"]["suite"])

    @property
    def settings(self) -> dict[str, Any]:
        """How the model was run, as far as that can change a score."""
        given = self.run["config"]["model"]
        return {key: value for key, value in given.items() if key not in _NO_SCORE}

    @property
    def options(self) -> str:
        """The budget and what is not the method's default."""
        options = ran(self.run)[1]
        return ", ".join(f"{key}={_written(value)}" for key, value in options.items())

    @property
    def seeds(self) -> str:
        """One number, or several."""
        return ", ".join(str(seed_of(run)) for run in members(self.run))

    def tokens(self, key: str) -> float | None:
        """Return a mean over prompts with visuals, if it was recorded."""
        value: float | None = (self.run.get("tokens") or {}).get(_TOKENS[key])
        return value

    @property
    def relative(self) -> Relative | None:
        """The average over benchmarks relative to the unpruned run."""
        if self.full is None:
            return None
        ours = self.run["benchmarks"]
        return relative(ours, self.full["benchmarks"], [k for k in ours if counts(ours[k])])

    def relative_interval(self, keys: Sequence[str]) -> Interval | None:
        """Return the interval of the average; None where there is none, or for the unpruned run."""
        if self.full is None or self.full is self.run:
            return None
        try:
            return average_interval(self.run["benchmarks"], self.full["benchmarks"], keys)
        except TodreError:  # other items than the unpruned run's
            return None

    def relative_spread(self, keys: Sequence[str]) -> float | None:
        """Return the standard deviation of the average over seeds."""
        return (
            None if self.full is None else average_spread(self.run, self.full["benchmarks"], keys)
        )


def rows_of(runs: Sequence[StoredRun]) -> list[Row]:
    """Return a row per run, in the order of model, suite, limit, budget and method."""
    merged = over_seeds(runs)
    unpruned: dict[tuple[str, ...], list[StoredRun]] = {}
    for run in filter(_is_unpruned, merged):
        unpruned.setdefault(_comparable(run), []).append(run)
    found = []
    for run in merged:
        others = unpruned.get(_comparable(run), [])
        is_full = any(run is other for other in others)
        full = run if is_full else max(others, key=rank_of, default=None)
        found.append(Row(run, full))
    return sorted(found, key=_order)


def _comparable(run: StoredRun) -> tuple[str, str, str, str]:
    row, limit = Row(run, None), str(run["config"].get("limit"))
    return *row.place, json.dumps(row.settings, sort_keys=True), limit


def _is_unpruned(run: StoredRun) -> bool:
    if run["status"] != "complete":
        return False
    try:
        layers = num_layers_of(model_key(run))
        return identity(*ran(run), layers) == identity("vanilla", {}, layers)
    except UNREADABLE:  # a method of another version
        return False


def _order(row: Row) -> tuple[Any, ...]:
    method, options = ran(row.run)
    ratio, tokens = options.get("retain_ratio"), options.get("retain_tokens")
    budget = -float(1 if ratio is None else ratio)
    if isinstance(tokens, int) and tokens > 0:
        budget = 1 / tokens
    limit = row.run["config"].get("limit") or math.inf
    return (
        *_comparable(row.run)[:3],
        limit,
        not _is_unpruned(row.run),
        budget,
        method,
        str(row.run["name"]),
    )


# ---------------------------------------------------------------------------------- for readers


def as_tables(runs: Sequence[StoredRun]) -> Iterator[Table]:
    """Yield a table per model, its settings, and suite."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    found = rows_of(runs)
    for row in found:
        groups.setdefault(_comparable(row.run)[:3], []).append(row)
    for group in groups.values():
        yield _table(group, [row for row in found if row.place == group[0].place])


def _table(group: Sequence[Row], of_place: Sequence[Row]) -> Table:
    """Return the table of a group of runs; the title has the settings that others differ in."""
    (model, suite), settings = group[0].place, group[0].settings
    mixed = [k for k, v in settings.items() if any(row.settings.get(k) != v for row in of_place)]
    mixed += [k for row in of_place for k in row.settings if k not in settings and k not in mixed]
    kind = "".join(f", {key} {settings.get(key, 'not stated')}" for key in dict.fromkeys(mixed))
    keys = list(dict.fromkeys(key for row in group for key in row.run["benchmarks"]))
    header = [*_HEADER, *map(name_of, keys), "Average"]
    body = [_cells(row, keys) for row in group]
    count = sum(len(members(row.run)) for row in group)
    return Table(
        f"All runs of {model} on suite {suite}{kind} ({count})",
        header,
        body,
        list(_notes(group)),
        _LEFT,
    )


def _cells(row: Row, keys: Sequence[str]) -> list[str]:
    run = row.run
    flops = row.tokens("flops")
    failed = run["status"] != "complete"
    return [
        ran(run)[0] + ("\nfailed" if failed else ""),
        row.options,
        row.seeds,
        str(run["config"].get("limit") or ""),
        _short(row.tokens("kept")),
        _short(row.tokens("per_layer")),
        _short(None if flops is None else flops / 1e12),
        clock(run.get("cpu_seconds")),
        clock(run.get("seconds")),
        *(_benchmark(run["benchmarks"].get(key)) for key in keys),
        _average(row),
    ]


def _benchmark(part: Mapping[str, Any] | None) -> str:
    if part is None:
        return ""
    score = score_of(part)
    if score is None:
        return "server" if part["status"] == "submission" else str(part["status"])
    interval = _interval_of(part)
    lines = [
        with_spread(score, part.get("spread")),
        "" if interval is None else shown(interval),
        watched(part),
    ]
    return "\n".join(filter(None, lines))


def _average(row: Row) -> str:
    found = row.relative
    if found is None:
        return ""
    total = sum(counts(part) for part in row.run["benchmarks"].values())
    partial = f" ({len(found.keys)} of {total})" if len(found.keys) < total else ""
    text = with_spread(found.value, row.relative_spread(found.keys)) + partial
    interval = row.relative_interval(found.keys)
    return text if interval is None else f"{text}\n{shown(interval)}"


def _notes(group: Sequence[Row]) -> Iterator[str]:
    runs = [run for row in group for run in members(row.run)]
    yield (
        "tokens: patch tokens that enter the decoder; per layer: visual tokens that a decoder layer"
        " processes; TFLOPs: exact count of the prefill; means over prompts that show something."
    )
    yield (
        "CPU: what the processors computed, minutes:seconds; wall: by the clock. Other work"
        " on the machine changes both: not to be compared unless the runs had it for themselves."
    )
    kinds: dict[str, dict[str, None]] = {}
    for row in group:
        for key, part in row.run["benchmarks"].items():
            if score_of(part) is not None and is_mean(part):
                kinds.setdefault(drawn_over(part), {})[name_of(key)] = None
    drawn = over_what({kind: list(names) for kind, names in kinds.items()}) if kinds else "items"
    yield (
        "Average: mean of score / score of the unpruned run with the same model, suite and limit;"
        f" in brackets 95 % intervals, bootstrap over {drawn}."
    )
    if any(len(members(row.run)) > 1 for row in group):
        yield "±: standard deviation over the seeds; scores are their means."
    yield from mixed_settings(runs)
    for row in group:
        if row.run["status"] != "complete":
            yield f"{row.run['name']} failed: {row.run['error']}"
        for key, part in row.run["benchmarks"].items():
            if part.get("provenance"):
                yield f"{row.run['name']}, {name_of(key)}: {part['note']}"


# ---------------------------------------------------------------------------------- for machines


def as_flat_table(runs: Sequence[StoredRun]) -> Table:
    """Return one table with a column for every number, to be written as CSV."""
    found = rows_of(runs)
    keys = list(dict.fromkeys(key for row in found for key in row.run["benchmarks"]))
    flat = [_flat(row, keys) for row in found]
    header = list(dict.fromkeys(name for each in flat for name in each))
    return Table("", header, [[_exact(each.get(name)) for name in header] for each in flat])


def _flat(row: Row, keys: Sequence[str]) -> dict[str, Any]:
    run = row.run
    model, suite = row.place
    method, options = ran(run)
    flat: dict[str, Any] = {
        **{"model": model, "suite": suite, "method": method, "options": row.options},
        "retain_ratio": options.get("retain_ratio"),
        "retain_tokens": options.get("retain_tokens"),
        "seeds": row.seeds,
        "limit": run["config"].get("limit"),
        "status": run["status"],
        "kept_tokens": row.tokens("kept"),
        "visual_tokens_per_layer": row.tokens("per_layer"),
        "withdrawn_share": row.tokens("withdrawn_share"),
        "prefill_flops": row.tokens("flops"),
        "cpu_seconds": run.get("cpu_seconds"),
        "wall_seconds": run.get("seconds"),
        "peak_memory_mib": run.get("peak_memory_mib"),
    }
    for key in keys:
        part = run["benchmarks"].get(key) or {}
        interval = _interval_of(part) if part else None
        flat |= _numbers(key, score_of(part), part.get("spread"), interval)
    average = row.relative
    names = () if average is None else average.keys
    value = None if average is None else average.value
    flat |= _numbers("average", value, row.relative_spread(names), row.relative_interval(names))
    flat["average_over"] = " ".join(names)
    flat["error"] = run["error"]
    flat["runs"] = " ".join(str(each["name"]) for each in members(run))
    flat["time_utc"] = " ".join(str(each.get("time_utc")) for each in members(run))
    flat["git_commit"] = " ".join(dict.fromkeys(str(r.get("git_commit")) for r in members(run)))
    flat["device"] = run.get("device")
    return flat


def _numbers(
    name: str, value: float | None, spread: float | None, interval: Interval | None
) -> dict[str, float | None]:
    low, high = interval or (None, None)
    return {name: value, f"{name}_sd": spread, f"{name}_low": low, f"{name}_high": high}


def _interval_of(part: Mapping[str, Any]) -> Interval | None:
    if score_of(part) is None or not is_mean(part):
        return None
    return mean_interval(part["items"], groups_of(part))


def _written(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).replace(" ", "")


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _exact(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
