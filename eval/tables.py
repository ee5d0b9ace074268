"""The papers' tables filled from runs: our numbers beside the published ones.

A run fills a row when it ran the same thing: the same model, and a method and options that make
the same pruner, however they were spelled. What was not run stays empty and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from eval.compare import is_mean, mean_interval, relative_interval
from eval.drawing import Cell, name_of
from eval.known_models import known_models, num_layers_of
from eval.matching import concerns, identity, model_key, ran, rank_of
from eval.published import (
    AVERAGE,
    VERSIONS,
    RowSpec,
    models,
    place,
    ratio_row,
    relative_average,
    rows,
    suite_rows,
    table_spec,
)
from eval.results import Run
from llava_todre.errors import TodreError, unknown
from llava_todre.intervals import Interval
from llava_todre.pruners import PRUNERS

NOT_RUN, FAILED, SERVER = "not run", "failed", "server"


@dataclass(frozen=True)
class Entry:
    """What the runs say about one benchmark of one row."""

    text: str
    run: Run | None = None
    stored: Mapping[str, Any] = field(default_factory=dict)
    """The benchmark's part of the run's JSON."""

    @property
    def score(self) -> float | None:
        """The score, where there is one."""
        return self.stored["score"] if self.stored.get("status") == "complete" else None


class Sheet:
    """One table of one model: rows filled from the runs, and what must be said about them."""

    def __init__(
        self,
        model: str,
        title: str,
        row_specs: Sequence[RowSpec],
        columns: Sequence[str],
        benchmarks: Sequence[str],
        runs: Sequence[Run],
        num_layers: int | None,
        covered: bool = True,
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
            covered: whether we have runs of this model at all.
        """
        self.columns, self.benchmarks, self.covered = columns, benchmarks, covered
        self.model, self.num_layers = model, num_layers
        self.used: dict[str, Run] = {}
        self.remarks: dict[str, None] = {}
        self._noted: dict[str, dict[str, None]] = {}
        self._by_identity: dict[object, list[Run]] = {}
        for run in runs:
            try:
                key = identity(*ran(run), num_layers)
                self._by_identity.setdefault(key, []).append(run)
            except (TodreError, TypeError) as error:
                self._remark(f"{run['name']} fits no row: {error}")
        unpruned = next(row for row in row_specs if row.method == "vanilla")
        self._printed_full = unpruned.published
        self._full = self._entries(unpruned)
        self.rows = [(row, self._fill(row), self._names(row)) for row in row_specs]
        limits = sorted({run["config"].get("limit") for run in self.used.values()} - {None})
        self.title = title + (f", limit {', '.join(map(str, limits))}" if limits else "")

    def _candidates(self, row: RowSpec) -> list[Run]:
        return self._by_identity.get(identity(row.method, row.options, self.num_layers), [])

    def _entries(self, row: RowSpec) -> dict[str, Entry]:
        """Return what the runs of a row say about each benchmark."""
        return {key: self._entry(row, key) for key in self.benchmarks}

    def _entry(self, row: RowSpec, benchmark: str) -> Entry:
        found = [run for run in self._candidates(row) if concerns(run, benchmark)]
        if not found:
            return Entry(NOT_RUN)
        best = max(found, key=lambda run: rank_of(run, benchmark))
        name = str(best["name"])
        rank = rank_of(best, benchmark)[:4]
        same = [run for run in found if rank_of(run, benchmark)[:4] == rank]
        if len(same) > 1:
            self._remark(f"{row.label}: {len(same)} runs fit; the newest is shown, {name}.")
        if best["status"] != "complete":
            self._remark(f"{name} failed: {best['error']}")
            return Entry(FAILED, best)
        self.used[name] = best
        stored = best["benchmarks"][benchmark]
        if stored.get("note"):
            text = f"{name_of(benchmark)}: {stored['note']}"
            self._noted.setdefault(text, {})[row.label] = None
        if stored["status"] != "complete":
            text = SERVER if stored["status"] == "submission" else str(stored["status"])
            return Entry(text, best, stored)
        if stored["score"] is None:
            raise TodreError(
                f"run {name!r} has no score for {benchmark!r}; allowed: a number, as its status is"
                " complete."
            )
        return Entry(f"{stored['score']:.1f}", best, stored)

    def _remark(self, text: str) -> None:
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
            self._remark("! other samples than the unpruned row's: not comparable.")
        printed = _printed(row, key)
        differences = _each(printed, lambda value: _less(entry.score, value))
        interval = _shown(mean_interval(stored["items"])) if stored and is_mean(stored) else ""
        return Cell(entry.text, interval, _each(printed, _text), differences, samples)

    def _average(self, row: RowSpec, entries: Mapping[str, Entry]) -> Cell:
        """Return the relative average over the benchmarks that both this and the full row have."""
        known = [
            key
            for key, entry in entries.items()
            if entry.score is not None and self._full[key].score is not None
        ]
        printed = _printed(row, AVERAGE)
        published = _each(printed, _text)
        if not known:
            return Cell(self._why_no_average(entries), published=published)
        ours = _relative(entries, self._full, known)
        if any(self._full[key].score == 0 for key in known):
            self._remark(
                "Benchmarks at which the unpruned model scores 0 are left out of averages."
            )
        partial = len(known) < len(entries)
        text = f"{ours:.1f}" + (f" ({len(known)} of {len(entries)})" if partial else "")
        if partial:
            self._remark(
                "(k of n): average over k benchmarks; difference to the papers' over those."
            )
            printed = self._printed_over(row, known)
        return Cell(
            text,
            self._average_interval(row, entries, known),
            published,
            _each(printed, lambda value: _less(ours, value)),
        )

    def _why_no_average(self, entries: Mapping[str, Entry]) -> str:
        texts = {entry.text for entry in entries.values()}
        if any(entry.score is not None for entry in entries.values()):
            self._remark("No average without a run of the unpruned model.")
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

    def _average_interval(
        self, row: RowSpec, entries: Mapping[str, Entry], known: Sequence[str]
    ) -> str:
        pairs = [(entries[key].stored, self._full[key].stored) for key in known]
        if row.method == "vanilla" or not all(is_mean(stored) for pair in pairs for stored in pair):
            return ""
        try:
            return _shown(relative_interval([(run["items"], full["items"]) for run, full in pairs]))
        except TodreError:
            self._remark("No interval of an average over other items than the unpruned row's.")
            return ""

    def _time(self, row: RowSpec, entries: Mapping[str, Entry]) -> Cell:
        """Return the time of the run that covers exactly these benchmarks, if one does."""
        published = _each(_printed(row, "time"), str)
        names = {str(entry.run["name"]) for entry in entries.values() if entry.run is not None}
        if len(names) == 1 and all(entry.score is not None for entry in entries.values()):
            run = self.used[names.pop()]
            if set(run["benchmarks"]) == set(entries):
                minutes, seconds = divmod(round(run["seconds"]), 60)
                return Cell(f"{minutes}:{seconds:02}", published=published)
        return Cell(published=published)

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
        ours = _measured(run, measure)
        text = "" if ours is None else _text(ours)
        return Cell(text, "", published, _each(printed, lambda value: _less(ours, value)))

    def _names(self, row: RowSpec) -> list[str]:
        """Return the runs that a row shows."""
        return [str(run["name"]) for run in self._candidates(row) if run["name"] in self.used]

    @property
    def notes(self) -> list[str]:
        """What stands below the table."""
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
            notes.append(f"time: minutes:seconds; ours on the device below{theirs}.")
        if any(cell.interval for _, cells, _ in self.rows for cell in cells.values()):
            notes.append(
                "95 % interval: bootstrap over items, paired with the unpruned run for the average;"
                " none where the metric is not a mean over items."
            )
        filled = sum(bool(names) for _, _, names in self.rows)
        told = [
            text + ("" if len(labels) == filled else f" (in: {', '.join(labels)})")
            for text, labels in self._noted.items()
        ]
        return [*notes, *self.remarks, *told, *self._provenance()]

    def _provenance(self) -> list[str]:
        """Return where our numbers come from."""
        runs = list(self.used.values())
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
        settings: dict[str, set[str]] = {}
        for run in runs:
            for key, value in {**run["config"]["model"], "seed": run["config"].get("seed")}.items():
                settings.setdefault(key, set()).add(str(value))
        mixed = [f"{k} {' | '.join(sorted(v))}" for k, v in settings.items() if len(v) > 1]
        return [line, *([f"These runs differ in: {'; '.join(mixed)}."] if mixed else [])]


def _measured(run: Run, measure: str) -> float | None:
    """Return what a run measured, in the unit of the table."""
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


def _shown(interval: Interval) -> str:
    return f"[{interval[0]:.1f}, {interval[1]:.1f}]"


def _relative(
    entries: Mapping[str, Entry], full: Mapping[str, Entry], known: Sequence[str]
) -> float:
    return relative_average(
        [entries[key].stored["score"] for key in known],
        [full[key].stored["score"] for key in known],
    )


def sheets(
    table: str,
    runs: Sequence[Run],
    suite: str | None = None,
    model: str | None = None,
    version: str | None = None,
) -> list[Sheet]:
    """Return the filled tables, one per model.

    Args:
        table: 1 to 6, pivot or cross_model.
        runs: as :func:`load_runs` gives them.
        suite: use only runs of this suite; where no model of theirs is in the paper's table, the
            table is one of the suite's own benchmarks.
        model: only this model.
        version: only this version of the paper: v1 or v2.
    """
    spec = table_spec(table)
    if suite is not None:
        suites = {str(run["config"]["suite"]) for run in runs}
        if suite not in suites:
            raise unknown("suite", suite, suites)
        runs = [run for run in runs if run["config"]["suite"] == suite]
    found = {key: [run for run in runs if model_key(run) == key] for key in map(model_key, runs)}
    own = suite is not None and not set(found) & set(models(table))
    known = list(found) if own else models(table)
    if model is not None and model not in known:
        raise unknown(f"model of table {table}:", model, known)
    made = []
    for key in known if model is None else [model]:
        if own:
            made.append(_own_sheet(table, str(suite), key, found[key], version))
            continue
        made.append(
            Sheet(
                key,
                f"{spec.title} ({spec.number}), {key}",
                rows(table, version, key),
                (*spec.measures, *(spec.benchmarks if spec.shows_scores else ()), AVERAGE),
                spec.benchmarks,
                found.get(key, []),
                num_layers_of(key),
                covered=key in known_models() or key in found,
            )
        )
    return made


def _own_sheet(
    table: str, suite: str, model: str, runs: Sequence[Run], version: str | None
) -> Sheet:
    """Return a table of a suite's own benchmarks, in the shape of one of the papers'."""
    other = {"v1": "todre", "v2": "todre_v1"}.get(version or "")
    spec = table_spec(table)
    stated = next((run["config"]["model"].get("num_layers") for run in runs), None)
    num_layers = stated or num_layers_of(model)
    benchmarks = tuple(dict.fromkeys(key for run in runs for key in run["benchmarks"]))
    caption = "bundled mini model, not evidence about 7B models"
    wanted = [row for row in suite_rows(table, num_layers) if row.method != other]
    if table == "1":
        wanted += _others(wanted, runs, num_layers)
        wanted.sort(key=place)
    return Sheet(
        model,
        f"Suite {suite}, in the shape of: {spec.title} ({spec.number}), {model}; "
        + (caption if model == "mini" else "no published numbers"),
        wanted,
        (*spec.measures, *(benchmarks if spec.shows_scores else ()), AVERAGE),
        benchmarks,
        runs,
        num_layers,
    )


def _others(
    wanted: Sequence[RowSpec], runs: Sequence[Run], num_layers: int | None
) -> list[RowSpec]:
    """Return rows for further methods that were run with nothing but a retain ratio."""
    known = {str(identity(row.method, row.options, num_layers)) for row in wanted}
    found = []
    for run in runs:
        method, options = ran(run)
        ratio = options.get("retain_ratio", 1.0)
        if method not in PRUNERS or ratio == 1.0 or not isinstance(ratio, float):
            continue
        try:
            row = ratio_row(method, ratio)
            same = str(identity(row.method, row.options, num_layers))
            if same == str(identity(method, options, num_layers)) and same not in known:
                known.add(same)
                found.append(row)
        except TodreError:
            continue  # the sheet says which runs it could not read
    return found
