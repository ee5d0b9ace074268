"""One table of one model: rows filled from runs, and what must be said about them.

A run fills a row when it ran the same thing: a method and options that make the same pruner,
however they were spelled. What was not run stays empty and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from eval.results.averages import (
    Stored,
    average_interval,
    average_spread,
    counts,
    relative,
    score_of,
)
from eval.results.bootstrap import groups_of, mean_interval
from eval.results.compare import drawn_over, is_mean, over_what
from eval.results.files import StoredRun
from eval.results.lookup import UNREADABLE, concerns, identity, ran, rank_of
from eval.results.published import AVERAGE, VERSIONS, RowSpec, relative_average
from eval.results.seeds import members, seed_of
from eval.tables.cells import clock, mixed_settings, shown, time_of, watched, with_spread
from eval.tables.render import Cell, name_of
from llava_todre.errors import TodreError

NOT_RUN, FAILED, SERVER = "not run", "failed", "server"


@dataclass(frozen=True)
class Entry:
    """What the runs say about one benchmark of one row."""

    text: str
    run: StoredRun | None = None
    stored: Mapping[str, Any] = field(default_factory=dict)
    """The benchmark's part of the run's JSON."""

    @property
    def score(self) -> float | None:
        """The score, where there is one."""
        return score_of(self.stored)


class Sheet:
    """One table of one model: rows filled from the runs, and what must be said about them."""

    def __init__(
        self,
        model: str,
        title: str,
        row_specs: Sequence[RowSpec],
        columns: Sequence[str],
        benchmarks: Sequence[str],
        runs: Sequence[StoredRun],
        num_layers: int | None,
        covered: bool = True,
        extras: Sequence[str] = (),
    ):
        """Fill the rows.

        Args:
            model: its key.
            title: of the table.
            row_specs: the rows; the unpruned one is found among them.
            columns: what is shown: benchmarks, measures, the average.
            benchmarks: what is averaged.
            runs: of this model only.
            num_layers: decoder layers of the model, if known.
            covered: whether we could have runs of this model at all.
            extras: benchmarks that are shown and not averaged.
        """
        self.columns, self.benchmarks, self.covered = list(columns), benchmarks, covered
        self._scored = (*benchmarks, *extras)
        self.model, self.num_layers = model, num_layers
        self.used: dict[str, StoredRun] = {}
        self.fitting: set[int] = set()
        """``id`` of all runs that fit a row, also where another run is shown in it."""
        self.remarks: dict[str, None] = {}
        self._noted: dict[str, dict[str, None]] = {}
        self._drawn: dict[str, dict[str, None]] = {}
        """What was drawn for intervals -> of which benchmarks."""
        self._by_identity: dict[object, list[StoredRun]] = {}
        for run in runs:
            try:
                key = identity(*ran(run), num_layers)
                self._by_identity.setdefault(key, []).append(run)
            except UNREADABLE as error:
                self.remark(f"{run['name']} fits no row: {error}")
        unpruned = next(row for row in row_specs if row.method == "vanilla")
        self._printed_full = unpruned.published
        self._full = self._entries(unpruned)
        self.rows = [(row, self._fill(row), self._names(row)) for row in row_specs]
        self._drop_empty("time")
        limits = sorted({run["config"].get("limit") for run in self.used.values()} - {None})
        self.title = title + (f", limit {', '.join(map(str, limits))}" if limits else "")

    def _candidates(self, row: RowSpec) -> list[StoredRun]:
        return self._by_identity.get(identity(row.method, row.options, self.num_layers), [])

    def _entries(self, row: RowSpec) -> dict[str, Entry]:
        """Return what the runs of a row say about each benchmark."""
        return {key: self._entry(row, key) for key in self._scored}

    def _entry(self, row: RowSpec, benchmark: str) -> Entry:
        found = [run for run in self._candidates(row) if concerns(run, benchmark)]
        if not found:
            return Entry(NOT_RUN)
        best = max(found, key=lambda run: rank_of(run, benchmark))
        name = str(best["name"])
        rank = rank_of(best, benchmark)[:4]
        same = [run for run in found if rank_of(run, benchmark)[:4] == rank]
        if len(same) > 1:
            self.remark(f"{row.label}: {len(same)} runs fit; the newest is shown, {name}.")
        self.fitting |= {id(each) for run in found for each in members(run)}
        if best["status"] != "complete":
            self.remark(f"{name} failed: {best['error']}")
            return Entry(FAILED, best)
        self.used[name] = best
        stored = best["benchmarks"][benchmark]
        if stored.get("note"):
            text = f"{name_of(benchmark)}: {stored['note']}"
            self._noted.setdefault(text, {})[row.label] = None
        if stored["status"] != "complete":
            text = SERVER if stored["status"] == "submission" else str(stored["status"])
            return Entry(text, best, stored)
        if len(members(best)) > 1:
            seeds = ", ".join(str(seed_of(run)) for run in members(best))
            self.remark(f"{row.label}: mean ± standard deviation over seeds {seeds}.")
        return Entry(with_spread(stored["score"], stored.get("spread")), best, stored)

    def remark(self, text: str) -> None:
        """Say something below the table, once."""
        self.remarks[text] = None

    def _fill(self, row: RowSpec) -> dict[str, Cell]:
        entries = self._entries(row)
        cells = {}
        for column in self.columns:
            if column in entries:
                cells[column] = self._benchmark(row, column, entries[column])
            elif column == AVERAGE:
                cells[column] = self._average(row, entries)
            elif column == "time":
                cells[column] = self._time(row, entries)
            else:
                cells[column] = self._efficiency(row, column)
        if self.covered:
            return cells
        return {column: Cell(published=cell.published) for column, cell in cells.items()}

    def _benchmark(self, row: RowSpec, key: str, entry: Entry) -> Cell:
        stored, full = entry.stored, self._full[key].stored
        samples = "" if entry.score is None else str(stored["num_samples"])
        if samples and full and stored["num_samples"] != full["num_samples"]:
            samples += "!"
            self.remark("! other samples than the unpruned row's: not comparable.")
        printed = _printed(row, key)
        differences = _each(printed, lambda value: _less(entry.score, value))
        interval = ""
        if stored and is_mean(stored):
            self._drawn.setdefault(drawn_over(stored), {})[name_of(key)] = None
            interval = shown(mean_interval(stored["items"], groups_of(stored)))
        published = _each(printed, _text)
        return Cell(entry.text, interval, published, differences, samples, watched(stored))

    def _average(self, row: RowSpec, entries: Mapping[str, Entry]) -> Cell:
        """Return the relative average over the benchmarks that both this and the full row have."""
        ours, full = ({k: each[k].stored for k in entries} for each in (entries, self._full))
        found = relative(ours, full, self.benchmarks)
        printed = _printed(row, AVERAGE)
        published = _each(printed, _text)
        if found is None:
            return Cell(self._why_no_average(entries), published=published)
        if found.zeros:
            names = ", ".join(map(name_of, found.zeros))
            self.remark(f"No part of averages, as the unpruned model scores 0 there: {names}.")
        partial = len(found.keys) < len(self.benchmarks)
        if partial:
            self.remark(
                "(k of n): average over k benchmarks; difference to the papers' over those."
            )
            printed = self._printed_over(row, found.keys)
        runs = [run for key in found.keys if (run := entries[key].run) is not None]
        same = all(run is runs[0] for run in runs)
        spread = average_spread(runs[0], full, found.keys) if same else None
        text = with_spread(found.value, spread)
        return Cell(
            text + (f" ({len(found.keys)} of {len(self.benchmarks)})" if partial else ""),
            "" if row.method == "vanilla" else self._average_interval(ours, full, found.keys),
            published=published,
            difference=_each(printed, lambda value: _less(found.value, value)),
        )

    def _why_no_average(self, entries: Mapping[str, Entry]) -> str:
        texts = {entry.text for entry in entries.values()}
        if any(entry.score is not None for entry in entries.values()):
            self.remark("No average without a run of the unpruned model.")
            return ""
        return next((text for text in (FAILED, SERVER, NOT_RUN) if text in texts), "")

    def _printed_over(self, row: RowSpec, known: Sequence[str]) -> list[float | str]:
        """Return what the papers' averages would be over some of their benchmarks."""
        found: dict[float | str, None] = {}
        for version, printed in row.published.items():
            full = self._printed_full.get(version, {})
            if all(key in printed and key in full for key in known):
                scores = [[float(numbers[key]) for key in known] for numbers in (printed, full)]
                found[relative_average(*scores)] = None
        return list(found)

    def _average_interval(self, ours: Stored, full: Stored, keys: Sequence[str]) -> str:
        try:
            interval = average_interval(ours, full, keys)
        except TodreError:
            self.remark("No interval of an average over other items than the unpruned row's.")
            return ""
        return "" if interval is None else shown(interval)

    def _time(self, row: RowSpec, entries: Mapping[str, Entry]) -> Cell:
        """Return the time of the run that covers exactly these benchmarks, if one does."""
        published = _each(_printed(row, "time"), str)
        names = {str(entry.run["name"]) for entry in entries.values() if entry.run is not None}
        if len(names) == 1 and all(entries[key].score is not None for key in self.benchmarks):
            run = self.used[names.pop()]
            if {key for key, part in run["benchmarks"].items() if counts(part)} == set(
                self.benchmarks
            ):
                return Cell(clock(time_of(run)), published=published)
        return Cell(published=published)

    def _drop_empty(self, column: str) -> None:
        """Leave out an empty column."""
        if column in self.columns and all(c[column] == Cell() for _, c, _ in self.rows):
            self.columns.remove(column)
            for _, cells, _ in self.rows:
                del cells[column]

    def _efficiency(self, row: RowSpec, measure: str) -> Cell:
        """Return FLOPs, memory or speed; of a run over POPE alone, as in the paper, if there is."""
        printed = _printed(row, measure)
        published = _each(printed, _text)
        candidates = self._candidates(row)
        found = [run for run in candidates if run["status"] == "complete"]
        if not found:
            return Cell(FAILED if candidates else NOT_RUN, published=published)
        run = max(found, key=lambda run: (set(run["benchmarks"]) == {"pope"}, rank_of(run)))
        self.used[str(run["name"])] = run
        self.fitting |= {id(each) for found in candidates for each in members(found)}
        ours = _measured(run, measure)
        text = "" if ours is None else _text(ours)
        differences = _each(printed, lambda value: _less(ours, value))
        return Cell(text, published=published, difference=differences)

    def _names(self, row: RowSpec) -> list[str]:
        """Return the runs that a row shows."""
        found = [run for run in self._candidates(row) if run["name"] in self.used]
        return [str(run["name"]) for run in found]

    @property
    def notes(self) -> list[str]:
        """Notes below the table."""
        notes = []
        versions = [v for v in VERSIONS if any(v in row.published for row, _, _ in self.rows)]
        if versions:
            papers = " and ".join(f"{version} ({VERSIONS[version]})" for version in versions)
            split = any(" / " in c.published for _, cells, _ in self.rows for c in cells.values())
            notes.append(
                f"published: as printed in {papers}, not a result of this project"
                + ("; v1 / v2 where they differ." if split else ".")
            )
        if not self.covered:
            notes.append("Published only: this project has no runs of this model.")
            return notes
        if "tflops" in self.columns:
            theirs = " The paper: its own formula, one RTX 3090, POPE." if versions else ""
            notes.append(
                "Ours: exact count of the decoder's prefill; peak in GiB; items of the run per"
                f" second, on the device below.{theirs}"
            )
        if "time" in self.columns:
            theirs = "; the papers' on theirs (v1: four RTX 3090)" if versions else ""
            notes.append(
                "time: minutes:seconds by the clock; ours of runs on a GPU, on the device below"
                f"{theirs}."
            )
        if any(cell.interval for _, cells, _ in self.rows for cell in cells.values()):
            drawn = over_what({kind: list(names) for kind, names in self._drawn.items()})
            notes.append(
                f"95 % interval: bootstrap over {drawn}, paired with the unpruned run for the"
                " average; none where the metric is not a mean over items."
            )
        filled = sum(bool(names) for _, _, names in self.rows)
        told = [
            text + ("" if len(labels) == filled else f" (in: {', '.join(labels)})")
            for text, labels in self._noted.items()
        ]
        return [*notes, *self.remarks, *told, *self._provenance()]

    def _provenance(self) -> list[str]:
        """Return where our numbers come from."""
        runs = [each for run in self.used.values() for each in members(run)]
        if not runs:
            return ["Ours: no runs yet."]
        versions = {
            f"{name} {run['versions'][name]}"
            for run in runs
            for name in ("torch", "transformers", "lmms_eval", "lmms-eval")
            if run.get("versions", {}).get(name)
        }
        commits = {
            str(run.get("git_commit"))[:10]
            + (" with local changes" if run.get("git_dirty") else "")
            for run in runs
        }
        devices = {str(run.get("device")) for run in runs}
        where = "; ".join(", ".join(sorted(found)) for found in (devices, versions) if found)
        line = f"Ours: {len(runs)} runs; {where}; commit {', '.join(sorted(commits))}."
        return [line, *mixed_settings(runs)]


def _measured(run: StoredRun, measure: str) -> float | None:
    """Return what a run measured, in the unit of the table; no speed that other work decides."""
    if measure == "samples_per_s" and time_of(run) != run.get("seconds"):
        return None
    value, unit = {
        "tflops": ((run.get("tokens") or {}).get("prefill_flops"), 1e12),
        "memory_gb": (run.get("peak_memory_mib"), 1024),
        "samples_per_s": (run.get("items_per_second"), 1),
    }[measure]
    return None if value is None else value / unit


def _printed(row: RowSpec, column: str) -> list[float | str]:
    """Return what the versions of the paper print, each number once."""
    return list(dict.fromkeys(v[column] for v in row.published.values() if column in v))


def _each(printed: Sequence[float | str], write: Callable[[Any], str]) -> str:
    return " / ".join(filter(None, map(write, printed)))


def _text(value: float) -> str:
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def _less(ours: float | None, published: float) -> str:
    """Return ours - published, "" without ours."""
    if ours is None:
        return ""
    text = f"{ours - published:+.1f}"
    return "0.0" if float(text) == 0 else text
