"""The report of ``todre generate``: an answer, its tokens, FLOPs and times, as JSON or text."""

from __future__ import annotations

from typing import Any

from llava_todre.request import VLM, Answer
from llava_todre.work import prefill_work


def report_of(vlm: VLM, method: str, result: Answer) -> dict[str, Any]:
    """Return what ``--json`` prints about an answer.

    Args:
        vlm: that answered.
        method: its name.
        result: the answer.
    """
    work = prefill_work(vlm, result.stats)
    return {
        "answer": result.text,
        "method": method,
        **result.stats.as_dict(),
        "prefill_flops": work and work.flops,
        "probe_flops": work and work.probe_flops,
        "prefill_flops_unpruned": work and work.unpruned_flops,
        "stages_ms": {stage: round(ms, 2) for stage, ms in result.stages_ms.items()},
    }


def as_text(report: dict[str, Any]) -> str:
    """Return a report as lines to read."""
    kept, total = report["kept_tokens"], report["visual_tokens"]
    lines = [
        report["answer"],
        "",
        f"method     {report['method']}",
        f"tokens     {kept} of {total} visual tokens kept ({kept / total:.1%}) before the decoder, "
        f"{report['newline_tokens']} newline, {report['text_tokens']} text",
        f"per layer  {report['mean_visual_tokens']:.1f} visual tokens, newlines included, "
        "mean over decoder layers",
        f"prefill    {_prefill(report)}",
    ]
    for probe in report["probes"]:
        seen = []
        if probe["text_to_visual"] is not None:
            seen = [
                f"text to visual {probe['text_to_visual']:.3f}",
                f"visual to text {probe['visual_to_text']:.3f}",
            ]
        seen.append(f"{probe['dropped']} tokens dropped")
        lines.append(f"probe      after layer {probe['layer']}: {', '.join(seen)}")
    start = report["withdrawn_from"]
    where = "never" if start is None else f"from layer {start} on"
    lines.append(f"withdrawn  {where}")
    times = ", ".join(f"{stage} {ms:.1f}" for stage, ms in report["stages_ms"].items())
    lines.append(f"time (ms)  {times}")
    return "\n".join(lines)


def _prefill(report: dict[str, Any]) -> str:
    spent, unpruned = report["prefill_flops"], report["prefill_flops_unpruned"]
    if spent is None:
        return "FLOPs of this decoder are not known"
    probes = report["probe_flops"] / spent
    included = f", {probes:.1%} of it for the method's probes" if probes >= 0.001 else ""
    return (
        f"{spent / unpruned:.1%} of the FLOPs of the unpruned decoder prefill "
        f"({spent:.3g} of {unpruned:.3g}{included})"
    )
