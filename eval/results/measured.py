"""Results of ``todre demo`` and of the bench, read and checked as runs are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.results.schema import (
    COUNT,
    HITS,
    KEYS,
    NUMBER,
    PERCENTILES,
    TEXT,
    TRUTH,
    WHOLE,
    Each,
    Value,
    checked,
    is_number,
    or_null,
)
from llava_todre.errors import TodreError

_INTERVAL = Value(
    lambda value: isinstance(value, list) and len(value) == 2 and all(map(is_number, value)),
    "a lower and an upper end",
)
DEMO = {
    "rows": Each(
        {
            "method": TEXT,
            "retain_ratio": NUMBER,
            "draws": COUNT,
            "accuracy": Each(NUMBER),
            "average": NUMBER,
            "relative_average": NUMBER,
            "relative_interval": _INTERVAL,
            "kept_tokens": NUMBER,
            "mean_visual_tokens_per_layer": NUMBER,
            "flops_share": NUMBER,
            "prefill_speedup": PERCENTILES,
            "first_token_speedup": PERCENTILES,
        },
        listed=True,
    ),
    "runs": Each({"run": KEYS, "hits": Each(HITS)}, listed=True),
    "tasks": Each(TEXT, listed=True),
    "interval": {"level": NUMBER},
    "num_images": COUNT,
    "questions": COUNT,
    "seed": WHOLE,
    "versions": KEYS,
    "time_utc": TEXT,
}
_PROVENANCE = {"versions": KEYS, "device": TEXT, "torch_threads?": COUNT, "git_dirty": TRUTH}
BENCH = {
    "size": TEXT,
    "checkpoint": or_null(TEXT),
    "new_tokens": COUNT,
    "repeats?": COUNT,
    "attention": TEXT,
    "dtype": TEXT,
    "decoder?": KEYS,
    "methods": Each(
        {
            "label": TEXT,
            "method": TEXT,
            "options": {"retain_ratio?": NUMBER},
            "measured": TRUTH,
            "flops": {"prefill": NUMBER, "paper_prefill": NUMBER},
            "kept_tokens?": NUMBER,
            "visual_tokens?": NUMBER,
        },
        listed=True,
    ),
    **_PROVENANCE,
}
_MEASURED = {
    "samples_per_s": PERCENTILES,
    "peak_memory_mib": NUMBER,
    "stages_ms?": Each(PERCENTILES),
    "total_ms?": PERCENTILES,
    "speedup?": Each(PERCENTILES),
}
"""What a row of the bench has besides, where it was timed."""


def checked_demo(results: Any, file: Path) -> dict[str, Any]:
    """Return the results of a demo, or raise a TodreError that says what is wrong with them."""
    found: dict[str, Any] = checked(results, DEMO, file)
    for part, inner in (("rows", "accuracy"), ("runs", "hits")):
        for index, each in enumerate(found[part]):
            checked(each[inner], dict.fromkeys(found["tasks"], _kind(part)), file)
            _require_length(each, f"{part}.{index}", found, file)
    return found


def _kind(part: str) -> Value:
    return HITS if part == "runs" else NUMBER


def _require_length(
    each: Mapping[str, Any], where: str, found: Mapping[str, Any], file: Path
) -> None:
    """Raise unless a run holds a hit, and an answer if it has any, for every picture."""
    for key in {"hits", "answers"} & set(each):
        for task in found["tasks"]:
            of_task = each[key].get(task) if isinstance(each[key], dict) else None
            if not isinstance(of_task, list) or len(of_task) != found["num_images"]:
                raise TodreError(
                    f"result {str(file)!r} has {where}.{key}.{task} of other than"
                    f" {found['num_images']} pictures; expected: one for each."
                )


def checked_bench(result: Any, file: Path) -> dict[str, Any]:
    """Return a result of the bench, or raise a TodreError that says what is wrong with it."""
    found: dict[str, Any] = checked(result, BENCH, file)
    for row in found["methods"]:
        if row["measured"]:
            checked(row, _MEASURED, file)
    return found
