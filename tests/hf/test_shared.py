"""Stock models: what is shared between questions about an image changes no answer."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from parts import HAS_TORCHVISION, WITHOUT_TORCHVISION, processor_of
from PIL import Image
from tiny import (
    FAMILIES,
    IMAGE_ID,
    TWO_IMAGES,
    USUAL_DECODER,
    VIDEO,
    VIDEO_ID,
    Sample,
    build,
    inputs_for,
    model_of,
)
from torch import Tensor

from eval.pages.models import MATRIX, YES
from llava_todre import hf
from llava_todre.errors import TodreError
from llava_todre.hf.stock import StockModel
from llava_todre.stage2.prefix import PrefixStore
from llava_todre.vlm import ImageCache, Request

STEPS = 6
SHOWN: Sample = [3, (112, 100), 9]
OTHER: Sample = [3, (50, 112), 9]
WITHDRAWING = "todre, withdrawing"
METHODS: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "divprune": {"retain_ratio": 0.25},
    "todre": {"retain_ratio": 0.25, "tau": 0.0},
    WITHDRAWING: {"retain_ratio": 0.25, "tau": 1.0, "probe_depths": (0.5,)},
    "vtw": {},
}
AFRESH: dict[str, dict[str, Any]] = {
    "fastv": {"retain_ratio": 0.25, "layer": 4},
    "trimtokenator": {"retain_ratio": 0.25},
}
TOLERANCE = {"rtol": 0, "atol": 1e-4}


def questions(inputs: dict[str, Any], lengths: list[int], seed: int = 0) -> list[dict[str, Any]]:
    """Return inputs with other words after the image, each a prompt of its own."""
    draw = torch.Generator().manual_seed(seed)
    ids = inputs["input_ids"]
    end = int((ids[0] >= 296).nonzero()[-1]) + 1
    rows = [torch.randint(2, 290, (1, length), generator=draw) for length in lengths]
    found = []
    for row in rows:
        whole = torch.cat([ids[:, :end], row], dim=1)
        found.append(inputs | {"input_ids": whole, "attention_mask": torch.ones_like(whole)})
        if "mm_token_type_ids" in inputs:
            found[-1]["mm_token_type_ids"] = (whole == IMAGE_ID).int() + 2 * (
                whole == VIDEO_ID
            ).int()
    return found


def batched(prompts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return prompts, padded on the left, without what describes their images."""
    return {
        key: torch.nn.utils.rnn.pad_sequence(
            [prompt[key][0] for prompt in prompts], True, 0, padding_side="left"
        )
        for key in ("input_ids", "attention_mask")
    }


def answered(model: Any, given: dict[str, Any], **more: Any) -> tuple[Tensor, Tensor]:
    """Return (B, steps) tokens and (B, steps, vocabulary) logits."""
    output = model.generate(
        **given, **more, do_sample=False, max_new_tokens=STEPS, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    return output.sequences[:, -STEPS:], torch.stack(output.logits, dim=1)


def asked_afresh(model: Any, prompts: list[dict[str, Any]]) -> tuple[Tensor, Tensor, list[Any]]:
    found, stats = [], []
    for prompt in prompts:
        found.append(answered(model, prompt))
        stats += hf.last_stats(model)
    tokens, logits = (torch.cat(each) for each in zip(*found, strict=True))
    return tokens, logits, stats


@pytest.mark.parametrize(
    ("attention", "name"),
    [
        *zip(("sdpa", "eager", "sdpa", "sdpa", "eager"), METHODS, strict=True),
        ("eager", WITHDRAWING),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_questions_about_an_image_are_answered_as_if_each_were_the_first(family, name, attention):
    model = model_of(family, attention)
    prompts = questions(inputs_for(model, [SHOWN]), [9, 4, 1, 12])
    with hf.prune(model, name.split(",")[0], **METHODS[name]):
        tokens, logits, stats = asked_afresh(model, prompts)
        (image,) = hf.encode(model, **prompts[0])
        store = PrefixStore()
        for batch in ([0], [1, 2], [0, 1, 2, 3]):
            given = batched([prompts[index] for index in batch])
            shared = answered(model, given, encoded=[image] * len(batch), prefixes=store)
            assert torch.equal(shared[0], tokens[batch])
            torch.testing.assert_close(shared[1], logits[batch], **TOLERANCE)
            for ours, index in zip(hf.last_stats(model), batch, strict=True):
                theirs = stats[index]
                assert ours.prompt_tokens_per_layer == theirs.prompt_tokens_per_layer
                assert [each.keep_idx.tolist() for each in ours.images] == [
                    each.keep_idx.tolist() for each in theirs.images
                ]
        assert (len(store), store.hits) == (1, 6)


@pytest.mark.parametrize("method", ["divprune", WITHDRAWING])
@pytest.mark.parametrize("family", FAMILIES)
def test_images_of_different_lengths_share_a_batch(family, method):
    model = model_of(family)
    shown = [inputs_for(model, [piece]) for piece in (SHOWN, OTHER)]
    one, other = (questions(inputs, [9, 3], seed) for seed, inputs in enumerate(shown))
    prompts = [one[0], other[0], one[1], other[1]]
    with hf.prune(model, method.split(",")[0], **METHODS[method]):
        tokens, logits, _ = asked_afresh(model, prompts)
        images = [hf.encode(model, **prompt)[0] for prompt in prompts[:2]]
        store = PrefixStore(max_prefixes=2)
        shared = answered(model, batched(prompts), encoded=images * 2, prefixes=store)
    assert torch.equal(shared[0], tokens) and store.hits == 2
    torch.testing.assert_close(shared[1], logits, **TOLERANCE)


@pytest.mark.parametrize("family", [name for name in FAMILIES if MATRIX[name]["video"] == YES])
@pytest.mark.parametrize("sample", [*VIDEO, *TWO_IMAGES], ids=["video", "two images"])
def test_videos_and_several_images_are_shared(family, sample):
    model = model_of(family)
    prompts = questions(inputs_for(model, [sample]), [5, 8])
    with hf.prune(model, "divprune", retain_ratio=0.25):
        tokens, logits, _ = asked_afresh(model, prompts)
        images, store = hf.encode(model, **prompts[0]), PrefixStore()
        shared = answered(model, batched(prompts), encoded=images * 2, prefixes=store)
    assert torch.equal(shared[0], tokens) and store.hits == 1
    torch.testing.assert_close(shared[1], logits, **TOLERANCE)


@pytest.mark.parametrize("method", AFRESH)
@pytest.mark.parametrize("family", ["llava_next", "qwen3_vl"])
def test_methods_that_read_the_question_share_the_encoding_only(family, method):
    model = model_of(family)
    prompts = questions(inputs_for(model, [SHOWN]), [9, 4])
    with hf.prune(model, method, **AFRESH[method]):
        tokens, logits, _ = asked_afresh(model, prompts)
        (image,), store = hf.encode(model, **prompts[0]), PrefixStore()
        shared = answered(model, batched(prompts), encoded=[image] * 2, prefixes=store)
    assert torch.equal(shared[0], tokens) and len(store) == 0
    torch.testing.assert_close(shared[1], logits, **TOLERANCE)


@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"use_cache": False}])
def test_settings_that_rearrange_the_cache_work_without_the_store(settings):
    model = model_of("llava_next")
    prompts = questions(inputs_for(model, [SHOWN]), [5, 5])
    more = {"max_new_tokens": 4, "do_sample": False, **settings}
    with hf.prune(model, "divprune", retain_ratio=0.25):
        fresh = [model.generate(**prompt, **more)[:, -4:] for prompt in prompts]
        (image,), store = hf.encode(model, **prompts[0]), PrefixStore()
        shared = model.generate(**batched(prompts), **more, encoded=[image] * 2, prefixes=store)
    assert torch.equal(shared[:, -4:], torch.cat(fresh)) and len(store) == 0


def test_a_store_belongs_to_one_model():
    store = PrefixStore()
    for family, fails in (("llava", False), ("llava_next", True)):
        model = model_of(family)
        (prompt,) = questions(inputs_for(model, [SHOWN]), [5])
        with hf.prune(model, "divprune", retain_ratio=0.25):
            given = batched([prompt]) | {"encoded": hf.encode(model, **prompt), "prefixes": store}
            if fails:
                with pytest.raises(TodreError, match="must be of one model"):
                    answered(model, given)
            else:
                answered(model, given)


# ---------------------------------------------------------------- requests


def pictures(count: int) -> list[Image.Image]:
    draw = np.random.default_rng(3)
    sizes = [(112, 90), (60, 112), (100, 100)][:count]
    return [Image.fromarray(draw.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


QUESTIONS = ["What is this?", "How many?", "Is it a <b>?", "Where?"]


NEEDS_TORCHVISION = pytest.mark.skipif(not HAS_TORCHVISION, reason="its processor needs it")


@pytest.mark.parametrize("method", ["vanilla", WITHDRAWING, "trimtokenator"])
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name in WITHOUT_TORCHVISION else NEEDS_TORCHVISION)
        for name in FAMILIES
    ],
)
def test_requests_share_what_they_show(family, method, monkeypatch):
    model = StockModel(copy.deepcopy(model_of(family)), processor_of(family))
    model.set_pruner(method.split(",")[0], **(METHODS | AFRESH)[method])
    requests = [Request(text, [picture]) for picture in pictures(2) for text in QUESTIONS]
    requests += [Request("Which?", pictures(3)[1:]), Request("Which one then?", pictures(3)[1:])]
    requests.append(Request("Nothing to see."))
    if MATRIX[family]["video"] == YES:
        frames = [picture.resize((84, 84)) for picture in pictures(2)] * 2
        seconds = [0.0, 1.0, 2.0, 3.0]
        requests += [Request(text, frames, True, seconds) for text in QUESTIONS[:2]]
    expected = [model.answer([request], max_new_tokens=5)[0] for request in requests]
    processed: list[int] = []
    process = model._inputs
    monkeypatch.setattr(model, "_inputs", lambda r: processed.append(len(r)) or process(r))
    for size, max_images in ((1, 4), (4, 1)):
        memory = ImageCache(max_images)
        found = []
        for start in range(0, len(requests), size):
            batch = requests[start : start + size]
            found += model.answer(batch, max_new_tokens=5, image_cache=memory)
        assert [each.text for each in found] == [each.text for each in expected]
        for ours, theirs in zip(found, expected, strict=True):
            kept = [[image.keep_idx.tolist() for image in e.stats.images] for e in (ours, theirs)]
            assert kept[0] == kept[1]
    videos = 2 if MATRIX[family]["video"] == YES else 0
    assert len(processed) <= 2 * (2 + 2 + 1 + videos), "images that are known are not processed"
    if method != "trimtokenator":
        assert memory.prefixes.hits >= 6


def test_what_fresh_calls_refuse_is_refused():
    model = StockModel(copy.deepcopy(model_of("llava_next")), processor_of("llava_next"))
    model.set_pruner("divprune", retain_ratio=0.25)
    requests, memory = [Request("What is this?", pictures(1))], ImageCache()
    with pytest.raises(TodreError, match="prompt_lookup_num_tokens is not supported"):
        model.answer(requests, image_cache=memory, prompt_lookup_num_tokens=2)
    with pytest.raises(TodreError, match="prefixes is given without encoded"):
        model.model.generate(torch.tensor([[1, 5]]), prefixes=memory.prefixes)
    with pytest.raises(TodreError, match="image_cache must be an ImageCache, got dict"):
        model.answer(requests, image_cache={})


def test_an_image_is_encoded_for_its_method():
    model = model_of("llava_next")
    (prompt,) = questions(inputs_for(model, [SHOWN]), [5])
    with hf.prune(model, "divprune", retain_ratio=0.25):
        images = hf.encode(model, **prompt)
    with hf.prune(model, "fastervlm"), pytest.raises(TodreError, match="cls_attention"):
        answered(model, batched([prompt]), encoded=images)
    with (
        hf.prune(model, "divprune"),
        pytest.raises(TodreError, match="the 0 tokens of its next image"),
    ):
        answered(model, batched([prompt]), encoded=[])


def test_encoded_images_are_all_that_a_prompt_shows():
    model = model_of("qwen2_5_vl")
    (prompt,) = questions(inputs_for(model, [SHOWN]), [5])
    with hf.prune(model, "divprune", retain_ratio=0.25):
        images = hf.encode(model, **prompt)
        expected = answered(model, batched([prompt]), encoded=images)
        wrong = prompt | {"image_grid_thw": prompt["image_grid_thw"] * 2}
        wrong = {key: wrong[key] for key in wrong if key != "pixel_values"}
        assert torch.equal(answered(model, wrong, encoded=images)[1], expected[1])
        with pytest.raises(TodreError, match="pixel_values is not supported together with encoded"):
            answered(model, prompt, encoded=images)
        with pytest.raises(TodreError, match="encoded must hold the 1 images .* got 2"):
            answered(model, batched([prompt]), encoded=images * 2)


def test_what_is_no_encoded_image_is_one_line():
    model = model_of("llava_next")
    (prompt,) = questions(inputs_for(model, [SHOWN]), [5])
    with hf.prune(model, "divprune", retain_ratio=0.25):
        images = hf.encode(model, **prompt)
        for call, message in (
            (lambda: hf.encode(model), "input_ids must be those of one prompt, .* got NoneType"),
            (
                lambda: hf.encode(model, **batched([prompt, prompt])),
                r"of one prompt, \(1, L\), got \(2, \d+\)",
            ),
            (
                lambda: answered(model, batched([prompt]), encoded=["x"]),
                "encoded must hold what encode returns, got 'x'",
            ),
            (
                lambda: answered(model, batched([prompt]), encoded=images, prefixes=ImageCache()),
                "prefixes must be a PrefixStore .* got ImageCache",
            ),
        ):
            with pytest.raises(TodreError, match=message):
                call()


def test_an_encoded_image_and_a_prefix_hold_nothing_of_the_prompt_they_came_with():
    model = model_of("llava_next")
    (prompt,) = questions(inputs_for(model, [SHOWN]), [5])
    store = PrefixStore()
    with hf.prune(model, "divprune", retain_ratio=0.25):
        images = hf.encode(model, **prompt)
        answered(model, batched([prompt]), encoded=images, prefixes=store)
    newline = images[0].features.newline
    assert newline is not None and newline.untyped_storage().nbytes() == newline.nbytes
    assert len(store) == 1 and all(len(prefix.embeds) == 0 for prefix, _ in store._stored)


def test_the_seconds_of_a_video_are_those_of_its_encoding():
    model = model_of("qwen2_5_vl")
    (prompt,) = questions(inputs_for(model, [[3, "video", 6]]), [5])
    store = PrefixStore()
    with hf.prune(model, "divprune", retain_ratio=0.25):
        for seconds in (0.5, 4.0):
            prompt["second_per_grid_ts"] = torch.tensor([seconds])
            _, logits, _ = asked_afresh(model, [prompt])
            video = hf.encode(model, **prompt)
            shared = answered(model, batched([prompt]), encoded=video, prefixes=store)
            torch.testing.assert_close(shared[1], logits, **TOLERANCE)
    assert store.hits == 0


def test_an_array_painted_over_is_another_image_and_text_takes_no_place():
    model = StockModel(copy.deepcopy(model_of("llava_next")), processor_of("llava_next"))
    shown, memory = np.asarray(pictures(1)[0]).copy(), ImageCache()
    requests = [Request("What is this?", [shown]), Request("Nothing to see.")]
    for expected_hits in (0, 1, 1):
        fresh = [model.answer([request], max_new_tokens=5)[0].text for request in requests]
        ours = [
            model.answer([request], max_new_tokens=5, image_cache=memory)[0].text
            for request in requests
        ]
        assert ours == fresh and memory.prefixes.hits == expected_hits
        if expected_hits:
            shown[:] = 255 - shown


@pytest.mark.parametrize("family", ["llava_onevision", "qwen3_vl"])
def test_half_precision_is_shared_too(family):
    model = build(family, USUAL_DECODER.get(family)).bfloat16()
    prompts = questions(inputs_for(model, [SHOWN]), [9, 4])
    for prompt in prompts:
        prompt["pixel_values"] = prompt["pixel_values"].bfloat16()
    with hf.prune(model, "todre", **METHODS[WITHDRAWING]):
        _, logits, _ = asked_afresh(model, prompts)
        (image,), store = hf.encode(model, **prompts[0]), PrefixStore()
        for prompt, expected in zip(prompts, logits, strict=True):
            _, found = answered(model, batched([prompt]), encoded=[image], prefixes=store)
            assert (found[:, 0].float() - expected[0].float()).abs().max() < 0.1
    assert store.hits == 1


def test_one_cache_serves_threads_and_survives_a_failure():
    model = StockModel(copy.deepcopy(model_of("llava_next")), processor_of("llava_next"))
    model.set_pruner("todre", **METHODS[WITHDRAWING])
    requests = [Request(text, [image]) for image in pictures(2) for text in QUESTIONS]
    memory = ImageCache()

    def call(request: Request, **cached: Any) -> str:
        return model.answer([request], max_new_tokens=5, **cached)[0].text

    expected = [call(request) for request in requests]

    def fail(*_: Any) -> None:
        raise KeyError("mlp")

    for failing in (0, 5):  # while the prefix is computed, and when the rest runs
        layer = model.decoder.layers[failing].mlp.register_forward_hook(fail)
        with pytest.raises(KeyError, match="mlp"):
            call(requests[0], image_cache=memory)
        layer.remove()
        assert call(requests[1], image_cache=memory) == expected[1]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda request: call(request, image_cache=memory), requests))
    assert found == expected
