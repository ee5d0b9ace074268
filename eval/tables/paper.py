"""The papers' tables filled from runs: our numbers next to the published ones.

A table is there for every model that the papers have in it, and one of the same shape, per suite,
for every other model that was run.
"""

from __future__ import annotations

from collections.abc import Sequence

from eval.results.averages import counts
from eval.results.files import StoredRun
from eval.results.known_models import known_models, num_layers_of
from eval.results.lookup import UNREADABLE, concerns, identity, model_key, ran
from eval.results.published import (
    AVERAGE,
    RowSpec,
    budget_row,
    models,
    place,
    rows,
    suite_rows,
    table_spec,
)
from eval.results.seeds import over_seeds
from eval.tables.sheet import Sheet
from llava_todre.errors import TodreError, unknown

_BY_BUDGET = ("1", "2", "cross_model")
"""Tables whose rows are methods and budgets."""
OF_THEIR_BENCHMARKS = ("2", "cross_model")
"""Tables that have no counterpart on other benchmarks than their own."""


def sheets(
    table: str,
    runs: Sequence[StoredRun],
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
    of_model: dict[str, list[StoredRun]] = {}
    for run in over_seeds(runs):
        of_model.setdefault(model_key(run), []).append(run)
    papers = models(table)
    others = [key for key in of_model if key not in papers]
    own_only = suite is not None and len(others) == len(of_model)
    known = others if own_only else [*papers, *others]
    if model is not None and model not in known:
        raise unknown(f"model of table {table}:", model, known)
    chosen = known if model is None else [model]
    made = [
        _papers_sheet(table, key, of_model.get(key, []), version) for key in chosen if key in papers
    ]
    for key in (key for key in chosen if key not in papers):
        made += _own_sheets(table, key, of_model[key], version)
    if not made:
        raise TodreError(
            f"table {table!r} has none of the benchmarks of these runs; its own:"
            f" {', '.join(spec.benchmarks)}."
        )
    return made


def unshown(found: Sequence[Sheet], runs: Sequence[StoredRun]) -> list[StoredRun]:
    """Return the runs that fit no row of any of the tables."""
    fitting = {run for sheet in found for run in sheet.fitting}
    return [run for run in runs if id(run) not in fitting]


def _papers_sheet(table: str, model: str, runs: Sequence[StoredRun], version: str | None) -> Sheet:
    """Return a table of the papers; further methods that were run with a budget have rows too."""
    spec, num_layers = table_spec(table), num_layers_of(model)
    wanted = rows(table, version, model)
    if table in _BY_BUDGET:
        wanted += _others(wanted, runs, num_layers, spec.benchmarks)
        wanted.sort(key=place)
    return Sheet(
        model,
        f"{spec.title} ({spec.number}), {model}",
        wanted,
        (*spec.measures, *(spec.benchmarks if spec.shows_scores else ()), AVERAGE),
        spec.benchmarks,
        runs,
        num_layers,
        covered=model in known_models() or bool(runs),
    )


def _own_sheets(
    table: str, model: str, runs: Sequence[StoredRun], version: str | None
) -> list[Sheet]:
    """Return a table per suite of a model that the papers do not speak of."""
    suites = dict.fromkeys(str(run["config"]["suite"]) for run in runs)
    found = []
    for suite in suites:
        of_suite = [run for run in runs if run["config"]["suite"] == suite]
        has = {key for run in of_suite for key in run["benchmarks"]}
        if table not in OF_THEIR_BENCHMARKS or has & set(table_spec(table).benchmarks):
            found.append(_own_sheet(table, suite, model, of_suite, version))
    return found


def _own_sheet(
    table: str, suite: str, model: str, runs: Sequence[StoredRun], version: str | None
) -> Sheet:
    """Return a table of a suite's own benchmarks, in the shape of one of the papers'."""
    other = {"v1": "todre", "v2": "todre_v1"}.get(version or "")
    spec = table_spec(table)
    stated = next((run["config"]["model"].get("num_layers") for run in runs), None)
    num_layers = stated or num_layers_of(model)
    parts = {key: part for run in reversed(runs) for key, part in run["benchmarks"].items()}
    order = dict.fromkeys(key for run in runs for key in run["benchmarks"])
    benchmarks = [key for key in order if counts(parts[key])]
    extras = [key for key in order if not counts(parts[key])]
    caption = "bundled mini model, not evidence about 7B models"
    wanted = [row for row in suite_rows(table, num_layers) if row.method != other]
    if table in _BY_BUDGET:
        wanted += _others(wanted, runs, num_layers, [*order])
        wanted.sort(key=place)
    scores = order if spec.shows_scores else ()
    return Sheet(
        model,
        f"Suite {suite}, in the shape of: {spec.title} ({spec.number}), {model}; "
        + (caption if model == "mini" else "no published numbers"),
        wanted,
        (*spec.measures, *scores, AVERAGE),
        benchmarks,
        runs,
        num_layers,
        extras=extras,
    )


def _others(
    wanted: Sequence[RowSpec],
    runs: Sequence[StoredRun],
    num_layers: int | None,
    benchmarks: Sequence[str],
) -> list[RowSpec]:
    """Return rows for further methods, also A+B, that were run with nothing but a budget."""
    known = {str(identity(row.method, row.options, num_layers)) for row in wanted}
    found = []
    for run in runs:
        method, options = ran(run)
        if not any(concerns(run, key) for key in benchmarks) or options.get("retain_ratio") == 1.0:
            continue
        row = budget_row(method, options)
        try:
            same = str(identity(method, options, num_layers))
        except UNREADABLE:
            continue  # the sheet says which runs it could not read
        if row is not None and same not in known:
            known.add(same)
            found.append(row)
    return found
