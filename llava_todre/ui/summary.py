"""The table, chart and messages of an answer as HTML; text from outside is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from llava_todre.stats import PruneStats
from llava_todre.ui.chart import ratio_chart, threshold
from llava_todre.ui.session import Outcome
from llava_todre.work import HasDecoder, prefill_work

_STAGES = {
    "views": "cutting the image",
    "vision": "vision tower",
    "selection": "selection",
    "prefill": "prefill",
    "decode": "decoding",
}


def facts_table(outcome: Outcome, model: HasDecoder) -> str:
    """Return tokens, FLOPs, times and what the decoder dropped as one table.

    Args:
        outcome: of one side.
        model: that answered, for counting FLOPs.
    """
    stats = outcome.stats
    work = prefill_work(model, stats)
    spent = f"{work.flops / work.unpruned_flops:.1%} of unpruned" if work else "not known"
    share = f" ({stats.kept_tokens / stats.visual_tokens:.1%})" if stats.visual_tokens else ""
    rows = [
        ("Method", outcome.name),
        ("Visual tokens kept", f"{stats.kept_tokens} of {stats.visual_tokens}{share}"),
        ("Visual tokens per layer", f"{stats.mean_visual_tokens:.1f}, newlines included"),
        ("Prefill FLOPs", spent),
        ("Dropped in the decoder", _dropped(stats)),
        ("Withdrawn", _withdrawn(stats)),
        ("New tokens", f"{outcome.new_tokens}{' (stopped)' if outcome.stopped else ''}"),
    ]
    rows += [
        (f"Time, {_STAGES.get(stage, stage)}", f"{ms:.1f} ms")
        for stage, ms in outcome.times_ms.items()
    ]
    rows.append(("Time, together", f"{sum(outcome.times_ms.values()):.1f} ms"))
    return _table(rows)


def chart(outcome: Outcome, num_layers: int) -> str:
    """Return the ratio-per-layer plot, or why there is none."""
    if not outcome.ratios:
        return f"<p>Ratios per layer: {escape(outcome.no_ratios.rstrip('.'))}.</p>"
    withdrawn_from = outcome.stats.withdrawn_from
    return ratio_chart(outcome.ratios, num_layers, withdrawn_from, threshold(outcome.pruner))


def progress(line: str) -> str:
    """Return the status line; screen readers speak it when it changes."""
    return f'<p role="status" class="progress">{escape(line)}</p>' if line else ""


def alert(message: str) -> str:
    """Return an error message."""
    return f'<p role="alert" class="problem">{escape(message)}</p>'


def _dropped(stats: PruneStats) -> str:
    seen = [f"{probe.dropped} after layer {probe.layer}" for probe in stats.probes if probe.dropped]
    return ", ".join(seen) or "none"


def _withdrawn(stats: PruneStats) -> str:
    start = stats.withdrawn_from
    return "never" if start is None else f"from layer {start} on"


def _table(rows: Sequence[tuple[str, str]]) -> str:
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>'
        for name, value in rows
    )
    note = "Times are of this one run, and vary with what else the machine does."
    return f'<table class="facts"><caption>{note}</caption><tbody>{body}</tbody></table>'
