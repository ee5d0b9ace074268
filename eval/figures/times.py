"""Where the time of an answer goes, before and after pruning."""

from __future__ import annotations

from typing import Any

from eval.bench.answers import STAGES
from eval.bench.report import headline
from eval.figures.sources import NOT_EVIDENCE, Data, Sources
from eval.figures.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PAGE,
    PURPLE,
    SKY,
    SMALL,
    legend_above,
    letter,
    new_figure,
)
from llava_todre.errors import TodreError

LOOKS = {
    "views": (GREEN, "", "views"),
    "vision": (BLUE, "////", "vision tower"),
    "selection": (BLACK, "", "selection"),
    "prefill": (ORANGE, "", "prefill"),
    "decode": (SKY, "\\\\\\\\", "decode"),
    "other": (GREY, "", "other"),
}
_SPARE = (PURPLE, "....")


def gather(sources: Sources) -> Data:
    """Return milliseconds per stage and method of a result of the bench."""
    stored = sources.benched()
    measured = [row for row in stored["methods"] if row["measured"]]
    if not measured:
        raise TodreError(f"bench {str(sources.bench)!r} holds no times; allowed: a timed result.")
    return {
        "rows": [
            {
                "label": row["label"],
                "kept": row["kept_tokens"],
                "stages": {name: stage["median"] for name, stage in row["stages_ms"].items()},
                "total": row["total_ms"]["median"],
                "speedup": row["speedup"]["total"]["median"],
            }
            for row in measured
        ],
        "note": f"Medians; one answer of {stored['new_tokens']} tokens after"
        f" {measured[0]['visual_tokens']} visual tokens. A decoder by dimensions"
        f" ({NOT_EVIDENCE}): {headline(stored)}",
    }


def draw(data: Data) -> Any:
    """Return the figure: seconds on the left, shares on the right."""
    rows = data["rows"]
    figure = new_figure(PAGE, 0.95 + 0.27 * len(rows), data["note"])
    seconds, shares = figure.subplots(1, 2, sharey=True, width_ratios=(1.25, 1))
    names = [name for name in (*STAGES, "other") if any(name in row["stages"] for row in rows)]
    names += sorted({name for row in rows for name in row["stages"]} - {*names})
    places = range(len(rows))
    starts = [0.0] * len(rows)
    for name in names:
        colour, hatch, label = LOOKS.get(name, (*_SPARE, name))
        widths = [row["stages"].get(name, 0.0) for row in rows]
        sums = [sum(row["stages"].values()) for row in rows]
        style = {"color": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0.3}
        seconds.barh(
            places, [w / 1e3 for w in widths], left=[s / 1e3 for s in starts], label=label, **style
        )
        shares.barh(
            places,
            [100 * w / total for w, total in zip(widths, sums, strict=True)],
            left=[100 * s / total for s, total in zip(starts, sums, strict=True)],
            **style,
        )
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    for place, row in zip(places, rows, strict=True):
        faster = "" if place == 0 else f"  ({row['speedup']:.1f}x)"
        seconds.text(
            starts[place] / 1e3 + 0.04,
            place,
            f"{row['total'] / 1e3:.2f} s{faster}",
            va="center",
            fontsize=SMALL,
        )
    seconds.set(xlabel="seconds", yticks=list(places), xlim=(0, 1.16 * max(starts) / 1e3))
    seconds.set_yticklabels([row["label"] for row in rows])
    seconds.invert_yaxis()
    shares.set(xlabel="share of the time, %", xlim=(0, 100))
    for axes, text in ((seconds, "(a) time of one answer"), (shares, "(b) where it goes")):
        letter(axes, text)
        axes.grid(axis="y", visible=False)
    legend_above(figure, seconds)
    return figure
