"""Methods over benchmarks as a radar (paper: Figure 3): our tasks, and the published table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from eval.figures.sources import NOT_EVIDENCE, Data, Sources, made_by
from eval.figures.style import PAGE, SMALL, letter, look_of, new_figure
from eval.results.published import VERSIONS, numbers, rows
from eval.tables.render import name_of
from llava_todre.errors import TodreError

PUBLISHED_RATIO = 0.10
PUBLISHED = "llava_next_7b"
LINES = {
    "random": ":",
    "fastv": "--",
    "sparsevlm": ":",
    "fastervlm": "-.",
    "globalcom2": "-.",
    "divprune": "-.",
    "todre_v1": "--",
    "todre": "-",
}
"""The methods drawn, in the order of the legend; line and marker tell them apart in grey print."""


def gather(sources: Sources) -> Data:
    """Return score / unpruned score in percent, per method and benchmark, ours and published."""
    stored = sources.demo()
    full = stored["rows"][0]["accuracy"]
    tasks = [task for task in stored["tasks"] if full[task] > 0]
    pruned = [row for row in stored["rows"] if row["retain_ratio"] < 1]
    if not pruned or len(tasks) < 3:
        raise TodreError(
            f"methods {str(sources.methods)!r} has nothing to compare; allowed: three tasks or"
            " more, and a method that prunes."
        )
    ratio = min(row["retain_ratio"] for row in pruned)
    at_ratio = [row for row in pruned if row["retain_ratio"] == ratio]
    known = [row for row in at_ratio if row["method"] in LINES] or at_ratio
    return {
        "ratio": ratio,
        "ours": {
            row["method"]: {task: 100 * row["accuracy"][task] / full[task] for task in tasks}
            for row in known
        },
        "published": _published(),
        "note": f"(a) bundled mini model ({NOT_EVIDENCE}), {stored['questions']} held-out"
        f" questions on {stored['num_images']} pictures; {made_by(stored)} (b) published, not a"
        f" result of this project: Table 1 of {' and '.join(VERSIONS.values())}.",
    }


def _published() -> dict[str, dict[str, float]]:
    benchmarks = numbers()["image_benchmarks"]
    table = {
        row.method: row.published["v2" if "v2" in row.published else "v1"]
        for row in rows("1", model=PUBLISHED)
        if row.options.get("retain_ratio", PUBLISHED_RATIO) == PUBLISHED_RATIO
    }
    full = table.pop("vanilla")
    return {
        method: {key: 100 * float(scores[key]) / float(full[key]) for key in benchmarks}
        for method, scores in table.items()
    }


def draw(data: Data) -> Any:
    """Return the figure: ours on the left, published on the right."""
    figure = new_figure(PAGE, 4.0, data["note"])
    titles = (
        f"(a) mini model, {data['ratio']:.0%} of the tokens",
        f"(b) published, LLaVA-NeXT-7B, {PUBLISHED_RATIO:.0%} of the tokens",
    )
    methods = list(dict.fromkeys([*LINES, *data["ours"]]))
    handles: dict[str, Any] = {}
    for place, (title, key) in enumerate(zip(titles, ("ours", "published"), strict=True), 1):
        axes = figure.add_subplot(1, 2, place, projection="polar")
        letter(axes, title)
        handles |= _web(axes, data[key], methods)
    shown = [method for method in methods if method in handles]
    figure.legend(
        [handles[method] for method in shown], shown, loc="outside upper center", ncols=len(shown)
    )
    return figure


def _web(
    axes: Any, scores: Mapping[str, Mapping[str, float]], methods: list[str]
) -> dict[str, Any]:
    """Draw one radar; returns the line of each method."""
    benchmarks = list(next(iter(scores.values())))
    angles = [2 * math.pi * place / len(benchmarks) for place in range(len(benchmarks))]
    looks, drawn = look_of(methods), {}
    for method in methods:
        if method not in scores:
            continue
        values = [scores[method][key] for key in benchmarks]
        colour, marker = looks[method]
        (drawn[method],) = axes.plot(
            [*angles, angles[0]],
            [*values, values[0]],
            LINES.get(method, "-"),
            color=colour,
            marker=marker,
            markersize=3,
            linewidth=1.6 if method == "todre" else 0.9,
            zorder=4 if method == "todre" else 3,
        )
    lowest = min(min(each.values()) for each in scores.values())
    step = 5 if lowest > 60 else 20
    floor = max(0, step * (int(lowest) // step) - step)
    highest = max(max(each.values()) for each in scores.values())
    axes.set_ylim(floor, max(100, highest) + 1)
    ticks = range(floor + step, 101, step)
    axes.set_yticks(list(ticks), [""] * len(ticks))
    for tick in ticks:  # as texts, which unlike tick labels can lie over the lines
        box = {"facecolor": "white", "alpha": 0.85, "pad": 0.6, "linewidth": 0}
        style = {"fontsize": SMALL - 0.8, "ha": "center", "va": "center", "bbox": box}
        axes.text(angles[1] / 2, tick, f"{tick} %", zorder=6, **style)
    axes.set_theta_offset(math.pi / 2)
    axes.set_theta_direction(-1)
    axes.set_xticks(angles, [name_of(key) for key in benchmarks])
    axes.tick_params(axis="x", pad=5)
    axes.spines["polar"].set_linewidth(0.6)
    return drawn
