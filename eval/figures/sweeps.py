"""Accuracy and cost over the threshold tau, and over the probe layers, of Stage 2 alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import partial
from typing import Any

from eval.figures.sources import NOT_EVIDENCE, Data, Sources, made_by
from eval.figures.style import BLUE, PAGE, VERMILION, letter, new_figure
from eval.results.bootstrap import groups_of, relative_interval
from eval.results.files import StoredRun, load_runs
from eval.results.published import AVERAGE, VERSIONS, RowSpec, relative_average, rows
from eval.tables.paper import sheets
from llava_todre.errors import TodreError
from llava_todre.pruners.todre import Todre, TodreV1

SUITE = "mini"
OURS = "v2"
"""The version of the paper whose rows were run."""
_LOOKS = {"v1": (BLUE, "s", "--"), "v2": (VERMILION, "o", "-")}


def gather(sources: Sources, table: str) -> Data:
    """Return what a sweep gave, and what the papers print for theirs."""
    sheet, *others = sheets(table, load_runs([sources.runs]), suite=SUITE, version=OURS)
    if others:
        models = ", ".join(each.model for each in (sheet, *others))
        raise TodreError(f"runs {str(sources.runs)!r} are of {models}; expected: one model.")
    found = {row.label: (row, sheet.used[names[0]]) for row, _, names in sheet.rows if names}
    if "vanilla" not in found or len(found) < 3:
        raise TodreError(
            f"runs {str(sources.runs)!r} hold no sweep of table {table}; make it with"
            " `make reproduce-mini`."
        )
    _, full = found.pop("vanilla")
    ours = _ordered([{"at": _setting(row)} | _scored(run, full) for row, run in found.values()])
    return {
        "ours": ours,
        "unpruned_tokens": full["tokens"]["mean_visual_tokens_per_layer"],
        "published": {version: _published(table, version) for version in VERSIONS},
        "note": f"Stage 2 alone: every visual token enters the decoder. (a, c) bundled mini model"
        f" ({NOT_EVIDENCE}), {sum(b['num_samples'] for b in full['benchmarks'].values())} held-out"
        " questions, 95% interval (bootstrap over items, paired with the unpruned run);"
        f" {made_by(dict(full))} (c) with the share of questions on which tokens were withdrawn."
        " (b, d) published, not a result of this project: LLaVA-NeXT-7B,"
        f" four benchmarks, v1 on four RTX 3090; v1 {VERSIONS['v1']}, v2 {VERSIONS['v2']}."
        f" {_held(table)}",
    }


def _held(table: str) -> str:
    """Return what stays the same along a sweep, and is not the same in both versions."""
    parts = []
    for version, method in (("ours and v2", Todre()), ("v1", TodreV1())):
        depths = ", ".join(f"{8 * depth:g}/8" for depth in method.probe_depths)
        parts.append(f"{version} {depths}" if table == "5" else f"{version} {method.tau:.2f}")
    option = "Probe layers" if table == "5" else "Threshold tau"
    return f"{option}, by default of each version: {'; '.join(parts)}."


def _setting(row: RowSpec) -> float | str:
    """Return what a row varies: tau, or the name of its layers."""
    tau = row.options.get("tau")
    return row.label.split(" stage 2, ")[1] if tau is None else float(tau)


def _scored(run: StoredRun, full: StoredRun) -> Data:
    parts = [(run["benchmarks"][key], full["benchmarks"][key]) for key in full["benchmarks"]]
    pairs = [(ours["items"], unpruned["items"]) for ours, unpruned in parts]
    scores = [
        [each["benchmarks"][key]["score"] for key in full["benchmarks"]] for each in (run, full)
    ]
    return {
        "accuracy": relative_average(*scores),
        "interval": list(relative_interval(pairs, [groups_of(*each) for each in parts])),
        "tokens": run["tokens"]["mean_visual_tokens_per_layer"],
        "withdrawn": 100 * run["tokens"]["withdrawn_share"],
    }


def _published(table: str, version: str) -> list[Data]:
    printed = []
    for row in rows(table, version):
        cells = row.published[version]
        if row.method != "vanilla" and AVERAGE in cells:
            minutes, seconds = map(int, str(cells["time"]).split(":"))
            printed.append(
                {
                    "at": _setting(row),
                    "accuracy": float(cells[AVERAGE]),
                    "minutes": minutes + seconds / 60,
                }
            )
    return _ordered(printed)


def _ordered(points: Sequence[Data]) -> list[Data]:
    """Return points by their threshold or layer; several layers at once come after single ones."""

    def key(point: Data) -> tuple[bool, float]:
        if _is_single(point):
            return False, float(Fraction(point["at"]))
        return True, float(point["at"].startswith("4/8"))

    return sorted(points, key=key)


def _is_single(point: Mapping[str, Any]) -> bool:
    at = point["at"]
    return not isinstance(at, str) or ("," not in at and "all" not in at)


def draw(data: Data, table: str) -> Any:
    """Return the figure: ours on the left, published on the right; accuracy above cost."""
    figure = new_figure(PAGE, 3.9 if table == "6" else 3.7, data["note"])
    ((ours, printed), (tokens, minutes)) = figure.subplots(2, 2, sharex="col")
    every = [data["ours"], *data["published"].values()]
    names = list(dict.fromkeys(point["at"] for points in every for point in points))
    places = partial(_places, names=None if table == "5" else names)
    _, _, ours_line = look = _LOOKS[OURS]
    x = places(data["ours"])
    mean = [point["accuracy"] for point in data["ours"]]
    reach = [
        [abs(m - p["interval"][end]) for m, p in zip(mean, data["ours"], strict=True)]
        for end in (0, 1)
    ]
    joined = _joined(data["ours"])
    ours.errorbar(x, mean, yerr=reach, fmt=look[1], color=look[0], elinewidth=0.7)
    ours.plot(x[:joined], mean[:joined], ours_line, color=look[0])
    cost = [point["tokens"] for point in data["ours"]]
    tokens.plot(x, cost, look[1], color=look[0])
    tokens.plot(x[:joined], cost[:joined], ours_line, color=look[0])
    _shares(tokens, x, data["ours"], cost)
    tokens.axhline(data["unpruned_tokens"], color="black", linewidth=0.7, dashes=(4, 2))
    tokens.annotate(
        "unpruned",
        (1, data["unpruned_tokens"]),
        xycoords=("axes fraction", "data"),
        xytext=(0, 2),
        textcoords="offset points",
        ha="right",
        fontsize=6,
    )
    for version, points in data["published"].items():
        colour, marker, line = _LOOKS[version]
        x, joined = places(points), _joined(points)
        for axes, key in ((printed, "accuracy"), (minutes, "minutes")):
            values = [point[key] for point in points]
            axes.plot(x, values, marker, color=colour)
            axes.plot(x[:joined], values[:joined], line, color=colour)
        printed.plot([], [], line, marker=marker, color=colour, label=version)
    printed.legend(loc="lower left", title="published", title_fontsize=6)
    for axes, text in zip(
        (ours, printed, tokens, minutes),
        ("(a) mini model", "(b) published, LLaVA-NeXT-7B", "(c) mini model", "(d) published"),
        strict=True,
    ):
        letter(axes, text)
    ours.set_ylabel("accuracy, % of unpruned")
    printed.set_ylabel("average, % of unpruned")
    tokens.set_ylabel("visual tokens per layer")
    minutes.set_ylabel("total time, minutes")
    low = min(*(p["interval"][0] for p in data["ours"]), *_all(data["published"], "accuracy"))
    for axes in (ours, printed):  # one scale, so that the two can be compared
        axes.set_ylim(low - 0.06 * (101 - low), 100 + 0.06 * (101 - low))
    for axes in (tokens, minutes):
        axes.set_ylim(0, 1.15 * axes.get_ylim()[1])
        _name_axis(axes, table, names)
    return figure


def _all(published: Mapping[str, Sequence[Data]], key: str) -> list[float]:
    return [point[key] for points in published.values() for point in points]


def _places(points: Sequence[Mapping[str, Any]], names: list[Any] | None) -> list[float]:
    return [p["at"] if names is None else names.index(p["at"]) for p in points]


def _joined(points: Sequence[Mapping[str, Any]]) -> int:
    """Return how many of the points form a curve: all of tau, the single layers of the others."""
    return sum(map(_is_single, points))


def _shares(axes: Any, x: list[float], points: Sequence[Data], cost: list[float]) -> None:
    """Write next to each point on what share of the questions tokens were withdrawn."""
    for place, point, height in zip(x, points, cost, strict=True):
        axes.annotate(
            f"{point['withdrawn']:.0f}%",
            (place, height),
            xytext=(0, -8),
            textcoords="offset points",
            ha="center",
            fontsize=5.5,
        )


def _name_axis(axes: Any, table: str, names: list[Any]) -> None:
    if table == "5":
        margin = 0.05 * (max(names) - min(names))
        limits = min(names) - margin, max(names) + margin
        axes.set(xlabel="threshold $\\tau$", xticks=sorted(names), xlim=limits)
        return
    axes.set_xlim(-0.4, len(names) - 0.6)
    axes.set_xticks(range(len(names)), [_short(name) for name in names])
    axes.set_xlabel("probe layers, as fractions of all decoder layers")


def _short(name: str) -> str:
    """Return the name of probe layers in two short lines."""
    if name.startswith("all from "):
        return name.replace("all from ", "all from\n")
    first, *rest = name.split(", ")
    return f"{first}, ...,\n{rest[-1]}" if rest else first
