"""MMBench-CN without a judging model; lmms-eval does the work."""

from __future__ import annotations

from typing import Any

from lmms_eval.tasks.mmbench import cn_utils


def question(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    """Return the prompt; a missing hint that is spelled "nan" stays out of it, as in English."""
    hint = None if doc["hint"] == "nan" else doc["hint"]
    prompt: str = cn_utils.mmbench_doc_to_text({**doc, "hint": hint}, lmms_eval_specific_kwargs)
    return prompt


def static_score(results: list[dict[str, Any]]) -> float:
    """Return the percentage of questions of which every rotation is answered right."""
    overall, _, _ = cn_utils.mmbench_evaluator.eval_result(results, eval_method="static")
    return 100 * float(overall)
