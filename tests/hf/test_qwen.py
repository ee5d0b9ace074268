"""Pruning on stock Qwen2-VL, Qwen2.5-VL and Qwen3-VL, against a decoder that starts over."""

from __future__ import annotations

import copy
import dataclasses
import importlib
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from qwen_models import BATCH, MODELS, ONE, PATCH, Oracle, Sample, build, collate, prompt
from torch import Tensor
from transformers import Qwen2VLImageProcessorPil

from llava_todre import hf
from llava_todre.errors import TodreError
from llava_todre.hf.families import family_of
from llava_todre.pruners import PRUNERS, Pruner, Selection
from llava_todre.spans import VisualTokens

STEPS = 16
FAMILIES = list(MODELS)
STAGE_1 = {"method": "todre", "probe_depths": ()}
BOTH = {"method": "todre", "probe_depths": (0.5,), "tau": 1.0}  # always withdraws
GREEDY = {"max_new_tokens": STEPS, "do_sample": False}


@cache
def oracle(family: str, sample: Sample) -> Oracle:
    return Oracle(build(family), prompt(family, sample))


@cache
def expected(family: str, sample: Sample, kept: Any, without: Any = None) -> list[int]:
    return oracle(family, sample).greedy(
        [list(each) for each in kept],
        STEPS,
        without and (without[0], [list(each) for each in without[1]]),
    )


def batch_of(family: str, samples: tuple[Sample, ...]) -> Any:
    return collate([prompt(family, sample) for sample in samples])


def kept_of(stats: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(image.keep_idx.tolist()) for image in stats.images)


def sizes(sample: Sample) -> list[int]:
    grids = [piece for piece in sample if isinstance(piece, tuple)]
    return [int(torch.tensor(grid).prod()) // 4 for grid in grids]


@pytest.mark.parametrize("samples", [(ONE,), BATCH], ids=["one", "batch"])
@pytest.mark.parametrize("ratio", [0.25, 0.1])
@pytest.mark.parametrize("method", [STAGE_1, BOTH], ids=["stage1", "both"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_a_decoder_that_starts_over(family, attention, method, ratio, samples):
    model, inputs = build(family, attention), batch_of(family, samples)
    with hf.prune(model, retain_ratio=ratio, **method):
        output = model.generate(**inputs, **GREEDY)
        stats = hf.last_stats(model)
    assert torch.equal(output[:, :-STEPS], inputs["input_ids"])
    for row, (sample, what) in enumerate(zip(samples, stats, strict=True)):
        kept = kept_of(what)
        assert [len(each) for each in kept] == [
            max(1, int(ratio * size + 0.5)) for size in sizes(sample)
        ]
        without = (5, tuple(() for _ in kept)) if method is BOTH and kept else None
        assert what.withdrawn_from == (5 if without else None)
        answer = expected(family, sample, kept, without)
        assert output[row, -STEPS:].tolist() == answer
        everything = tuple(tuple(range(size)) for size in sizes(sample))
        if kept:
            assert answer != expected(family, sample, everything), "what is dropped must matter"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fastv_drops_what_the_last_token_looks_at_least(family, attention):
    model, inputs = build(family, attention), batch_of(family, BATCH)
    with hf.prune(model, method="fastv", retain_ratio=0.25, layer=4):
        output = model.generate(**inputs, **GREEDY)
    for row, sample in enumerate(BATCH):
        whole = [list(range(size)) for size in sizes(sample)]
        reference = oracle(family, sample)
        decoder, embeds = reference.decoder(whole)
        paid = decoder.run(embeds).attention[3].mean(dim=0)[-1]  # (L,)
        pool = torch.cat([torch.empty(0, dtype=torch.int64), *reference.places])
        count = sum(max(1, int(0.25 * size + 0.5)) for size in sizes(sample))
        best = set(pool[paid[pool].argsort(descending=True)[:count]].tolist())
        fewer = [
            [index for index, column in enumerate(columns.tolist()) if column in best]
            for columns in reference.places
        ]
        assert output[row, -STEPS:].tolist() == reference.greedy(whole, STEPS, (4, fewer))


@pytest.mark.parametrize("method", [STAGE_1, BOTH], ids=["stage1", "both"])
@pytest.mark.parametrize("family", FAMILIES)
def test_beam_search_is_that_of_a_decoder_that_starts_over(family, method):
    model, inputs = build(family), batch_of(family, BATCH)
    with hf.prune(model, retain_ratio=0.25, **method):
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False, num_beams=3)
        stats = hf.last_stats(model)
    for row, (sample, what) in enumerate(zip(BATCH, stats, strict=True)):
        kept = [list(each) for each in kept_of(what)]
        reference = oracle(family, sample)
        decoder, embeds = reference.decoder(kept)
        present = torch.ones(8, len(embeds), dtype=torch.bool)
        if method is BOTH:
            present[5:] = reference.held([[] for _ in kept])[reference.held(kept)]
        assert output[row, -6:].tolist() == decoder.beams(embeds, 6, 3, present)


@pytest.mark.parametrize("method", [STAGE_1, BOTH], ids=["stage1", "both"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_the_likeliest_token_twice_is_greedy_twice(family, method):
    model, inputs = build(family), batch_of(family, BATCH)
    with hf.prune(model, retain_ratio=0.25, **method):
        greedy = model.generate(**inputs, **GREEDY)
        sampled = model.generate(
            **inputs, max_new_tokens=STEPS, do_sample=True, top_k=1, num_return_sequences=2
        )
    assert torch.equal(sampled, greedy.repeat_interleave(2, dim=0))


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_also_get_positions_without_gaps(family):
    """FlashAttention would take a gap for a boundary between two sequences."""
    model = build(family)
    got: list[Tensor] = []

    def note(layer: Any, args: Any, kwargs: Any) -> None:
        got.append(kwargs["position_ids"])

    handle = model.model.language_model.layers[0].register_forward_pre_hook(note, with_kwargs=True)
    with hf.prune(model, retain_ratio=0.25, **STAGE_1):
        model.generate(**batch_of(family, (ONE,)), max_new_tokens=3)
        (stats,) = hf.last_stats(model)
    handle.remove()
    length = stats.prompt_tokens_per_layer[0]
    assert [each.tolist() for each in got] == [[[*range(length)]], [[length]], [[length + 1]]]


# ---------------------------------------------------------------- where tokens stand


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watch(Pruner):
    """Keeps the first tokens, and remembers what it was given."""

    seen: list[VisualTokens] = dataclasses.field(default_factory=list)
    layer: int = 0

    @property
    def needs(self) -> Any:
        return frozenset({("received_attention", self.layer)})

    def select(self, tokens: VisualTokens, budget: int) -> Selection:
        self.seen.append(tokens)
        return Selection(torch.arange(budget))


def coloured(views: int, rows: int, columns: int) -> Tensor:
    """Return (views, rows, columns, 3) a colour for every token, no two alike."""
    count = views * rows * columns
    return torch.arange(count * 3).view(views, rows, columns, 3) * 255 // (count * 3)


def processed(colours: Tensor) -> tuple[Tensor, Tensor]:
    """Return pixels and grid (1, 3) that the processor makes of frames in these colours."""
    processor = Qwen2VLImageProcessorPil(patch_size=PATCH, min_pixels=1, max_pixels=10**8)
    pixels, grids = [], []
    for frame in colours:
        picture = np.kron(frame.numpy(), np.ones((2 * PATCH, 2 * PATCH, 1))).astype(np.uint8)
        made = processor(Image.fromarray(picture), return_tensors="pt")
        pixels.append(made["pixel_values"])
        grids.append(made["image_grid_thw"])
    return torch.cat(pixels), grids[0] * torch.tensor([len(colours), 1, 1])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_is_where_its_colour_is(family, monkeypatch):
    """The blocks of this tower do nothing, so a token is made of the patches under it alone."""
    model = copy.deepcopy(build(family))
    for block in model.model.visual.blocks:
        block.attn.proj.weight.data.zero_()
        block.attn.proj.bias.data.zero_()
        for weight in block.mlp.parameters():
            weight.data.zero_()
    if family == "qwen3_vl":
        model.model.visual.pos_embed.weight.data.zero_()
    image, video = coloured(1, 3, 5), coloured(3, 2, 3)
    pruner = Watch(retain_ratio=0.5)
    raw = dataclasses.replace(
        family_of(model), measure=lambda quantity, layer, hidden, called: hidden
    )
    monkeypatch.setattr("llava_todre.hf.attachment.family_of", lambda model: raw)
    inputs = batch_of(family, ((2, (6, 10), 3, (3, 4, 6), 4),))
    inputs["pixel_values"], inputs["image_grid_thw"] = processed(image)
    inputs["pixel_values_videos"], inputs["video_grid_thw"] = processed(video)
    with hf.prune(model, pruner):
        model.generate(**inputs, max_new_tokens=1)
    for tokens, colours in zip(pruner.seen, (image, video), strict=True):
        assert len(tokens) == colours[..., 0].numel()
        assert tokens.is_video == (len(colours) > 1)
        where = torch.stack([tokens.view, tokens.row, tokens.column])
        assert where.unique(dim=1).shape[1] == len(tokens)
        for index, place in enumerate(zip(tokens.view, tokens.row, tokens.column, strict=True)):
            pixels, grid = processed(colours[place].expand(1, 2, 2, 3))
            alone = model.model.get_image_features(pixels, grid).pooler_output[0][0]
            torch.testing.assert_close(tokens.features[index], alone, rtol=0, atol=1e-5)
            patch = model.model.visual.patch_embed(pixels)[0]
            measured = tokens.vision["received_attention", 0][index]
            torch.testing.assert_close(measured, patch, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_received_attention_is_that_of_the_tower(family, monkeypatch):
    """The reference runs the tower in eager mode, without windows, and reads its maps."""
    sample = (2, (8, 12), 3, (3, 4, 8), 5)
    model = copy.deepcopy(build(family))
    if family == "qwen2_5_vl":  # so that the order of windows is all that differs
        model.model.visual.fullatt_block_indexes = range(4)
    monkeypatch.setattr("llava_todre.hf.qwen._MAX_ENTRIES", 4 * 96 * 5)  # five rows at a time
    watch = Watch(retain_ratio=0.5, layer=-1)
    with hf.prune(model, watch):
        model.generate(**batch_of(family, (sample,)), max_new_tokens=1)
    model.set_attn_implementation("eager")
    module = importlib.import_module(type(model).__module__)
    maps: list[Tensor] = []
    eager = module.eager_attention_forward

    def noting(*args: Any, **kwargs: Any) -> Any:
        output, weights = eager(*args, **kwargs)
        maps.append(weights)
        return output, weights

    def unpermuted(grid: Tensor, **kwargs: Any) -> Any:
        return torch.arange(int(grid.prod(-1).sum()) // 4), torch.zeros(2, dtype=torch.int32)

    monkeypatch.setattr(module, "eager_attention_forward", noting)
    if family == "qwen2_5_vl":
        monkeypatch.setattr(module, "get_vision_window_index", unpermuted)
    given = prompt(family, sample)
    for tokens, pixels, grid in zip(
        watch.seen,
        (given["pixel_values"], given["pixel_values_videos"]),
        (given["image_grid_thw"], given["video_grid_thw"]),
        strict=True,
    ):
        maps.clear()
        with torch.no_grad():
            model.model.visual(pixels, grid_thw=grid)
        last = maps[-int(grid[0, 0]) :]  # of each view, (1, H, n, n)
        received = torch.cat([each[0].mean(dim=(0, 1)) for each in last])
        assert received.std() > 0.1 * received.mean()
        measured = tokens.vision["received_attention", -1]
        torch.testing.assert_close(measured, received.view(-1, 4).mean(dim=1))


def test_windowed_layers_of_qwen2_5_pass_the_question_to_the_nearest_that_sees_everything():
    answers = []
    for layer in (-2, 3, 1):
        watch = Watch(retain_ratio=0.5, layer=layer)
        with hf.prune(build("qwen2_5_vl"), watch):
            build("qwen2_5_vl").generate(**batch_of("qwen2_5_vl", (ONE,)), max_new_tokens=1)
        answers.append(watch.seen[0].vision["received_attention", layer])
    near_the_end, last, first = answers
    assert torch.equal(near_the_end, first)  # of 1 and 3, equally near to 2, the first
    assert not torch.equal(last, first)


# ---------------------------------------------------------------- methods


@pytest.mark.parametrize("name", [name for name in PRUNERS if name != "vanilla"])
@pytest.mark.parametrize("family", FAMILIES)
def test_methods_run_or_say_what_they_miss(family, name):
    model, method = build(family), PRUNERS[name](retain_ratio=0.25)
    misses = {need if isinstance(need, str) else need[0] for need in method.needs}
    misses -= {"cls_attention", "received_attention", "text_embeds"}
    if misses:
        with pytest.raises(TodreError, match="do not give; allowed needs"):
            hf.attach(model, method)
        return
    if family == "qwen3_vl" and min(method.probe_layers(8), default=9) < 2:
        with pytest.raises(TodreError, match="allowed: after layer 2 or later"):
            hf.attach(model, method)
        return
    inputs = batch_of(family, BATCH)
    with hf.prune(model, method) as pruned:
        assert (
            pruned.generate(**inputs, max_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3
        )
        stats = hf.last_stats(model)
    assert any(what.visual_tokens_per_layer[-1] < what.visual_tokens for what in stats)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_cls_token_received_attention_takes_its_place(family):
    model = build(family)
    assert family_of(model).proxies == {"cls_attention": "received_attention"}
    with hf.prune(model, "fastervlm", retain_ratio=0.25):
        model.generate(**batch_of(family, (ONE,)), max_new_tokens=1)
        (stats,) = hf.last_stats(model)
    watch = Watch(retain_ratio=0.5, layer=-2)
    with hf.prune(model, watch):
        model.generate(**batch_of(family, (ONE,)), max_new_tokens=1)
    best = watch.seen[0].vision["received_attention", -2].topk(6).indices
    assert stats.images[0].keep_idx.tolist() == best.sort().values.tolist()


@pytest.mark.parametrize("method", ["visionzip", "prumerge", "globalcom2", "downsample"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_need_that_the_tower_cannot_meet_is_an_error_of_one_line(family, method):
    with pytest.raises(TodreError, match=f"the family {family} do not give; allowed needs") as told:
        hf.attach(build(family), method)
    assert "\n" not in str(told.value)


def test_no_token_leaves_qwen3_vl_before_all_its_image_features_have_been_added():
    with pytest.raises(TodreError, match="up to layer 1; allowed: after layer 2 or later"):
        hf.attach(build("qwen3_vl"), "fastv", layer=2)
    with hf.prune(build("qwen3_vl"), "fastv", layer=3):
        build("qwen3_vl").generate(**batch_of("qwen3_vl", (ONE,)), max_new_tokens=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_without_token_types_is_an_error(family):
    inputs = batch_of(family, (ONE,))
    del inputs["mm_token_type_ids"]
    with (
        hf.prune(build(family), retain_ratio=0.25),
        pytest.raises(TodreError, match="mm_token_type_ids is missing"),
    ):
        build(family).generate(**inputs, max_new_tokens=1)


# ---------------------------------------------------------------- off, and afterwards


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_changes_no_bit(family, attention):
    model, inputs = build(family, attention), batch_of(family, BATCH)
    more = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    before = model.generate(**inputs, **more)
    with hf.prune(model, method="todre", retain_ratio=1.0, probe_depths=()):
        during = model.generate(**inputs, **more)
    after = model.generate(**inputs, **more)
    for other in (during, after):
        assert torch.equal(before.sequences, other.sequences)
        assert all(map(torch.equal, before.logits, other.logits))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_probe_that_drops_nothing_changes_no_token(family):
    """The prompt then goes through the capture with all its tokens, positions and features."""
    model, inputs = build(family), batch_of(family, BATCH)
    before = model.generate(**inputs, **GREEDY)
    with hf.prune(model, method="todre", retain_ratio=1.0, probe_depths=(0.5,), tau=0.0):
        during = model.generate(**inputs, **GREEDY)
    assert torch.equal(before, during)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_left_behind(family):
    model = copy.deepcopy(build(family))

    def everything() -> Any:
        modules = {
            name: (
                type(module),
                sorted(module.__dict__),
                [len(getattr(module, key)) for key in module.__dict__ if key.endswith("_hooks")],
            )
            for name, module in model.named_modules()
        }
        return modules, model.config.to_dict(), model.generation_config.to_dict()

    before = everything()
    with hf.prune(model, retain_ratio=0.25, **BOTH):
        model.generate(**batch_of(family, BATCH), max_new_tokens=2)
        with pytest.raises(Exception, match="."):
            model.generate(**batch_of(family, BATCH), max_new_tokens=2, logits_processor="broken")
    assert everything() == before


@pytest.mark.parametrize("family", FAMILIES)
def test_off_asks_for_nothing_that_the_model_itself_does_not_need(family):
    model, inputs = build(family), batch_of(family, (ONE,))
    for key in ("mm_token_type_ids", "attention_mask"):
        inputs.pop(key)
    ids = inputs.pop("input_ids")
    settings = {"max_new_tokens": 3, "do_sample": False}
    plain = model.generate(ids, **inputs, **settings)
    with hf.prune(model, "vanilla"):
        assert torch.equal(model.generate(ids, **inputs, **settings), plain)
