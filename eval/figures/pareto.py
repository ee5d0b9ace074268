"""Accuracy against tokens and against measured time, all methods, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from eval.figures.sources import NOT_EVIDENCE, Data, Sources, made_by
from eval.figures.style import BLACK, GREY, LOOKS, PAGE, letter, look_of, new_figure

TICKS = (25, 50, 75, 90, 95, 98, 99, 100)


def gather(sources: Sources) -> Data:
    """Return tokens, time and accuracy of every method and ratio of a demo's results."""
    stored = sources.demo()
    points = []
    for row in stored["rows"]:
        time = row["first_token_speedup"]
        points.append(
            {
                "method": row["method"],
                "ratio": row["retain_ratio"],
                "tokens": row["mean_visual_tokens_per_layer"],
                "time": 100 / time["median"],
                "time_spread": [100 / time["p80"], 100 / time["p20"]],
                "accuracy": 100 * row["relative_average"],
                "interval": [100 * end for end in row["relative_interval"]],
            }
        )
    times = stored["rows"][0]["first_token_speedup"]["count"]
    return {
        "points": points,
        "note": f"Bundled mini model ({NOT_EVIDENCE}), {stored['questions']} held-out questions on"
        f" {stored['num_images']} pictures. Accuracy: mean over tasks of accuracy / unpruned,"
        f" {stored['interval']['level']:.0%} interval (paired bootstrap over pictures). Tokens:"
        " visual tokens that a decoder layer processes, mean over layers. Time: vision, selection"
        f" and prefill, batch 1, median of {times} prompts taken in turns, bar from the 20th to the"
        " 80th percentile. Colours: controls grey, ToDRE orange, other diversity blue, attention of"
        " the vision tower green, other methods inside the decoder purple. " + made_by(stored),
    }


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other beats in both: lower first value, higher second."""
    best: list[tuple[float, float]] = []
    for cost, gain in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or gain > best[-1][1]:
            best.append((cost, gain))
    return best


def draw(data: Data) -> Any:
    """Return the figure: two panels, and every method in the legend."""
    figure = new_figure(PAGE, 4.9, data["note"])
    panels = figure.subplots(1, 2, sharey=True)
    points = data["points"]
    methods = list(dict.fromkeys(point["method"] for point in points))
    looks = look_of(methods)
    ratios = sorted({point["ratio"] for point in points if point["ratio"] < 1}, reverse=True)
    for axes, key in zip(panels, ("tokens", "time"), strict=True):
        for point in points:
            _point(axes, point, key, looks[point["method"]], _fill(point["ratio"], ratios))
        steps = front([(point[key], point["accuracy"]) for point in points])
        axes.step(*zip(*steps, strict=True), where="post", color=BLACK, linewidth=0.6, zorder=1)
    _stretch(panels, points)
    letter(panels[0], "(a) against tokens")
    letter(panels[1], "(b) against measured time")
    most = max(point["tokens"] for point in points)
    least = min(point["tokens"] for point in points)
    ticks = [n * 10**k for k in range(5) for n in (1, 2, 3, 5) if least <= n * 10**k <= most]
    panels[0].set(xlabel="visual tokens per decoder layer (log)", xscale="log")
    panels[0].set_xticks(ticks, [f"{tick}" for tick in ticks])
    panels[0].minorticks_off()
    panels[0].set_ylabel("accuracy, % of unpruned (stretched towards the top)")
    panels[1].set_xlabel("time to first token, % of unpruned")
    _legend(figure, methods, looks, ratios)
    return figure


def _stretch(panels: Any, points: Sequence[Data]) -> None:
    """Stretch the axis of accuracy towards its upper end, where methods differ by little."""
    values = [point["accuracy"] for point in points]
    lows, highs = zip(*(point["interval"] for point in points), strict=True)
    top, lowest = max(100.0, *values, *highs) + 1, min(*values, *lows) - 4

    def upwards(value: Any) -> Any:
        return -np.log10(np.maximum(top - np.asarray(value, dtype=float), 1e-3))

    def back(value: Any) -> Any:
        return top - 10 ** -np.asarray(value, dtype=float)

    ticks = [tick for tick in TICKS if tick >= lowest]
    for axes in panels:
        axes.set_yscale("function", functions=(upwards, back))
        axes.set_yticks(ticks, [f"{tick}" for tick in ticks])
        axes.set_ylim(lowest, top - 0.9)
        axes.minorticks_off()


def _fill(ratio: float, ratios: Sequence[float]) -> str:
    """Return how full a marker is: the more tokens are kept, the fuller."""
    if ratio == 1 or ratio == ratios[0]:
        return "full"
    return "none" if ratio == ratios[-1] else "bottom"


def _inside(colour: str, fill: str) -> dict[str, str]:
    """Return how a marker is filled, with white where it is not, so that no line shows through."""
    if fill == "none":
        return {"markerfacecolor": "white"}
    return {"fillstyle": fill, "markerfacecolor": colour, "markerfacecoloralt": "white"}


def _point(axes: Any, point: Data, key: str, look: tuple[str, str], fill: str) -> None:
    colour, marker = look
    x, y = point[key], point["accuracy"]
    low, high = point["interval"]
    bars = {"yerr": [[max(0, y - low)], [max(0, high - y)]]}
    if key == "time":
        fast, slow = point["time_spread"]
        bars["xerr"] = [[max(0, x - fast)], [max(0, slow - x)]]
    axes.errorbar(
        x,
        y,
        **bars,
        fmt=marker,
        color=colour,
        **_inside(colour, fill),
        markersize=7 if marker == "*" else 4,
        markeredgewidth=0.8,
        elinewidth=0.5,
        capsize=0,
        zorder=3 if point["method"].startswith("todre") else 2,
    )


def _legend(
    figure: Any, methods: Sequence[str], looks: dict[str, tuple[str, str]], ratios: Sequence[float]
) -> None:
    from matplotlib.lines import Line2D

    def entry(label: str, colour: str, marker: str, fill: str = "full") -> Any:
        style: dict[str, Any] = {"linestyle": "", "markersize": 6 if marker == "*" else 4}
        style |= _inside(colour, fill)
        return Line2D([], [], color=colour, marker=marker, label=label, **style)

    order = [*LOOKS, *methods]
    handles = [entry(method, *looks[method]) for method in sorted(methods, key=order.index)]
    for ratio in ratios:
        handles.append(entry(f"kept: {ratio:.0%}", GREY, "h", _fill(ratio, ratios)))
    handles.append(Line2D([], [], color=BLACK, linewidth=0.6, label="best for the cost"))
    figure.legend(
        handles=handles, loc="outside upper center", ncols=6, columnspacing=1.0, handletextpad=0.2
    )
