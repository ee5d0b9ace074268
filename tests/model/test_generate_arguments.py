"""Arguments of ``generate`` mean the same with our class as with the stock ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from reference import IMAGE
from stock import prompt_for, stock
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from llava_todre import hf
from llava_todre.errors import TodreError
from llava_todre.model.llava import LlavaLlamaForCausalLM
from llava_todre.stage2.prefix import PrefixStore

PROMPTS = [[1, 5, 6, IMAGE, 7, 8, 9, 10, 11], [1, 4, IMAGE, 3, 17, 23]]
SIZES = [(120, 80), (113, 111)]  # (width, height), five views each
METHODS = [("vanilla", {}), ("fastervlm", {"retain_ratio": 0.25})]
METHODS += [("todre", {"retain_ratio": 0.25, "tau": 1.0, "probe_depths": (0.5,)})]


def pixels() -> torch.Tensor:
    return torch.randn(2, 5, 3, 56, 56, generator=torch.Generator().manual_seed(0))


def prompt(rows: slice = slice(None), side: str = "left") -> dict[str, Any]:
    ids = [torch.tensor(row) for row in PROMPTS[rows]]
    padded = pad_sequence(ids, True, 0, padding_side=side)
    return {"inputs": padded, "images": pixels()[rows], "image_sizes": SIZES[rows]}


@pytest.fixture
def model(tiny_llava) -> LlavaLlamaForCausalLM:
    model = tiny_llava()
    model.generation_config.pad_token_id = 0
    return model


@pytest.mark.parametrize(("method", "knobs"), METHODS)
def test_max_length_counts_the_whole_prompt_as_in_stock_models(model, method, knobs):
    model.set_pruner(method, **knobs)
    one, greedy = prompt(slice(1)), {"do_sample": False}
    expected = model.generate(**one, max_new_tokens=9, **greedy)
    whole = model.last_stats[0].unpruned_prompt_tokens
    new = model.generate(**one, max_length=whole + 6, **greedy)
    assert torch.equal(new, expected[:, :6])

    other = stock(model)
    (ids,) = prompt_for(PROMPTS[0], [whole - len(PROMPTS[0]) + 1])
    with hf.prune(other, method, **knobs):
        sizes = torch.tensor([SIZES[0][::-1]])
        output = other.generate(
            input_ids=ids[None], pixel_values=pixels()[:1], image_sizes=sizes,
            max_length=whole + 6, **greedy,
        )  # fmt: skip
    assert torch.equal(output[:, whole:], new)

    config = GenerationConfig(max_length=whole + 6, do_sample=False)
    assert torch.equal(model.generate(**one, generation_config=config), new)
    store = PrefixStore()
    encoded = model.encode_images(pixels()[:1], SIZES[:1])
    again = {**one, "images": encoded, "prefixes": store, "max_length": whole + 6}
    assert torch.equal(model.generate(**again, **greedy), new)
    assert torch.equal(model.generate(**again, **greedy), new)
    assert store.hits == 1
    both = model.generate(**one, max_length=whole + 6, max_new_tokens=3, **greedy)
    assert torch.equal(both, expected[:, :3]), "the number of new tokens wins"
    model.generation_config.max_length = whole + 4
    assert torch.equal(model.generate(**one, **greedy), expected[:, :4])
    for length in (whole, 10):
        with pytest.raises(TodreError, match=f"max_length must be more than the {whole} tokens"):
            model.generate(**one, max_length=length, **greedy)


def test_min_length_counts_the_whole_prompt(model):
    model.set_pruner("todre", retain_ratio=0.25)
    one, greedy = prompt(slice(1)), {"do_sample": False, "max_new_tokens": 12}
    end = int(model.generate(**one, **greedy)[0, 2])
    whole = model.last_stats[0].unpruned_prompt_tokens
    given = {**one, **greedy, "eos_token_id": end}
    late = model.generate(**given, min_new_tokens=9)
    assert late.shape[1] > 9 and torch.equal(model.generate(**given, min_length=whole + 9), late)
    assert model.generate(**given, min_length=whole).shape[1] == 3


def test_the_longest_prompt_of_a_batch_counts(model):
    model.set_pruner("todre", retain_ratio=0.25)
    model.generate(**prompt(), max_new_tokens=1)
    longest = max(stats.unpruned_prompt_tokens for stats in model.last_stats)
    assert model.generate(**prompt(), max_length=longest + 5, do_sample=False).shape[1] == 5


@pytest.mark.parametrize(("method", "knobs"), METHODS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_found_without_a_mask(model, side, method, knobs):
    model.set_pruner(method, **knobs)
    greedy = {"do_sample": False, "max_new_tokens": 5}
    alone = [model.generate(**prompt(slice(row, row + 1)), **greedy) for row in (0, 1)]
    assert torch.equal(model.generate(**prompt(side=side), **greedy), torch.cat(alone))
    assert [stats.text_tokens for stats in model.last_stats] == [8, 5]
    model.generation_config.pad_token_id = None
    model.generate(**prompt(side=side), **greedy)
    assert [stats.text_tokens for stats in model.last_stats] == [8, 8], "nothing marks padding"


def test_numbers_of_other_libraries_are_numbers(model):
    expected = model.generate(**prompt(slice(1)), max_new_tokens=4, num_beams=2, do_sample=False)
    given = {"max_new_tokens": np.int64(4), "num_beams": torch.tensor(2), "top_p": np.float32(0.5)}
    found = model.generate(**prompt(slice(1)), **given, do_sample=np.bool_(False))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_new_tokens": 1.5}, r"max_new_tokens 1\.5 is out of range"),
        ({"max_new_tokens": float("nan")}, "max_new_tokens nan is out of range"),
        ({"max_new_tokens": "5"}, "max_new_tokens '5' is out of range"),
        ({"max_new_tokens": 0}, "max_new_tokens 0 is out of range"),
        ({"max_new_tokens": [5]}, r"max_new_tokens \(5,\) is out of range"),
        ({"max_new_tokens": torch.tensor([5, 6])}, r"max_new_tokens \(5, 6\) is out of range"),
        ({"max_new_tokens": True}, "max_new_tokens True is out of range"),
        ({"max_new_tokens": 10**9}, "max_new_tokens 1000000000 is out of range"),
        ({"num_beams": 100_000}, "num_beams 100000 is out of range"),
        ({"num_return_sequences": 10**6, "do_sample": True}, "num_return_sequences 1000000 is"),
        ({"num_beams": 0}, "num_beams 0 is out of range"),
        ({"top_k": 0.5}, r"top_k 0\.5 is out of range"),
        ({"top_p": 2.0}, r"top_p must be .* got 2\.0"),
        ({"temperature": "hot"}, "temperature must be .* got 'hot'"),
        ({"temperature": float("nan"), "do_sample": True}, "temperature must be .* got nan"),
        ({"temperature": 0.0, "do_sample": True}, r"temperature must be .* got 0\.0"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty must be .* got 0\.0"),
        ({"length_penalty": float("inf")}, "length_penalty must be .* got inf"),
        ({"do_sample": "yes"}, "do_sample 'yes' is unknown; allowed: True, False"),
        ({"eos_token_id": "x"}, "eos_token_id 'x' is out of range"),
        ({"generation_config": GenerationConfig(num_beams=9999)}, "num_beams 9999 is out of range"),
    ],
)
def test_absurd_numbers_are_refused_before_any_work(model, given, message):
    other = stock(model)

    def work(*_: Any) -> None:
        raise AssertionError("the tower has run")

    for each in (model.model.vision_tower, other.model.vision_tower):
        each.register_forward_pre_hook(work)
    with pytest.raises(TodreError, match=message) as caught:
        model.generate(**prompt(), **given)
    assert "\n" not in str(caught.value)
    with hf.prune(other, "todre"), pytest.raises(TodreError, match=message):
        other.generate(torch.tensor([[1, 5]]), **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"inputs": [[1, IMAGE, 2]]}, "input_ids must be a tensor of whole numbers, got list"),
        ({"inputs": torch.tensor([[1, 5]])}, "image"),
        ({"inputs": torch.tensor([[1, IMAGE, IMAGE]])}, "image"),
        ({"modalities": ["audio"]}, "audio"),
        ({"inputs": torch.tensor([[1, IMAGE, -7]])}, "input_ids must be .* to 299, .* got -7"),
        (
            {"inputs": torch.tensor([[1, IMAGE, 300]])},
            "input_ids must be .* to 299, .* got 300",
        ),
        ({"images": torch.zeros(3, 56, 56)}, r"images must be .* got \(\(56, 56\)"),
        ({"images": ["image"]}, "images must be .* got str"),
        ({"images": [None]}, "images must be .* got NoneType"),
        ({"images": [[[0.0]]]}, "images must be .* got list"),
        ({"images": [torch.zeros(5, 4, 56, 56)]}, r"images must be .* got \(\(5, 4, 56, 56\)"),
        ({"images": [torch.zeros(5, 3, 57, 56)]}, r"images must be .* got \(\(5, 3, 57, 56\)"),
        ({"inputs": torch.ones(1, 3)}, r"input_ids must be a tensor .* got torch\.float32"),
        ({"inputs": torch.tensor([1, IMAGE, 2])}, r"input_ids has shape \(3,\)"),
        ({"attention_mask": torch.ones(1, 3)}, r"attention_mask \(1, 3\) does not fit input_ids"),
        ({"attention_mask": [[1] * 9]}, "attention_mask list does not fit input_ids"),
        ({"attention_mask": torch.zeros(1, 9)}, "prompt 0 of the batch has no token"),
        ({"images": 3}, "images must be a tensor or a list, got int"),
        ({"images": [pixels()[0] * float("nan")]}, "pixels that are NaN or Inf"),
        ({"images": [pixels()[0].index_fill(0, torch.tensor(4), torch.inf)]}, "NaN or Inf"),
        ({"images": [pixels()[0].to(torch.uint8)]}, r"floating-point .* torch\.uint8\)"),
        ({"images": [pixels()[0].to(torch.complex64)]}, r"floating-point .* torch\.complex64\)"),
        ({"images": [pixels()[0, :0]]}, r"images must be .* got \(\(0, 3, 56, 56\)"),
        ({"image_sizes": None}, "image_sizes is missing"),
        ({"image_sizes": 3}, "image_sizes 3 is not usable"),
        ({"image_sizes": [3]}, r"image_sizes \[3\] is not usable"),
        ({"image_sizes": ["ab"]}, r"image_sizes \['ab'\] is not usable"),
        ({"image_sizes": [(-3, 20)]}, r"image_sizes \[\(-3, 20\)\] is not usable"),
        ({"image_sizes": [(0, 3)]}, r"image_sizes \[\(0, 3\)\] is not usable"),
        ({"image_sizes": [(float("nan"), 3)]}, "is not usable"),
        ({"image_sizes": [(120.5, 80)]}, "is not usable"),
        ({"image_sizes": [(120, 80)] * 2}, "they must agree"),
    ],
)
def test_prompts_that_are_none_are_refused_in_one_line(model, given, message):
    with pytest.raises(TodreError, match=message) as caught:
        model.generate(**{**prompt(slice(1)), **given}, max_new_tokens=1)
    assert "\n" not in str(caught.value)


def test_a_text_prompt_whose_mask_hides_all_is_refused(model):
    ids = torch.tensor([[1, 5], [1, 6]])
    mask = torch.tensor([[1, 1], [0, 0]])
    other = stock(model)
    with hf.prune(other, "todre"):
        for each in (model, other):
            with pytest.raises(TodreError, match="prompt 1 of the batch has no token"):
                each.generate(ids, attention_mask=mask, max_new_tokens=1)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (None, "image_sizes is missing"),
        ([[80, 120]] * 2, "image_sizes holds 2 sizes, but pixel_values 1 images"),
        ([[0, 120]], "is not usable"),
        ([[80]], "is not usable"),
        ("ab", "is not usable"),
        ([[120, 80]], "72 tokens of its next image, .*, got 70"),  # (width, height)
    ],
)
def test_sizes_of_stock_models_are_checked(model, sizes, message):
    other = stock(model)
    (ids,) = prompt_for(PROMPTS[0], [70])
    with hf.prune(other, "todre"), pytest.raises(TodreError, match=message):
        other.generate(ids[None], pixel_values=pixels()[:1], image_sizes=sizes, max_new_tokens=1)
