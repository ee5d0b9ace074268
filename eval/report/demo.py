"""The report of ``todre demo``."""

from __future__ import annotations

from typing import Any

from eval.demo.plan import Run
from eval.mini import held_out
from eval.report.answers import of_demo
from eval.report.origin import origin
from eval.report.page import Html, page, paragraph, table
from eval.report.scenes import NUM_SCENES, with_pictures
from eval.tables.demo import LEGEND, cells
from llava_todre.errors import TodreError
from llava_todre.pruners import Pruner


def is_demo(results: Any) -> bool:
    """Return whether a JSON value is what ``todre demo`` stores."""
    return isinstance(results, dict) and set(results) >= _PARTS and bool(results["rows"])


_PARTS = {"rows", "runs", "tasks", "seed", "questions", "num_images", "versions", "time_utc"}


def report(results: dict[str, Any], model: Any, tokenizer: Any, charts: list[Html]) -> str:
    """Return the page.

    Args:
        results: of the demo.
        model: that was used.
        tokenizer: of the model.
        charts: drawn from the results.

    Raises:
        TodreError: the results are of another version of the demo.
    """
    try:
        stored = [(Run(**each["run"]), each) for each in results["runs"]]
    except (KeyError, TypeError) as error:
        raise TodreError(
            f"results of the demo are damaged or of another version ({error}); run it again."
        ) from None
    shown = {_label(run): (run, each) for run, each in stored if run.draw == 0}
    samples = held_out(min(NUM_SCENES, results["num_images"]), results["seed"])
    runs = {label: each for label, (_, each) in shown.items()}

    def pruners(index: int) -> dict[str, Pruner]:
        return {label: run.pruner(index) for label, (run, _) in shown.items()}

    asked = [of_demo(runs, index, sample) for index, sample in enumerate(samples)]
    header, *rows = cells(results, per_task=True)
    lead = (
        "What pruning visual tokens costs and saves a small LLaVA-NeXT that comes with "
        f"llava_todre: {results['questions']} held-out questions on {results['num_images']} "
        "pictures. The model shows the mechanism and is no evidence about 7B models."
    )
    return page(
        "llava_todre: the demo's report",
        lead,
        [
            ("Results", [table(header, rows), paragraph(LEGEND, "note")]),
            ("Figures", charts),
            ("Pictures and answers", with_pictures(model, tokenizer, samples, pruners, asked)),
            ("How this was made", origin([results], [run["run"] for run in results["runs"]])),
        ],
    )


def _label(run: Run) -> str:
    return f"{run.method} {run.retain_ratio:.0%}"
