"""The demo's table, from its results file: for the terminal, and as Markdown for the README."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from eval.tables.render import aligned, markdown_lines

LEGEND = (
    "tokens: patch tokens that enter the decoder; per layer: visual tokens that a decoder layer"
    " processes, newlines included, mean over the layers (papers say equivalent tokens); mean:"
    " mean accuracy in %; relative: mean of accuracy / accuracy unpruned, [95% interval, paired"
    " bootstrap over images]; FLOPs: exact count of the decoder prefill, share of unpruned;"
    " prefill: its speed-up; TTFT: speed-up of vision, selection and prefill; both medians over"
    " prompts, batch 1, interleaved."
)


def cells(results: dict[str, Any], per_task: bool) -> list[list[str]]:
    """Return header and rows of a demo's results; ``per_task`` adds a column for every task."""
    tasks = results["tasks"] if per_task else []
    header = ["tokens", "per layer", "mean", "relative", "FLOPs", "prefill", "TTFT"]
    table = [["method", *header, *tasks]]
    for row in results["rows"]:
        numbers = columns(row)
        scores = (f"{100 * row['accuracy'][task]:.1f}" for task in tasks)
        label = f"{row['method']} {row['retain_ratio']:.0%}{draws(row)}"
        table.append([label, *(numbers[name] for name in header), *scores])
    return table


def draws(row: dict[str, Any]) -> str:
    """Return over how many draws a row is, if several."""
    return f" (mean of {row['draws']})" if row["draws"] > 1 else ""


def columns(row: dict[str, Any]) -> dict[str, str]:
    """Return the numbers of a row of a demo's results, by header."""
    return {
        "tokens": f"{row['kept_tokens']:.0f}",
        "per layer": f"{row['mean_visual_tokens_per_layer']:.0f}",
        "mean": f"{100 * row['average']:.1f}",
        "relative": with_interval(row["relative_average"], row.get("relative_interval")),
        "FLOPs": f"{row['flops_share']:.0%}",
        "prefill": f"{row['prefill_speedup']['median']:.1f}x",
        "TTFT": f"{row['first_token_speedup']['median']:.1f}x",
    }


def with_interval(value: float, interval: Sequence[float] | None) -> str:
    """Return a share in percent with its interval, if that has a width."""
    text = f"{value:.1%}"
    if interval is None or interval[0] == interval[1]:
        return text
    return f"{text} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def as_text(results: dict[str, Any]) -> str:
    """Return the table with aligned columns."""
    header, *rows = aligned(cells(results, per_task=True))
    return "\n".join([header, "-" * len(header), *rows, "", textwrap.fill(LEGEND, 100)])


def as_markdown(results: dict[str, Any], per_task: bool = True) -> str:
    """Return the table in Markdown, with how it was made below."""
    return "\n".join([*markdown_lines(cells(results, per_task)), "", note(results), ""])


def note(results: dict[str, Any]) -> str:
    """Return what the columns mean and how the numbers were made."""
    versions = results["versions"]
    dirty = ", with local changes" if results["git_dirty"] else ""
    return (
        f"Bundled mini model (not evidence about 7B models), {results['questions']} held-out"
        f" questions on {results['num_images']} images, seed {results['seed']}; {LEGEND}"
        f" {results['device']}, torch {versions['torch']}, transformers"
        f" {versions['transformers']}, commit {(results['git_commit'] or 'none')[:10]}{dirty}."
    )
