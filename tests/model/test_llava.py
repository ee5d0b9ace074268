"""From ids and pixels to a prompt of embeddings: the way of the data through the whole model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import reference
import torch
from reference import IMAGE
from torch import Tensor
from transformers import DynamicCache

from llava_todre.errors import TodreError
from llava_todre.model.llava import LlavaLlamaForCausalLM
from llava_todre.pruners import Random
from llava_todre.spans import VisualTokens
from llava_todre.stage1.anyres import anyres_grid_shape

SIZES = [(120, 80), (64, 150), (113, 111), (201, 60), (33, 110), (40, 30)]


def pixels_of(model: LlavaLlamaForCausalLM, size: tuple[int, int], seed: int = 0) -> Tensor:
    """Return random views (V, 3, 56, 56) of an image of ``size``."""
    columns, rows = anyres_grid_shape(size, model.config.image_grid_pinpoints, 56)
    generator = torch.Generator().manual_seed(seed + size[0])
    return torch.randn(1 + columns * rows, 3, 56, 56, generator=generator)


@torch.no_grad()
def merged(model: LlavaLlamaForCausalLM, pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Return all visual tokens of one image, moved as the original moves them."""
    projected = model.model.mm_projector(model.get_vision_tower()(pixels).patches)
    grid = anyres_grid_shape(size, model.config.image_grid_pinpoints, 56)
    merge_type = model.config.mm_patch_merge_type
    newline = model.model.image_newline if "unpad" in merge_type else projected[0, 0]
    return reference.merge_views(projected, grid, size, merge_type, newline.detach())


@torch.no_grad()
def prepare(model: LlavaLlamaForCausalLM, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return the embeddings of prompts."""
    mask, labels = kwargs.pop("attention_mask", None), kwargs.pop("labels", None)
    prepared = model.prepare_inputs_labels_for_multimodal(
        ids, None, mask, None, labels, *args, **kwargs
    )
    return prepared[4]


def spliced(model: LlavaLlamaForCausalLM, ids: list[int], visuals: list[Tensor]) -> Tensor:
    return reference.splice(model.get_input_embeddings().weight.detach(), ids, visuals)[0]


# ---------------------------------------------------------------- merging and splicing


@pytest.mark.parametrize("merge_type", ["flat", "spatial", "spatial_unpad"])
@pytest.mark.parametrize("size", SIZES)
def test_unpruned_prompts_are_those_of_the_original(tiny_llava, size, merge_type):
    model = tiny_llava(mm_patch_merge_type=merge_type)
    pixels = pixels_of(model, size)
    ids = [1, 5, 6, IMAGE, 7, 8]
    embeds = prepare(model, torch.tensor([ids]), [pixels], [size])
    expected = spliced(model, ids, [merged(model, pixels, size)])
    torch.testing.assert_close(embeds[0], expected, rtol=0, atol=1e-6)


def test_several_images_go_to_their_places_in_order(tiny_llava):
    model = tiny_llava()
    sizes = SIZES[:3]
    pixels = [pixels_of(model, size) for size in sizes]
    prompts = [[1, IMAGE, 5, 6, IMAGE, 7], [1, 9, IMAGE, 8, 4, 3]]
    embeds = prepare(model, torch.tensor(prompts), pixels, sizes, padding_side="left")
    visuals = [merged(model, *image) for image in zip(pixels, sizes, strict=True)]
    first, second = spliced(model, prompts[0], visuals[:2]), spliced(model, prompts[1], visuals[2:])
    torch.testing.assert_close(embeds[0, -len(first) :], first, rtol=0, atol=1e-6)
    torch.testing.assert_close(embeds[1, -len(second) :], second, rtol=0, atol=1e-6)


def test_stacked_pixels_equal_a_list(tiny_llava):
    model = tiny_llava()
    ids = torch.tensor([[1, IMAGE, 5], [1, IMAGE, 6]])
    pixels = torch.stack([pixels_of(model, (112, 112), seed) for seed in (0, 1)])
    sizes = [(112, 112)] * 2
    stacked = prepare(model, ids, pixels, sizes)
    assert torch.equal(stacked, prepare(model, ids, list(pixels), sizes))


def test_a_single_view_may_come_without_its_dimension(tiny_llava):
    """LLaVA-1.5 pads to a square: (B, 3, S, S), no grid, no newline, no size needed."""
    model = tiny_llava(image_aspect_ratio="pad", mm_patch_merge_type="flat")
    pixels = torch.randn(2, 3, 56, 56)
    ids = torch.tensor([[1, IMAGE, 5], [1, IMAGE, 6]])
    embeds = prepare(model, ids, pixels)
    assert embeds.shape == (2, 18, 64)
    assert torch.equal(embeds, prepare(model, ids, [view[None] for view in pixels]))


def test_a_single_view_on_a_grid_ends_with_a_newline(tiny_llava):
    model = tiny_llava()
    embeds = prepare(model, torch.tensor([[1, IMAGE, 5]]), torch.randn(1, 1, 3, 56, 56), [(9, 9)])
    assert embeds.shape == (1, 19, 64)
    assert torch.equal(embeds[0, 17], model.model.image_newline)


def test_frames_of_a_video_are_neither_unpadded_nor_ended_by_newlines(tiny_llava):
    model = tiny_llava()
    frames = torch.randn(3, 3, 56, 56)
    ids = torch.tensor([[1, IMAGE, 5]])
    embeds = prepare(model, ids, [frames], None, ["video"])
    with torch.no_grad():
        projected = model.model.mm_projector(model.get_vision_tower()(frames).patches)
    expected = spliced(model, ids[0].tolist(), [projected.flatten(0, 1)])
    torch.testing.assert_close(embeds[0], expected, rtol=0, atol=1e-6)
    model.set_pruner("todre", retain_tokens=5)
    prepare(model, ids, [frames], None, ["video"])
    assert len(model.last_stats[0].images[0].keep_idx) == 5


def test_images_and_videos_mix(tiny_llava):
    model = tiny_llava()
    frames, pixels = torch.randn(3, 3, 56, 56), pixels_of(model, SIZES[0])
    ids = torch.tensor([[1, IMAGE, 5, IMAGE, 6]])
    prepare(model, ids, [frames, pixels], [(56, 56), SIZES[0]], ["video", "image"])
    image = merged(model, pixels, SIZES[0])
    assert model.last_stats[0].images[0].num_tokens == 48
    newlines = model.last_stats[0].newline_tokens
    assert model.last_stats[0].images[1].num_tokens + newlines == len(image)


# ---------------------------------------------------------------- padding


@pytest.mark.parametrize("given", ["left", "right"])
@pytest.mark.parametrize("wanted", ["left", "right"])
def test_padding_goes_from_any_side_to_the_side_that_is_wanted(tiny_llava, given, wanted):
    model = tiny_llava()
    sizes = SIZES[:2]
    pixels = [pixels_of(model, size) for size in sizes]
    prompts = [[1, 5, IMAGE, 7], [1, 9, 4, IMAGE, 8, 4, 3]]
    ids, mask = torch.full((2, 9), 77), torch.zeros(2, 9, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        where = slice(9 - len(prompt), 9) if given == "left" else slice(0, len(prompt))
        ids[row, where], mask[row, where] = torch.tensor(prompt), 1
    _, positions, out_mask, _, embeds, _ = model.prepare_inputs_labels_for_multimodal(
        ids, torch.zeros_like(ids), mask, None, None, pixels, sizes, padding_side=wanted
    )
    for row, prompt in enumerate(prompts):
        expected = spliced(model, prompt, [merged(model, pixels[row], sizes[row])])
        length, total = len(expected), embeds.shape[1]
        where = slice(total - length, total) if wanted == "left" else slice(0, length)
        torch.testing.assert_close(embeds[row, where], expected, rtol=0, atol=1e-6)
        assert out_mask[row, where].all() and out_mask[row].sum() == length
        assert positions[row, where].tolist() == list(range(length))
        assert embeds[row][out_mask[row] == 0].abs().sum() == 0


def test_side_of_the_padding_is_the_checkpoints_unless_given(tiny_llava):
    ids = torch.tensor([[1, IMAGE, 5], [1, IMAGE, 6]])
    sizes = [(112, 112), (33, 110)]
    for side in ("left", "right"):
        model = tiny_llava(tokenizer_padding_side=side)
        pixels = [pixels_of(model, size) for size in sizes]
        mask = model.prepare_inputs_labels_for_multimodal(
            ids, None, None, None, None, pixels, sizes
        )[2]
        assert mask[0].all()
        assert bool(mask[1, -1]) == (side == "left")
        assert bool(mask[1, 0]) == (side == "right")


@torch.no_grad()
def test_nothing_padded_needs_no_mask_and_no_positions(tiny_llava):
    model = tiny_llava()
    ids = torch.tensor([[1, IMAGE, 5]])
    prepared = model.prepare_inputs_labels_for_multimodal(
        ids, None, torch.ones_like(ids), None, None, [pixels_of(model, SIZES[0])], SIZES[:1]
    )
    assert prepared[:4] == (None, None, None, None)


@torch.no_grad()
def test_labels_follow_their_tokens(tiny_llava):
    model = tiny_llava()
    pixels, size = pixels_of(model, SIZES[0]), SIZES[0]
    num_visual = len(merged(model, pixels, size))
    ids = torch.tensor([[0, 1, 5, IMAGE, 7, 8, 9], [1, 2, 3, 4, 5, 6, 7]])
    mask = torch.tensor([[0] + [1] * 6, [1] * 7])
    labels = torch.arange(14).view(2, 7)
    out = model.prepare_inputs_labels_for_multimodal(
        ids, None, mask, None, labels, [pixels], [size], padding_side="right"
    )[5]
    assert out[0].tolist() == [1, 2] + [-100] * num_visual + [4, 5, 6]
    assert out[1].tolist() == [*range(7, 14)] + [-100] * (num_visual - 2)
    logits = model(
        input_ids=ids, attention_mask=mask, labels=labels, images=[pixels], image_sizes=[size]
    )
    expected = torch.nn.functional.cross_entropy(
        logits.logits[:, :-1].flatten(0, 1), out[:, 1:].flatten()
    )
    torch.testing.assert_close(logits.loss, expected)


# ---------------------------------------------------------------- Stage 1 in the prompt


@pytest.mark.parametrize("method", ["todre", "todre_v1", "random"])
@pytest.mark.parametrize("size", SIZES)
def test_pruned_prompts_hold_the_selected_tokens_in_reading_order(tiny_llava, method, size):
    model = tiny_llava()
    pruner = model.set_pruner(method, retain_ratio=0.25)
    pixels = pixels_of(model, size)
    ids = [1, 5, IMAGE, 7, 8]
    embeds = prepare(model, torch.tensor([ids]), [pixels], [size])
    (encoded,) = model.encode_images([pixels], [size])
    expected = pruner.keep([encoded.tokens()])[0].indices
    stats = model.last_stats[0]
    assert stats.images[0].keep_idx.tolist() == expected.tolist()
    assert stats.kept_tokens == len(expected) == int(0.25 * stats.visual_tokens + 0.5)
    assert stats.text_tokens == 4
    visual = embeds[0, 2:-2]
    assert len(visual) == stats.kept_tokens + stats.newline_tokens
    is_newline = (visual == model.model.image_newline).all(dim=1)
    assert int(is_newline.sum()) == stats.newline_tokens
    assert torch.equal(visual[~is_newline], encoded.features[expected])


def test_every_image_has_its_own_budget(tiny_llava):
    model = tiny_llava()
    model.set_pruner("todre", retain_tokens=6)
    sizes = SIZES[:3]
    pixels = [pixels_of(model, size) for size in sizes]
    prepare(model, torch.tensor([[1, IMAGE, 5, IMAGE], [1, 5, IMAGE, 8]]), pixels, sizes)
    assert [[len(i.keep_idx) for i in s.images] for s in model.last_stats] == [[6, 6], [6]]


@pytest.mark.parametrize("method", ["vanilla", "random", "todre"])
def test_images_encoded_once_serve_many_questions(tiny_llava, method):
    model = tiny_llava()
    model.set_pruner(method, **({} if method == "vanilla" else {"retain_ratio": 0.3}))
    sizes = SIZES[:2]
    pixels = [pixels_of(model, size) for size in sizes]
    with torch.no_grad():
        encoded = model.encode_images(pixels, sizes)
    for question in ([7, 8], [9, 4]):
        ids = torch.tensor([[1, IMAGE, *question, IMAGE, 6]])
        assert torch.equal(prepare(model, ids, encoded), prepare(model, ids, pixels, sizes))
        reused = model.generate(ids, images=encoded, max_new_tokens=6, do_sample=False)
        fresh = model.generate(
            ids, images=pixels, image_sizes=sizes, max_new_tokens=6, do_sample=False
        )
        assert torch.equal(reused, fresh)


def test_one_encoded_image_is_selected_from_once_per_method(tiny_llava):
    asked = []

    @dataclass(frozen=True, kw_only=True)
    class Recorder(Random):
        def select(self, tokens: VisualTokens, num_keep: int) -> Tensor:
            asked.append(num_keep)
            return super().select(tokens, num_keep)

    class Reader(Recorder):
        needs = frozenset({"text_embeds"})

    model = tiny_llava()
    with torch.no_grad():
        (encoded,) = model.encode_images([pixels_of(model, SIZES[0])], SIZES[:1])
    prompts = torch.tensor([[1, IMAGE, 5], [1, IMAGE, 6]])
    model.set_pruner(Recorder(retain_tokens=7))
    together = prepare(model, prompts, [encoded] * 2)
    assert torch.equal(together[1:], prepare(model, prompts[1:], [encoded]))
    assert asked == [7], "two prompts of one batch, and a later one"
    model.set_pruner(Recorder(retain_tokens=9))
    prepare(model, prompts, [encoded] * 2)
    assert asked == [7, 9], "another budget selects anew"
    model.set_pruner(Reader(retain_tokens=5))
    prepare(model, prompts, [encoded] * 2)
    assert asked == [7, 9, 5, 5], "a method that reads the question selects for each"


# ---------------------------------------------------------------- calls


@torch.no_grad()
def test_forward_and_generate_agree(tiny_llava):
    model = tiny_llava()
    model.set_pruner("todre", retain_ratio=0.3, tau=1.0, probe_depths=(0.5,))
    prompt = {"images": [pixels_of(model, SIZES[0])], "image_sizes": SIZES[:1]}
    ids = torch.tensor([[1, 5, IMAGE, 7, 8]])
    output = model(input_ids=ids, **prompt)
    new = model.generate(ids, **prompt, max_new_tokens=5, do_sample=False)
    assert new.shape == (1, 5), "new tokens only, as in the original"
    tokens = [int(output.logits[0, -1].argmax())]
    for _ in range(4):
        step = model(torch.tensor([tokens[-1:]]), past_key_values=output.past_key_values)
        tokens.append(int(step.logits[0, -1].argmax()))
    assert new[0].tolist() == tokens
    assert model.last_stats[0].withdrawn_from == 5


@torch.no_grad()
def test_text_alone_is_the_plain_decoder(tiny_llava):
    model = tiny_llava()
    model.set_pruner("todre")
    ids = torch.tensor([[1, 5, 6, 7]])
    expected = reference.LlamaReference(model).run(model.get_input_embeddings()(ids[0]))
    torch.testing.assert_close(model(ids).logits[0].double(), expected.logits, rtol=0, atol=1e-4)
    new = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert new[:, :4].equal(ids) and new.shape == (1, 7), "as transformers: with the prompt"
    assert model.last_stats == ()


@torch.no_grad()
def test_a_batch_may_hold_prompts_without_image(tiny_llava):
    model = tiny_llava()
    model.set_pruner("todre", retain_ratio=0.3)
    ids = torch.tensor([[1, 5, 6, 7, 8], [1, 9, IMAGE, 4, 3]])
    prompt = {"images": [pixels_of(model, SIZES[0])], "image_sizes": SIZES[:1]}
    new = model.generate(ids, **prompt, max_new_tokens=6, do_sample=False)
    alone = model.generate(ids[:1], max_new_tokens=6, do_sample=False)
    assert torch.equal(new[0], alone[0, 5:])
    with_image = model.generate(ids[1:], **prompt, max_new_tokens=6, do_sample=False)
    assert torch.equal(new[1], with_image[0])


def test_an_empty_list_of_images_is_text_alone(tiny_llava):
    model = tiny_llava()
    ids = torch.tensor([[1, 5, 6, 7]])
    new = model.generate(ids, images=[], max_new_tokens=3, do_sample=False)
    assert torch.equal(new, model.generate(ids, max_new_tokens=3, do_sample=False)[:, 4:])


@torch.no_grad()
def test_an_image_in_a_later_turn(tiny_llava):
    """Without withdrawal a conversation may go on with new images; with it, it may not."""
    model = tiny_llava()
    pixels, sizes = [pixels_of(model, size) for size in SIZES[:2]], SIZES[:2]
    turns = [[1, 5, IMAGE, 7, 8], [9, IMAGE, 4]]
    cache = DynamicCache(config=model.config)
    for turn, image, size in zip(turns, pixels, sizes, strict=True):
        output = model(
            torch.tensor([turn]), images=[image], image_sizes=[size], past_key_values=cache
        )
    whole = model(torch.tensor([turns[0] + turns[1]]), images=pixels, image_sizes=sizes)
    length = output.logits.shape[1]
    torch.testing.assert_close(output.logits, whole.logits[:, -length:], rtol=0, atol=1e-4)
    model.set_pruner("todre", retain_ratio=1.0)
    with pytest.raises(TodreError, match="already holds tokens.* probe_depths"):
        model(
            torch.tensor([turns[1]]), images=pixels[1:], image_sizes=sizes[1:],
            past_key_values=cache,
        )  # fmt: skip


class OwnCache(DynamicCache):
    """A caller's own kind of cache."""


@torch.no_grad()
def test_a_cache_of_the_caller_keeps_its_class(tiny_llava):
    model = tiny_llava()
    model.set_pruner("vtw", retain_ratio=0.5)
    ids, images, sizes = torch.tensor([[1, IMAGE, 5]]), [pixels_of(model, SIZES[0])], SIZES[:1]
    expected = model(ids, images=images, image_sizes=sizes).logits
    cache = OwnCache(config=model.config)
    found = model(ids, images=images, image_sizes=sizes, past_key_values=cache).logits
    assert torch.equal(found, expected) and isinstance(cache, OwnCache)
    lengths = {layer.keys.shape[2] for layer in cache.layers}
    assert len(lengths) == 2, "fewer tokens in later layers"


# ---------------------------------------------------------------- errors

ONE = torch.tensor([[1, IMAGE, 5]])
TWO = torch.tensor([[1, IMAGE, IMAGE]])


@pytest.mark.parametrize(
    ("ids", "num_images", "kwargs", "message"),
    [
        (TWO, 1, {"image_sizes": SIZES[:1]}, "2 '<image>' placeholders, but 1 images"),
        (ONE, 2, {"image_sizes": [SIZES[0]] * 2}, "1 '<image>' placeholders, but 2 images"),
        (ONE, 0, {}, "1 '<image>' placeholders, but 0 images"),
        (ONE, 1, {}, "image_sizes is missing; AnyRes needs"),
        (ONE, 1, {"image_sizes": SIZES[:2]}, "images has 1 entries, but image_sizes 2"),
        (ONE, 1, {"image_sizes": SIZES[:1], "modalities": ["image"] * 2}, "modalities 2"),
        (ONE, 1, {"image_sizes": SIZES[:1], "modalities": ["picture"]}, "'picture' is unknown"),
        (ONE, 1, {"image_sizes": [(20, 150)]}, r"image must have . views \(1 x"),
    ],
)
def test_what_does_not_fit_together_is_named(tiny_llava, ids, num_images, kwargs, message):
    model = tiny_llava()
    images = [pixels_of(model, SIZES[2])] * num_images
    assert len(images[0]) == 5 if images else True
    with pytest.raises(TodreError, match=message):
        model(input_ids=ids, images=images, **kwargs)
    with pytest.raises(TodreError, match=message):
        model.generate(ids, images=images, max_new_tokens=2, **kwargs)


def test_a_placeholder_without_images_is_an_error(tiny_llava):
    model = tiny_llava()
    with pytest.raises(TodreError, match="images is missing, but the prompt contains"):
        model(ONE)
    with pytest.raises(TodreError, match="images is missing, but the prompt contains"):
        model.generate(ONE, max_new_tokens=2)
    with pytest.raises(TodreError, match="images is missing"):
        prepare(model, ONE, None)


def test_images_without_a_prompt_are_an_error(tiny_llava):
    with pytest.raises(TodreError, match="input_ids is missing"):
        tiny_llava()(images=torch.zeros(1, 5, 3, 56, 56), image_sizes=[(112, 112)])


def test_a_prompt_longer_than_the_model_reads_is_an_error(tiny_llava):
    model = tiny_llava(max_position_embeddings=40)
    with pytest.raises(TodreError, match="longer than the 40 the model can read"):
        prepare(model, ONE, [pixels_of(model, SIZES[2])], SIZES[2:3])
    model.set_pruner("random", retain_tokens=20)
    assert prepare(model, ONE, [pixels_of(model, SIZES[2])], SIZES[2:3]).shape[1] <= 40


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs_embeds": torch.zeros(1, 3, 64)}, "inputs_embeds is not accepted"),
        ({"prefill_chunk_size": 16}, "prefill_chunk_size is not supported together with images"),
        ({"assistant_model": "any"}, "assistant_model is not supported together with images"),
        ({"cache_implementation": "static"}, "cache_implementation 'static' cannot be combined"),
    ],
)
def test_ways_to_generate_that_cannot_work_are_refused(tiny_llava, options, message):
    model = tiny_llava()
    model.set_pruner("todre")
    prompt = {"images": [pixels_of(model, SIZES[0])], "image_sizes": SIZES[:1]}
    with pytest.raises(TodreError, match=message):
        model.generate(ONE, **prompt, max_new_tokens=2, **options)


def test_a_pruner_is_set_by_name_or_as_an_object(tiny_llava):
    model = tiny_llava()
    pruner = model.set_pruner("todre", retain_ratio=0.2)
    assert model.pruner is pruner and pruner.retain_ratio == 0.2
    assert model.set_pruner(pruner) is pruner
    with pytest.raises(TodreError, match="Did you mean 'todre'"):
        model.set_pruner("toder")
