"""The demo's table, from its results file: for the terminal, and as Markdown for the README."""

from __future__ import annotations

from typing import Any

LEGEND = (
    "average: mean accuracy; relative: mean of accuracy / accuracy of the unpruned model; tokens:"
    " patch tokens entering the decoder; per layer: visual tokens a decoder layer processes (with"
    " newlines); FLOPs: decoder prefill; prefill, first token: speed-up over unpruned."
)


def _cells(results: dict[str, Any], per_task: bool) -> list[list[str]]:
    tasks = results["tasks"] if per_task else []
    header = ["method", "tokens", "per layer", *tasks, "average", "relative"]
    table = [[*header, "FLOPs", "prefill", "first token"]]
    for row in results["rows"]:
        draws = f" (mean of {row['draws']})" if row["draws"] > 1 else ""
        scores = [row["accuracy"][task] for task in tasks]
        table.append(
            [
                f"{row['method']} {row['retain_ratio']:.0%}{draws}",
                f"{row['kept_tokens']:.0f}",
                f"{row['mean_visual_tokens_per_layer']:.0f}",
                *(f"{100 * score:.1f}" for score in [*scores, row["average"]]),
                f"{row['relative_average']:.1%}",
                f"{row['flops_share']:.0%}",
                f"{row['prefill_speedup']:.1f}x",
                f"{row['first_token_speedup']:.1f}x",
            ]
        )
    return table


def as_text(results: dict[str, Any]) -> str:
    """Return the table with aligned columns."""
    table = _cells(results, per_task=True)
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], "", LEGEND])


def as_markdown(results: dict[str, Any], per_task: bool = True) -> str:
    """Return the table in Markdown, with how it was made below."""
    table = _cells(results, per_task)
    rule = ["---", *("---:" for _ in table[0][1:])]
    lines = ["| " + " | ".join(row) + " |" for row in [table[0], rule, *table[1:]]]
    versions = results["versions"]
    dirty = ", with local changes" if results["git_dirty"] else ""
    note = (
        f"Bundled mini model (not evidence about 7B models), {results['questions']} held-out"
        f" questions on {results['num_images']} images, seed {results['seed']}; {LEGEND}"
        f" {results['device']}, torch {versions['torch']}, transformers"
        f" {versions['transformers']}, commit {(results['git_commit'] or 'none')[:10]}{dirty}."
    )
    return "\n".join([*lines, "", note, ""])
