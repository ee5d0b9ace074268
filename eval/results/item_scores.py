"""What each item of a benchmark scored, from the sample records lmms-eval writes.

A benchmark says where the number is (``item_metric``):

    exact_match                   the record's value itself
    pope_f1_score.score           a field of it
    lvb_acc.parsed_pred=answer    1 where two fields are equal
    circular                      MMBench: 1 where a question is right in all its rotations
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llava_todre.errors import TodreError

Record = Mapping[str, Any]
CIRCULAR = "circular"
_MMBENCH = "gpt_eval_score"
_ROTATION = 1_000_000
"""MMBench numbers the rotations of question i as i + 1,000,000 and so on."""


def item_scores(item_metric: str, task: str, records: Sequence[Record]) -> list[tuple[int, float]]:
    """Return (doc_id, score between 0 and 1), in ascending order.

    Args:
        item_metric: see above. Records without that metric are of another one (MME's cognition).
        task: for messages.
        records: one per item, in any order.

    Raises:
        TodreError: no record has the metric, or a score is not a number between 0 and 1.
    """
    if item_metric == CIRCULAR:
        return _circular(task, records)
    metric, _, path = item_metric.partition(".")
    own = [record for record in records if metric in record]
    if not own:
        raise TodreError(f"task {task!r}: no sample record has {metric!r}, the metric of an item.")
    scores = sorted((record["doc_id"], _score(task, record, metric, path)) for record in own)
    return scores


def _score(task: str, record: Record, metric: str, path: str) -> float:
    value, (field, equals, other) = record[metric], path.partition("=")
    for name in filter(None, (field, other)):
        if not isinstance(value, Mapping) or name not in value:
            raise TodreError(f"task {task!r}, doc_id {record['doc_id']}: {metric} has no {name!r}.")
    if equals:
        return float(str(value[field]) == str(value[other]))
    number = value[field] if field else value
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 <= number <= 1:
        raise TodreError(
            f"task {task!r}, doc_id {record['doc_id']}: {metric} is {number!r}; "
            "allowed: a number between 0 and 1."
        )
    return float(number)


def _circular(task: str, records: Sequence[Record]) -> list[tuple[int, float]]:
    """Return one score per question; lmms-eval's own evaluator judges its rotations together."""
    try:
        import pandas
        from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator
    except ImportError:
        raise TodreError("MMBench needs lmms-eval and pandas to score its items.") from None
    if any(_MMBENCH not in record for record in records):
        raise TodreError(f"task {task!r}: a sample record has no {_MMBENCH!r}.")
    evaluator = MMBench_Evaluator()
    table = pandas.DataFrame([record[_MMBENCH] for record in records])
    table["prediction"] = table["prediction"].astype(str)
    answers = dict(zip(table["index"], table["answer"], strict=True))
    rotations = dict(tuple(table.groupby(table["index"] % _ROTATION)))
    scores = []
    for record in records:
        index = record[_MMBENCH]["index"]
        if index < _ROTATION:
            right = evaluator.eval_sub_data(rotations[index], answers, static_only=True)
            scores.append((record["doc_id"], float(right)))
    return sorted(scores)
