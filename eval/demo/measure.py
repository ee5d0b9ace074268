"""Accuracy, work and time of the runs, each on the same questions."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from eval.demo.plan import Run
from eval.mini import TASKS, Sample
from llava_todre.model.llava import LlavaLlamaForCausalLM
from llava_todre.vlm import Answer
from llava_todre.work import prefill_work

TIMED_PROMPTS = 24
MAX_NEW_TOKENS = 8
MEANS = ("kept_tokens", "mean_visual_tokens_per_layer", "withdrawn_share", "prefill_flops")
"""What a stored run holds the means of."""
Ask = Callable[..., list[Answer]]
"""``ask(sample, question indices, pruner, **generation options)`` returns the answers."""


def evaluate(
    run: Run, samples: Sequence[Sample], ask: Ask, model: LlavaLlamaForCausalLM, progress: Any
) -> dict[str, Any]:
    """Ask every question of every sample.

    Returns:
        Answers and hits per task, in the order of the samples, and means of the statistics.
    """
    hits: dict[str, list[int]] = {task: [] for task in TASKS}
    said: dict[str, list[str]] = {task: [] for task in TASKS}
    tokens, layer_tokens, flops, withdrawn = [], [], [], []
    for index, sample in enumerate(samples):
        everything = range(len(sample.questions))
        answers = ask(sample, everything, run.pruner(index), max_new_tokens=MAX_NEW_TOKENS)
        for question, given in zip(sample.questions, answers, strict=True):
            hits[question.task].append(int(_same(given.text, question.answer)))
            said[question.task].append(given.text)
            stats = given.stats
            tokens.append(stats.kept_tokens)
            layer_tokens.append(stats.mean_visual_tokens)
            withdrawn.append(stats.withdrawn_from is not None)
            work = prefill_work(model, stats)
            assert work is not None, "our own class is a Llama"
            flops.append(work.flops)
        progress.update(1)
    return {
        "hits": hits,
        "answers": said,
        "kept_tokens": statistics.fmean(tokens),
        "mean_visual_tokens_per_layer": statistics.fmean(layer_tokens),
        "withdrawn_share": statistics.fmean(withdrawn),
        "prefill_flops": statistics.fmean(flops),
    }


def _same(given: str, expected: str) -> bool:
    return given.strip().lower() == expected.strip().lower()


def time_prefill(
    runs: Sequence[Run], samples: Sequence[Sample], ask: Ask
) -> dict[str, dict[str, dict[str, float]]]:
    """Return speed-ups over the unpruned model by run name.

    The runs take turns on every prompt (batch 1, one question per image, after a warm-up), so
    that background load affects all runs equally; each ratio is the median over the prompts.
    """
    timed = [run for run in runs if run.draw == 0]
    ratios: dict[str, dict[str, list[float]]] = {
        run.name: {"prefill": [], "first_token": []} for run in timed
    }
    for index in range(-2, min(TIMED_PROMPTS, len(samples))):
        sample = samples[max(index, 0)]
        spent: dict[str, dict[str, float]] = {}
        for run in timed:
            question = [max(index, 0) % len(sample.questions)]
            stages = ask(sample, question, run.pruner(0), max_new_tokens=1, timed=True)[0].stages_ms
            first = stages["vision"] + stages["selection"] + stages["prefill"]
            spent[run.name] = {"prefill": stages["prefill"], "first_token": first}
        for name, stages in spent.items():
            for stage in stages if index >= 0 else ():
                ratios[name][stage].append(spent[timed[0].name][stage] / stages[stage])
    return {
        name: {stage: _percentiles(values) for stage, values in stages.items()}
        for name, stages in ratios.items()
    }


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=5) if len(values) > 1 else list(values) * 4
    return {
        "median": statistics.median(values),
        "p20": cuts[0],
        "p80": cuts[3],
        "count": len(values),
    }
