"""Calls from several threads, and calls within calls, answer as they do alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from checks import Strides
from tiny import BATCH, ONE, build, inputs_for
from torch import Tensor
from torch._dynamo import eval_frame
from transformers import LogitsProcessor

from llava_todre import hf

STAGE_1 = Strides(retain_ratio=0.25)
STAGE_2 = Strides(retain_ratio=0.25, plan=((9, 3, 0), (8, 5, 2)))
SHORT = {"max_new_tokens": 5, "do_sample": False}
TEXT = [[7], [4]]


def answer(model: Any, samples: list[Any], **options: Any) -> Tensor:
    found: Tensor = model.generate(**inputs_for(model, samples), **SHORT, **options)
    return found


def at_once(*calls: Callable[[], Any], times: int = 4) -> list[list[Any]]:
    with ThreadPoolExecutor(len(calls)) as pool:
        jobs = [[pool.submit(call) for call in calls] for _ in range(times)]
        return [[job.result() for job in row] for row in jobs]


def test_threads_may_ask_one_model() -> None:
    model = build("llava_next")
    with hf.prune(model, STAGE_2):
        calls = [lambda: answer(model, BATCH), lambda: answer(model, ONE)]
        calls.append(lambda: answer(model, TEXT))
        alone = [call() for call in calls]
        for row in at_once(*calls):
            assert all(map(torch.equal, row, alone))
    assert "forward" not in vars(model.model.language_model)
    assert not any(module._forward_hooks for module in model.model.language_model.layers)


def test_threads_may_attach_and_detach_on_one_model() -> None:
    model = build("llava_next")

    def pruned(samples: list[Any]) -> Tensor:
        with hf.prune(model, STAGE_2):
            return answer(model, samples)

    calls = [lambda: pruned(BATCH), lambda: pruned(ONE), lambda: pruned(TEXT)]
    alone = [call() for call in calls]
    for row in at_once(*calls):
        assert all(map(torch.equal, row, alone))
    assert "generate" not in vars(model)


def test_last_stats_are_those_of_the_threads_own_call() -> None:
    model = build("llava_next")
    with hf.prune(model, STAGE_2):

        def lengths(samples: list[Any]) -> list[tuple[int, ...]]:
            answer(model, samples)
            return [stats.prompt_tokens_per_layer for stats in hf.last_stats(model)]

        calls = [functools.partial(lengths, samples) for samples in (BATCH, ONE, TEXT) * 2]
        alone = [call() for call in calls]
        assert len(set(map(str, alone))) == 3
        assert at_once(*calls) == [alone] * 4


def test_threads_with_a_model_each_leave_compilation_as_it_was() -> None:
    models = [build("llava_next"), build("llava")]
    before = eval_frame._stance
    with hf.prune(models[0], STAGE_2), hf.prune(models[1], STAGE_2):
        calls = [lambda: answer(models[0], BATCH), lambda: answer(models[1], ONE)]
        alone = [call() for call in calls]
        for row in at_once(*calls):
            assert all(map(torch.equal, row, alone))
    assert eval_frame._stance == before


class Asking(LogitsProcessor):
    """Asks the model something else before every token."""

    def __init__(self, ask: Callable[[], Tensor]) -> None:
        self.ask, self.answers, self.is_asking = ask, list[Tensor](), False

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if not self.is_asking:
            self.is_asking = True
            self.answers.append(self.ask())
            self.is_asking = False
        return scores


@pytest.mark.parametrize(
    ("family", "samples", "method"),
    [
        ("llava_next", ONE, STAGE_1),
        ("llava_next", TEXT, STAGE_2),
        ("qwen3_vl", TEXT, STAGE_1),
        ("qwen3_vl", ONE, STAGE_2),
    ],
)
def test_a_call_within_a_call(family: str, samples: list[Any], method: Strides) -> None:
    model = build(family)
    with hf.prune(model, method):
        outer, inner = answer(model, BATCH), answer(model, samples)
        asking = Asking(lambda: answer(model, samples))
        assert torch.equal(answer(model, BATCH, logits_processor=[asking]), outer)
    assert len(asking.answers) == SHORT["max_new_tokens"]
    assert all(torch.equal(each, inner) for each in asking.answers)
