"""The report of a folder of runs through lmms-eval."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.mini import held_out
from eval.report.answers import of_runs
from eval.report.origin import origin
from eval.report.page import Html, folded, heading, page, paragraph, table
from eval.report.scenes import NUM_SCENES, answers, with_pictures
from eval.results.files import StoredRun, load_runs
from eval.results.lookup import model_key
from eval.results.published import table_spec
from eval.tables.all_runs import as_tables
from eval.tables.paper import OF_THEIR_BENCHMARKS, sheets
from eval.tables.render import Table, stacked
from llava_todre.errors import TodreError
from llava_todre.lmms_plugin.arguments import draws, item_seed, with_seed
from llava_todre.pruners import Pruner, create_pruner

_MINI = "mini"
_TABLES = {
    "1": None,
    "2": None,
    "4": None,
    "5": "v2",
    "6": "v2",
    "pivot": None,
    "cross_model": None,
}
"""Tables of the papers that runs fill, and which version of the paper where they differ."""


def stored(folder: Path) -> list[StoredRun]:
    """Return the runs of a folder; raise a TodreError if there are none."""
    runs = load_runs([folder])
    if not runs:
        raise TodreError(
            f"folder {str(folder)!r} holds no results; allowed: one of `todre demo`, or of "
            "`eval run` or `eval sweep`."
        )
    return runs


def report(
    runs: Sequence[StoredRun], folder: Path, model: Any, tokenizer: Any, charts: list[Html]
) -> str:
    """Return the page.

    Args:
        runs: of the folder.
        folder: with the logs of answers next to the runs' JSONs, if they are still there.
        model: the bundled one, for pictures; runs of other models are shown without.
        tokenizer: of the model.
        charts: drawn from the runs.
    """
    done = [run for run in runs if run["status"] == "complete"]
    failed = [[run["name"], run["error"]] for run in runs if run["status"] != "complete"]
    return page(
        f"llava_todre: {len(runs)} runs through lmms-eval",
        _lead(runs),
        [
            ("Tables", _tables(runs)),
            ("All runs", _all(runs)),
            ("Figures", charts),
            ("Pictures and answers", _examples(done, folder, model, tokenizer)),
            ("Failed runs", [table(["run", "reason"], failed, left=2)] if failed else []),
            ("How this was made", origin(runs, [run["config"] for run in runs])),
        ],
    )


def _lead(runs: Sequence[StoredRun]) -> str:
    keys = sorted({model_key(run) for run in runs})
    suites = sorted({str(run["config"]["suite"]) for run in runs})
    caution = " The bundled mini model shows the mechanism and is no evidence about 7B models."
    return (
        f"Models: {', '.join(keys)}. Suites: {', '.join(suites)}. Published numbers are labelled "
        f"as such.{caution if _MINI in keys else ''}"
    )


def _tables(runs: Sequence[StoredRun]) -> list[Html]:
    """Return every table of the papers that shows a run which none before it does."""
    parts: list[Html] = []
    told: set[str] = set()
    for suite in dict.fromkeys(str(run["config"]["suite"]) for run in runs):
        has = {key for run in runs if run["config"]["suite"] == suite for key in run["benchmarks"]}
        for number, version in _TABLES.items():
            if number in OF_THEIR_BENCHMARKS and not has & set(table_spec(number).benchmarks):
                continue
            for sheet in sheets(number, runs, suite, version=version):
                if set(sheet.used) - told:
                    parts += _as_html(stacked(sheet))
                    told |= set(sheet.used)
    return parts


def _all(runs: Sequence[StoredRun]) -> list[Html]:
    """Return every run once, whether it is in one of the tables or not."""
    parts: list[Html] = []
    for made in as_tables(runs):
        drawn = table(made.header, made.rows, made.left, wraps=False)
        parts.append(folded(made.title, drawn, *(paragraph(note, "note") for note in made.notes)))
    return parts


def _as_html(filled: Table) -> list[Html]:
    """Return a table with its last column, the average, in front: phones show it first."""
    left = filled.left
    header, *rows = ([*row[:left], row[-1], *row[left:-1]] for row in [filled.header, *filled.rows])
    drawn = table(header, rows, left, wraps=False)
    return [heading(filled.title), drawn, *(paragraph(note, "note") for note in filled.notes)]


def _examples(runs: Sequence[StoredRun], folder: Path, model: Any, tokenizer: Any) -> list[Html]:
    """Return the first items of the runs that differ in method and ratio only."""
    plain = {
        _label(run): run
        for run in sorted(runs, key=_place)
        if set(run["config"]["options"]) <= {"retain_ratio"}
    }
    mini = {label: run for label, run in plain.items() if _is_mini(run)}
    if not mini:
        return [part for asked in of_runs(plain, folder, NUM_SCENES) for part in answers(asked)]

    def pruners(index: int) -> dict[str, Pruner]:
        return {label: pruner_of(run, index) for label, run in mini.items()}

    asked = of_runs(mini, folder, NUM_SCENES)
    return with_pictures(model, tokenizer, held_out(NUM_SCENES), pruners, asked)


def _place(run: StoredRun) -> tuple[bool, float]:
    """Return where a run stands: the unpruned one, then by falling ratio."""
    return run["config"]["method"] != "vanilla", -_ratio(run)


def _is_mini(run: StoredRun) -> bool:
    return model_key(run) == _MINI and run["config"]["suite"] == _MINI


def pruner_of(run: StoredRun, doc_id: int) -> Pruner:
    """Return the method as the run asked about one item: random draws belong to the item."""
    pruner = create_pruner(run["config"]["method"], **run["config"]["options"])
    seed = item_seed(run["config"]["seed"], doc_id)
    return with_seed(pruner, seed) if draws(pruner) else pruner


def _label(run: StoredRun) -> str:
    return f"{run['config']['method']} {_ratio(run):.0%}"


def _ratio(run: StoredRun) -> float:
    return float(run["config"]["options"].get("retain_ratio", 1.0))
