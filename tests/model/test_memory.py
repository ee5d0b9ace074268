"""What pruning drops leaves the memory: before the decoder starts, and from its KV cache."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eval.bench.memory import peak_mib
from eval.bench.roofline import kv_bytes
from eval.mini.heldout import held_out
from llava_todre import ask as ask_question
from llava_todre import load_pretrained_model
from llava_todre.model.llava import LlavaLlamaForCausalLM
from llava_todre.stage2 import PrunedCache

MINI = Path(__file__).parents[2] / "checkpoints" / "mini"
VIEWS, PATCHES = 5, 80
"""80 patch tokens; no other size of the tiny model is a multiple of it."""
METHODS = {
    "todre": {"retain_ratio": 0.2, "probe_depths": ()},
    "todre, withdrawn": {"retain_ratio": 0.2, "tau": 1.0, "probe_depths": (0.5,)},
    "fastv": {"retain_ratio": 0.2},
    "pyramiddrop": {"retain_ratio": 0.125},
    "vanilla": {},
}


@pytest.fixture
def model(tiny_llava: Callable[..., LlavaLlamaForCausalLM]) -> LlavaLlamaForCausalLM:
    return tiny_llava(mm_patch_merge_type="spatial", image_grid_pinpoints=[[112, 112]])


def ask(model: LlavaLlamaForCausalLM, new_tokens: int = 1, **kwargs: Any) -> None:
    """Answer a question about a picture that nobody but the call has encoded."""
    draw = torch.Generator().manual_seed(0)
    pixels = [torch.randn(VIEWS, 3, 56, 56, generator=draw)]
    ids = torch.tensor([[1, 5, 9, -200, 7, 8, 11]])
    kwargs |= {"images": pixels, "image_sizes": [(112, 112)], "do_sample": False}
    model.generate(ids, max_new_tokens=new_tokens, min_new_tokens=new_tokens, **kwargs)


def living_tensors(but: list[Tensor] | None = None) -> list[Tensor]:
    """Return all tensors there are, but for some."""
    gc.collect()
    others = {id(each) for each in but or ()}
    tensors = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
    return [each for each in tensors if id(each) not in others]


def unpruned_tensors(before: list[Tensor]) -> list[tuple[int, ...]]:
    """Return the shapes of all new float tensors with a row per unpruned token."""
    tensors = living_tensors(before)
    shapes = [tuple(each.shape) for each in tensors if each.is_floating_point()]
    return [shape for shape in shapes if PATCHES in shape or shape[:2] == (VIEWS, 16)]


@pytest.mark.parametrize("method", ["todre", "random", "divprune", "visionzip", "fastervlm"])
def test_no_unpruned_token_is_alive_when_the_decoder_starts(
    model: LlavaLlamaForCausalLM, method: str
) -> None:
    alive: list[list[tuple[int, ...]]] = []
    before = living_tensors()
    model.model.layers[0].register_forward_pre_hook(
        lambda *_: alive.append(unpruned_tensors(before))
    )
    model.set_pruner(method, retain_ratio=0.2)
    ask(model)
    assert alive == [[]]


def test_nor_when_a_question_comes_with_its_picture() -> None:
    tokenizer, model, _, _ = load_pretrained_model(MINI)
    model.set_pruner("todre", retain_ratio=0.2)
    (sample,) = held_out(1)
    alive: list[list[tuple[int, ...]]] = []
    before, unpruned = living_tensors(), (320, model.config.hidden_size)

    def living(*_: Any) -> None:
        shapes = [tuple(each.shape) for each in living_tensors(before)]
        alive.append([shape for shape in shapes if shape == unpruned])

    model.model.layers[0].register_forward_pre_hook(living)
    ask_question(model, tokenizer, sample.image, sample.questions[0].text, max_new_tokens=1)
    assert alive == [[]]


def test_the_search_for_living_tensors_finds_those_that_are_alive(
    model: LlavaLlamaForCausalLM,
) -> None:
    alive: list[list[tuple[int, ...]]] = []
    encode = model.model.encode
    kept = []

    def keep(*args: Any) -> Any:
        kept.append(encode(*args))
        return kept[-1]

    model.model.encode = keep
    before = living_tensors()
    model.model.layers[0].register_forward_pre_hook(
        lambda *_: alive.append(unpruned_tensors(before))
    )
    model.set_pruner("random", retain_ratio=0.2)
    ask(model)
    assert alive == [[(PATCHES, 64)]]


@pytest.mark.parametrize("name", METHODS)
def test_the_cache_takes_the_bytes_that_the_statistics_say(
    model: LlavaLlamaForCausalLM, name: str
) -> None:
    model.set_pruner(name.partition(",")[0], **METHODS[name])
    for new_tokens in (1, 4):
        cache = PrunedCache(model.config)
        ask(model, new_tokens, past_key_values=cache)
        (stats,) = model.last_stats
        tokens = [count + new_tokens - 1 for count in stats.prompt_tokens_per_layer]
        per_layer = [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]
        # keys and values, two key heads of width 16, float32
        assert per_layer == [2 * 2 * 16 * 4 * count for count in tokens]
        assert cache.num_bytes == kv_bytes(model.decoder_shape, tokens, 4) == sum(per_layer)
    assert (len(set(per_layer)) == 1) == (name in ("todre", "vanilla"))


def test_the_peak_counts_what_lives_at_the_same_time() -> None:
    model = torch.nn.Linear(256, 256, bias=False)
    mib = 1024**2

    def one_by_one() -> None:
        for _ in range(3):
            torch.ones(mib)  # 4 MiB, released at once

    def together() -> None:
        _ = [torch.ones(mib) for _ in range(3)]

    assert peak_mib(one_by_one, model) == pytest.approx(4.25, abs=0.01)
    assert peak_mib(together, model) == pytest.approx(12.25, abs=0.01)


def test_pruning_lowers_the_peak(model: LlavaLlamaForCausalLM) -> None:
    peaks = []
    for ratio in (1.0, 0.2):
        model.set_pruner("random", retain_ratio=ratio)
        ask(model)
        peaks.append(peak_mib(lambda: ask(model), model))
    assert peaks[1] < peaks[0]
