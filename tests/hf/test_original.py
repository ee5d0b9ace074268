"""The original ``llava`` package, our own class and transformers', same weights: same answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from reference import IMAGE
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava_todre import hf, load_pretrained_model
from llava_todre.errors import TodreError
from llava_todre.pruners import PRUNERS

llava = pytest.importorskip(
    "llava.model.language_model.llava_llama", reason="needs llava-torch: see the Makefile"
)

GOLDEN = Path(__file__).parents[1] / "golden"
CLIP = GOLDEN / "clip-v16"
METHODS = [name for name in PRUNERS if name not in ("vanilla", "downsample")]  # needs ``resized``
PROMPTS = [[1, 5, 6, IMAGE, 7, 8, 9, 10, 11], [1, 4, IMAGE, 3, 17, 23]]
SIZES = [(120, 80), (113, 111)]  # (width, height), five views each
NEW = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def knobs_of(method: str) -> dict[str, Any]:
    return {"retain_ratio": 0.25} | ({"tau": 0.6} if method.startswith("todre") else {})


def original(model: Any) -> Any:
    """Return the original class with the weights of ours."""
    config = llava.LlavaConfig(**(model.config.to_dict() | {"mm_vision_tower": str(CLIP)}))
    other = llava.LlavaLlamaForCausalLM(config).eval()
    other.get_vision_tower().load_model()
    other.load_state_dict(model.state_dict())
    other.set_attn_implementation("sdpa")
    other.get_vision_tower().vision_tower.set_attn_implementation("sdpa")
    other.generation_config.eos_token_id = None
    return other


@pytest.fixture(scope="module")
def anyres(tiny_llava: Any) -> tuple[Any, Any]:
    model = tiny_llava("sdpa", tokenizer_padding_side="left")
    return model, original(model)


@pytest.fixture
def batch(draw: torch.Generator) -> dict[str, Any]:
    """Prompts of different lengths, one image of five views each."""
    ids = pad_sequence([torch.tensor(row) for row in PROMPTS], True, 0, padding_side="left")
    return {
        "inputs": ids,
        "attention_mask": (ids != 0).long(),
        "images": torch.randn(2, 5, 3, 56, 56, generator=draw),
        "image_sizes": SIZES,
    }


def assert_same(model: Any, other: Any, given: dict[str, Any], method: str, **knobs: Any) -> Any:
    """Compare our class and the original; returns the statistics."""
    knobs = knobs or knobs_of(method)
    model.set_pruner(method, **knobs)
    expected = model.generate(**given, **NEW)
    with hf.prune(other, method, **knobs):
        found = other.generate(**given, **NEW)
        stats = hf.last_stats(other)
    assert torch.equal(found, expected)
    for own, same in zip(model.last_stats, stats, strict=True):
        assert own.prompt_tokens_per_layer == same.prompt_tokens_per_layer
        assert own.visual_tokens_per_layer == same.visual_tokens_per_layer
        for image, twin in zip(own.images, same.images, strict=True):
            assert torch.equal(image.keep_idx, twin.keep_idx)
            assert torch.equal(image.patches, twin.patches)
            assert image.num_newlines == twin.num_newlines
    return stats


@pytest.mark.parametrize("method", METHODS)
def test_methods_keep_the_tokens_that_they_keep_of_our_class(anyres, batch, method):
    stats = assert_same(*anyres, batch, method)
    assert stats[0].mean_visual_tokens < 88


@pytest.mark.parametrize("kind", ["flat", "spatial", "spatial_unpad", "pad"])
def test_every_layout_of_images(tiny_llava, draw, kind):
    merge = {"pad": "flat"}.get(kind, kind)
    model = tiny_llava("sdpa", mm_patch_merge_type=merge, tokenizer_padding_side="left")
    other = original(model)
    rows = [[1, 5, IMAGE, 7, IMAGE, 8, 9], [1, 2, 3, IMAGE, 4]]
    ids = pad_sequence([torch.tensor(row) for row in rows], True, 0, padding_side="left")
    views = (1, 1, 1) if kind == "pad" else (5, 1, 5)
    images: Any = [torch.randn(count, 3, 56, 56, generator=draw) for count in views]
    if kind == "pad":
        images = torch.cat(images)
    given = {"inputs": ids, "attention_mask": (ids != 0).long(), "images": images}
    given["image_sizes"] = [(120, 80), (50, 50), (57, 110)]
    assert_same(model, other, given, "todre")


def test_a_checkpoint_that_the_package_loads_itself(draw):
    path = GOLDEN / "llava-v1.5-tiny"
    tower = {"mm_vision_tower": str(GOLDEN / "clip-v15")}
    other = llava.LlavaLlamaForCausalLM.from_pretrained(path, **tower).eval()
    other.get_vision_tower().load_model()
    _, model, _, _ = load_pretrained_model(path)
    expected = load_file(GOLDEN / "v15_expected.safetensors")
    given = {"inputs": expected["0.input_ids"], "images": torch.randn(1, 3, 56, 56, generator=draw)}
    stats = assert_same(model, other, given, "todre")
    assert 0 < stats[0].kept_tokens < stats[0].visual_tokens


def test_a_mistral_decoder(anyres, batch):
    model, _ = anyres
    mistral = pytest.importorskip("llava.model.language_model.llava_mistral")
    kept = {**model.config.to_dict(), "sliding_window": None, "mm_vision_tower": str(CLIP)}
    kept.pop("model_type")
    other = mistral.LlavaMistralForCausalLM(mistral.LlavaMistralConfig(**kept)).eval()
    other.get_vision_tower().load_model()
    other.load_state_dict(model.state_dict())
    other.generation_config.eos_token_id = None
    assert_same(model, other, batch, "todre")


def test_a_method_that_drops_nothing_leaves_the_call_alone(anyres, batch):
    _, other = anyres
    untouched = other.generate(**batch, **NEW)
    before = dict(vars(other))
    with hf.prune(other, "todre", retain_ratio=1.0, probe_depths=()):
        assert torch.equal(other.generate(**batch, **NEW), untouched)
    with hf.prune(other, "todre", retain_ratio=1.0, tau=0.0):  # takes the way of all others
        pruned = other.generate(**batch, **NEW)
        kept = [stats.kept_tokens == stats.visual_tokens for stats in hf.last_stats(other)]
    assert kept == [True, True]
    assert torch.equal(pruned, untouched)
    assert vars(other) == before


def test_images_stacked_as_single_views_have_no_newlines(anyres, batch):
    _, other = anyres
    given = batch | {"images": batch["images"][:, 0]}
    untouched = other.generate(**given, **NEW)
    with hf.prune(other, "todre", retain_ratio=1.0, tau=0.0):
        assert torch.equal(other.generate(**given, **NEW), untouched)
        assert [stats.visual_tokens for stats in hf.last_stats(other)] == [16, 16]


def test_without_a_mask_every_token_is_real(anyres, batch):
    _, other = anyres
    alone = {"images": batch["images"][:1], "image_sizes": SIZES[:1]}
    with hf.prune(other, "divprune", retain_ratio=0.25):
        other.generate(torch.tensor([[1, 0, 5, IMAGE, 7]]), **alone, **NEW)
        assert hf.last_stats(other)[0].text_tokens == 4


def test_nothing_is_left_when_generate_fails(tiny_llava, batch):
    other = original(tiny_llava("sdpa"))

    def fail(*_: Any, **__: Any) -> None:
        raise KeyError("generate")

    other.generate = fail
    before = dict(vars(other))
    with pytest.raises(KeyError), hf.prune(other, "todre"):
        other.generate(**batch, **NEW)
    assert vars(other) == before


def test_a_prompt_without_an_image_uses_one_up_as_in_the_original(anyres, batch):
    model, other = anyres
    images = batch["images"]
    rows = [[1, 9, 8], PROMPTS[1]]
    ids = pad_sequence([torch.tensor(row) for row in rows], True, 0, padding_side="left")
    given = batch | {"inputs": ids, "attention_mask": (ids != 0).long()}
    with hf.prune(other, "divprune", retain_ratio=0.25):
        other.generate(**given, **NEW)
        stats = hf.last_stats(other)
    model.set_pruner("divprune", retain_ratio=0.25)
    model.generate(torch.tensor([PROMPTS[1]]), images=images[1:], image_sizes=SIZES[1:], **NEW)
    assert stats[0].images == ()
    assert torch.equal(stats[1].images[0].keep_idx, model.last_stats[0].images[0].keep_idx)


def test_the_call_keeps_its_form(anyres, batch):
    _, other = anyres
    alone = {
        "images": batch["images"][:1],
        "image_sizes": SIZES[:1],
    }
    ids = torch.tensor(PROMPTS[:1])
    heard: list[Tensor] = []

    class Ear:
        put, end = heard.append, lambda self: None

    with hf.prune(other, "todre", retain_ratio=0.25, tau=0.9):
        expected = other.generate(ids, **alone, **NEW)
        by_place = other.generate(ids, alone["images"], alone["image_sizes"], **NEW)
        whole = other.generate(
            ids, **alone, **NEW, return_dict_in_generate=True, output_scores=True, streamer=Ear()
        )
        limit = hf.last_stats(other)[0].unpruned_prompt_tokens + 5
        shorter = {"max_length": limit, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(other.generate(ids, **alone, **shorter), expected[:, :5])
        beams = other.generate(ids, **alone, **NEW, num_beams=3)
        text = other.generate(torch.tensor([[1, 5, 7]]), **NEW)
        assert hf.last_stats(other)[0].images == ()
    assert torch.equal(by_place, expected)
    assert torch.equal(whole.sequences, expected)
    assert torch.cat([each.flatten() for each in heard]).tolist() == expected[0].tolist()
    assert beams.shape == expected.shape
    assert torch.equal(text, other.generate(torch.tensor([[1, 5, 7]]), **NEW))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_sizes": None}, "image_sizes is missing"),
        ({"image_sizes": [(120, 80)]}, "image_sizes holds 1 sizes, but images 2 images"),
        ({"image_sizes": [3, 4]}, "image_sizes .* is not usable"),
        ({"images": torch.zeros(1, 5, 3, 56, 56)}, "2 or more '<image>' placeholders, but 1"),
        ({"past_key_values": object()}, "past_key_values is not supported"),
    ],
)
def test_what_does_not_fit_is_one_line(anyres, batch, change, message):
    _, other = anyres
    before = dict(vars(other))
    with pytest.raises(TodreError, match=message) as caught, hf.prune(other, "todre"):
        other.generate(**(batch | change), **NEW)
    assert "\n" not in str(caught.value)
    assert vars(other) == before


def test_a_prompt_that_the_original_cuts_short_is_refused(anyres, batch):
    _, other = anyres
    other.config.tokenizer_model_max_length = 50
    try:
        with pytest.raises(TodreError, match="tokenizer_model_max_length, got 50"):
            with hf.prune(other, "todre"):
                other.generate(**batch, **NEW)
    finally:
        other.config.tokenizer_model_max_length = None


def test_a_tower_that_is_not_loaded_is_refused(tiny_llava):
    config = tiny_llava("sdpa").config.to_dict() | {"mm_vision_tower": str(CLIP)}
    other = llava.LlavaLlamaForCausalLM(llava.LlavaConfig(**config)).eval()
    with pytest.raises(TodreError, match=r"call model.get_vision_tower\(\).load_model\(\) first"):
        with hf.prune(other, "todre"):
            other.generate(torch.tensor(PROMPTS[:1]), images=torch.zeros(1, 5, 3, 56, 56), **NEW)
