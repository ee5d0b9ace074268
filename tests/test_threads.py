"""Threads that share a model of ours: each call answers, and counts, as it does alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Event, Thread
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import LogitsProcessor, TextIteratorStreamer

from llava_todre import ImageCache, Request, TodreError, answer, ask, load_pretrained_model, prepare
from llava_todre.model.llava import LlavaLlamaForCausalLM
from llava_todre.model.prompt import build_prompt, tokenizer_image_token
from llava_todre.stats import PruneStats

GOLDEN = Path(__file__).parent / "golden"
THREADS = 6
FEW: dict[str, Any] = {"max_new_tokens": 3}
QUESTIONS = ["what is in this picture", "how many cat is left ?", "yes or no"]
METHODS = [
    ("todre", {"retain_ratio": 0.25, "tau": 0.38}),
    ("todre_v1", {"retain_ratio": 0.5, "tau": 0.38}),
    ("fastv", {"retain_ratio": 0.25, "layer": 1}),
    ("vanilla", {}),
]


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, LlavaLlamaForCausalLM]:
    tokenizer, model, _, _ = load_pretrained_model(GOLDEN / "llava-v1.6-tiny")
    return tokenizer, model


@pytest.fixture(scope="module")
def requests(loaded: tuple[Any, LlavaLlamaForCausalLM]) -> list[Request]:
    images = [Image.open(GOLDEN / f"v16_{i}.png").convert("RGB") for i in range(2)]
    asked = [Request(text, [image]) for text in QUESTIONS for image in images]
    return [prepare(loaded[1], request) for request in asked]


Told = tuple[str, dict[str, Any]]


def told(text: str, stats: PruneStats) -> Told:
    """Return everything an answer says, with the probes to as many digits as sums keep."""
    facts = stats.as_dict()
    for probe in facts["probes"]:
        for key in ("text_to_visual", "visual_to_text"):
            probe[key] = None if probe[key] is None else round(probe[key], 5)
    return text, facts


def at_once(call: Callable[[int], Any], times: int) -> list[list[Any]]:
    """Return what the call gives for 0, 1, ..., in as many threads, each several times."""
    start = Barrier(THREADS)

    def run(number: int) -> list[Any]:
        start.wait()
        return [call(number) for _ in range(times)]

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(run, range(THREADS)))


@pytest.mark.parametrize(("method", "knobs"), METHODS)
def test_answers_carry_their_own_statistics(
    loaded: tuple[Any, LlavaLlamaForCausalLM],
    requests: list[Request],
    method: str,
    knobs: dict[str, Any],
) -> None:
    tokenizer, model = loaded
    model.set_pruner(method, **knobs)

    def call(number: int) -> Told:
        (given,) = answer(model, tokenizer, [requests[number]], **FEW)
        return told(given.text, given.stats)

    alone = [call(number) for number in range(THREADS)]
    assert len({str(one) for one in alone}) == THREADS, "calls can be told apart"
    assert at_once(call, 2) == [[one] * 2 for one in alone]


def prompt_of(loaded: tuple[Any, LlavaLlamaForCausalLM], request: Request) -> dict[str, Any]:
    """Return arguments of ``generate``."""
    text = build_prompt(request.question, 1)
    (views,) = request.images
    return {
        "inputs": tokenizer_image_token(text, loaded[0], return_tensors="pt")[None],
        "images": [views.pixels],
        "image_sizes": [views.size],
        "do_sample": False,
        **FEW,
    }


def test_last_stats_are_those_of_the_threads_own_call(
    loaded: tuple[Any, LlavaLlamaForCausalLM], requests: list[Request]
) -> None:
    _, model = loaded
    model.set_pruner("todre", retain_ratio=0.25, tau=0.38)

    def call(number: int) -> Told:
        new = model.generate(**prompt_of(loaded, requests[number]))
        return told(str(new.tolist()), model.last_stats[0])

    alone = [call(number) for number in range(THREADS)]
    assert at_once(call, 2) == [[one] * 2 for one in alone]
    assert told(alone[-1][0], model.last_stats[0]) == alone[-1], "not those of the threads"


def test_threads_share_a_memory(
    loaded: tuple[Any, LlavaLlamaForCausalLM], requests: list[Request]
) -> None:
    tokenizer, model = loaded
    model.set_pruner("todre", retain_ratio=0.25)
    cache = ImageCache(max_images=2)

    def call(number: int) -> Told:
        given = answer(model, tokenizer, [requests[number]], image_cache=cache, **FEW)
        return told(given[0].text, given[0].stats)

    alone = [call(number) for number in range(THREADS)]
    assert at_once(call, 1) == [[one] for one in alone]


def test_a_streamer_is_read_while_another_thread_generates(
    loaded: tuple[Any, LlavaLlamaForCausalLM], requests: list[Request]
) -> None:
    tokenizer, model = loaded
    fresh = copy.deepcopy(model)  # as if this thread had made no call
    fresh.set_pruner("todre", retain_ratio=0.25)
    streamer = TextIteratorStreamer(tokenizer, timeout=60)
    options = {**prompt_of(loaded, requests[0]), "streamer": streamer}
    writer = Thread(target=fresh.generate, kwargs=options)
    writer.start()
    text = "".join(streamer)
    writer.join()
    assert fresh.last_stats[0].kept_tokens > 0, "the last call of any thread"
    assert text == tokenizer.decode(fresh.generate(**prompt_of(loaded, requests[0]))[0])


class Meanwhile(LogitsProcessor):
    """Does something else before the first token, when the prompt has been read."""

    def __init__(self, act: Callable[[], Any]) -> None:
        self.acts = [act]

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if self.acts:
            self.acts.pop()()
        return scores


def test_a_call_within_a_call_leaves_the_statistics_of_the_outer_one(
    loaded: tuple[Any, LlavaLlamaForCausalLM], requests: list[Request]
) -> None:
    tokenizer, model = loaded
    model.set_pruner("todre", retain_ratio=0.25)
    inner: list[Any] = []
    again = Meanwhile(
        lambda: inner.extend(answer(model, tokenizer, requests[1:2], timed=True, **FEW))
    )
    (alone,) = answer(model, tokenizer, requests[:1], timed=True, **FEW)
    (outer,) = answer(model, tokenizer, requests[:1], timed=True, **FEW, logits_processor=[again])
    assert told(outer.text, outer.stats) == told(alone.text, alone.stats)
    assert told(outer.text, model.last_stats[0]) == told(alone.text, alone.stats)
    assert inner[0].stats.images[0].num_tokens != outer.stats.images[0].num_tokens
    assert set(outer.stages_ms) == set(inner[0].stages_ms) == set(alone.stages_ms)


def test_another_method_waits_until_the_call_has_ended(
    loaded: tuple[Any, LlavaLlamaForCausalLM], requests: list[Request]
) -> None:
    tokenizer, model = loaded
    model.set_pruner("todre", retain_ratio=0.25)
    done = Event()

    def change() -> None:
        model.set_pruner("vanilla")
        done.set()

    other = Thread(target=change)
    waits: list[bool] = []

    def start() -> None:
        other.start()
        waits.append(not done.wait(0.05))

    (given,) = answer(model, tokenizer, requests[:1], logits_processor=[Meanwhile(start)], **FEW)
    other.join()
    assert waits == [True] and given.stats.kept_tokens < given.stats.visual_tokens


def test_a_call_that_fails_lets_the_next_one_in(
    loaded: tuple[Any, LlavaLlamaForCausalLM], requests: list[Request]
) -> None:
    tokenizer, model = loaded
    model.set_pruner("todre", retain_ratio=0.25)

    def fail() -> None:
        raise KeyError("not ours")

    with pytest.raises(KeyError):
        answer(model, tokenizer, requests[:1], logits_processor=[Meanwhile(fail)], **FEW)
    with pytest.raises(TodreError):
        ask(model, tokenizer, "nowhere.png", "what")
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(answer, model, tokenizer, requests[:1], **FEW)
        assert job.result(timeout=60)[0].stats.kept_tokens


@torch.no_grad()
def test_queries_of_another_threads_forward_are_not_overheard(
    loaded: tuple[Any, LlavaLlamaForCausalLM], requests: list[Request]
) -> None:
    """``forward`` is not serialised: it may run between a probed layer and its probe."""
    _, model = loaded
    model.set_pruner("todre_v1", retain_ratio=0.5, tau=0.38)
    prompt = prompt_of(loaded, requests[0])
    model.generate(**prompt)
    expected = told("", model.last_stats[0])
    layer = model.model.layers[max(probe.layer for probe in model.last_stats[0].probes)]

    def disturb(*_: Any) -> None:
        handle.remove()
        other = Thread(target=layer.self_attn.q_proj, args=(torch.randn(1, 400, 64),))
        other.start()
        other.join()

    handle = layer.register_forward_hook(disturb)
    model.generate(**prompt)
    assert told("", model.last_stats[0]) == expected
