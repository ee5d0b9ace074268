"""Pruning on stock InternVL, against a decoder that starts over."""

from __future__ import annotations

import copy
import dataclasses
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from conftest import randomise
from PIL import Image
from qwen_models import StockReference
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    Qwen2Config,
)

from llava_todre import hf
from llava_todre.errors import TodreError
from llava_todre.hf.families import family_of
from llava_todre.hf.internvl import tiles_layout
from llava_todre.pruners import PRUNERS, Pruner, Selection
from llava_todre.spans import VisualTokens

IMAGE, START, END, PAD = 299, 297, 296, 0
PATCH, SIDE, TOKENS = 14, 4, 16
TILE = 2 * SIDE * PATCH
STEPS = 16
GREEDY = {"max_new_tokens": STEPS, "do_sample": False}
STAGE_1 = {"method": "todre", "probe_depths": ()}
BOTH = {"method": "todre", "probe_depths": (0.5,), "tau": 1.0}  # always withdraws


@dataclasses.dataclass(frozen=True)
class Shown:
    """An image of so many tiles, or a frame of a video."""

    tiles: int = 1


Sample = tuple[Any, ...]
ONE: Sample = (3, Shown(4), 6)
VIDEO: Sample = (2, Shown(), 1, Shown(), 1, Shown(), 4)
BATCH: tuple[Sample, ...] = (ONE, (2, Shown(), 3, Shown(3), 5), VIDEO, (9,))


@cache
def build(attention: str = "sdpa", qk_norm: bool = False) -> Any:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": [TILE, TILE],
        "patch_size": [PATCH, PATCH],
        "use_qk_norm": qk_norm,
    }
    text = Qwen2Config(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    config = InternVLConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, tie_word_embeddings=False
    )
    model = InternVLForConditionalGeneration(config).eval()
    model.set_attn_implementation(attention)
    randomise(model, 0)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


@cache
def prompt(sample: Sample) -> tuple[Tensor, Tensor]:
    """Return (L,) ids and the pixels of all tiles."""
    shown = [piece.tiles for piece in sample if isinstance(piece, Shown)]
    draw = torch.Generator().manual_seed(len(sample) + 10 * sum(shown))
    row = [torch.tensor([1])]
    for piece in sample:
        if isinstance(piece, int):
            row.append(torch.randint(2, 290, (piece,), generator=draw))
        else:
            ids = [START, *[IMAGE] * TOKENS * piece.tiles, END]
            row.append(torch.tensor(ids))
    return torch.cat(row), torch.randn(sum(shown), 3, TILE, TILE, generator=draw)


def batch_of(*samples: Sample) -> dict[str, Tensor]:
    prompts = [prompt(sample) for sample in samples]
    ones = [torch.ones(len(ids), dtype=torch.int64) for ids, _ in prompts]
    return {
        "input_ids": pad_sequence([ids for ids, _ in prompts], True, PAD, "left"),
        "attention_mask": pad_sequence(ones, True, 0, "left"),
        "pixel_values": torch.cat([pixels for _, pixels in prompts]),
    }


def sizes(sample: Sample) -> list[int]:
    return [TOKENS * piece.tiles for piece in sample if isinstance(piece, Shown)]


class Oracle:
    """One prompt."""

    @torch.no_grad()
    def __init__(self, sample: Sample) -> None:
        model, (ids, pixels) = build(), prompt(sample)
        self.decoder = StockReference(model)
        self.embeds = model.get_input_embeddings()(ids).clone()
        if len(pixels):
            features = model.model.get_image_features(pixels).pooler_output
            self.embeds[ids == IMAGE] = features.flatten(0, 1)
        self.places = (ids == IMAGE).nonzero()[:, 0].split(sizes(sample))

    def held(self, kept: Any) -> Tensor:
        """Return (L,) bool, the tokens that stay when these of each image do."""
        stays = torch.ones(len(self.embeds), dtype=torch.bool)
        for columns, indices in zip(self.places, kept, strict=True):
            stays[columns] = False
            stays[columns[list(indices)]] = True
        return stays

    def pruned(self, kept: Any, without: Any) -> tuple[Tensor, Tensor]:
        """Return (M, D) the prompt of ``kept`` tokens, and (8, M) who is there in each layer."""
        stays = self.held(kept)
        present = torch.ones(8, int(stays.sum()), dtype=torch.bool)
        if without is not None:
            present[without[0] :] = self.held(without[1])[stays]
        return self.embeds[stays], present

    def greedy(self, kept: Any, without: Any = None) -> list[int]:
        """Return the answer; from layer ``without[0]`` on only ``without[1]`` are there."""
        embeds, present = self.pruned(kept, without)
        return self.decoder.greedy(embeds, STEPS, present)[0]


oracle = cache(Oracle)


@cache
def expected(sample: Sample, kept: Any, without: Any = None) -> list[int]:
    return oracle(sample).greedy(kept, without)


def kept_of(stats: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(image.keep_idx.tolist()) for image in stats.images)


@pytest.mark.parametrize("samples", [(ONE,), BATCH], ids=["one", "batch"])
@pytest.mark.parametrize("ratio", [0.25, 0.1])
@pytest.mark.parametrize("method", [STAGE_1, BOTH], ids=["stage1", "both"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_answers_are_those_of_a_decoder_that_starts_over(attention, method, ratio, samples):
    model, inputs = build(attention), batch_of(*samples)
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
        answer = expected(sample, kept, without)
        assert output[row, -STEPS:].tolist() == answer
        if kept:
            everything = tuple(tuple(range(size)) for size in sizes(sample))
            assert answer != expected(sample, everything), "what is dropped must matter"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_fastv_drops_what_the_last_token_looks_at_least(attention):
    model = build(attention)
    with hf.prune(model, method="fastv", retain_ratio=0.25):
        output = model.generate(**batch_of(*BATCH), **GREEDY)
    for row, sample in enumerate(BATCH):
        if not sizes(sample):
            continue
        whole = [range(size) for size in sizes(sample)]
        reference = oracle(sample)
        paid = reference.decoder.run(reference.embeds).attention[1].mean(dim=0)[-1]
        pool = torch.cat(reference.places)
        best = set(pool[paid[pool].topk(len(pool) // 4).indices].tolist())
        fewer = [
            [index for index, column in enumerate(columns.tolist()) if column in best]
            for columns in reference.places
        ]
        assert output[row, -STEPS:].tolist() == reference.greedy(whole, (2, fewer))


@pytest.mark.parametrize("method", [STAGE_1, BOTH], ids=["stage1", "both"])
def test_beam_search_is_that_of_a_decoder_that_starts_over(method):
    model = build()
    with hf.prune(model, retain_ratio=0.25, **method):
        output = model.generate(**batch_of(*BATCH), max_new_tokens=6, do_sample=False, num_beams=3)
        stats = hf.last_stats(model)
    for row, (sample, what) in enumerate(zip(BATCH, stats, strict=True)):
        kept = kept_of(what)
        without = (5, [()] * len(kept)) if method is BOTH and kept else None
        embeds, present = oracle(sample).pruned(kept, without)
        best = oracle(sample).decoder.beams(embeds, 6, 3, present)
        assert output[row, -6:].tolist() == best


# ---------------------------------------------------------------- where tokens stand


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watch(Pruner):
    """Keeps the first tokens, and remembers what it was given."""

    seen: list[VisualTokens] = dataclasses.field(default_factory=list)
    layer: int = 0

    @property
    def needs(self) -> Any:
        return frozenset({("cls_attention", self.layer)})

    def select(self, tokens: VisualTokens, budget: int) -> Selection:
        self.seen.append(tokens)
        return Selection(torch.arange(budget))


def processed(colours: Tensor) -> Tensor:
    """Return the tiles (T, 3, TILE, TILE) of a picture of (rows, columns, 3), a colour a token."""
    picture = np.kron(colours.numpy(), np.ones((2 * PATCH, 2 * PATCH, 1))).astype(np.uint8)
    processor = GotOcr2ImageProcessorPil(size={"height": TILE, "width": TILE})
    made = processor(Image.fromarray(picture), crop_to_patches=True, return_tensors="pt")
    return made["pixel_values"]


def test_a_token_is_where_its_colour_is(monkeypatch):
    """The blocks of this tower do nothing, so a token is made of the patches under it alone.

    The picture is two tiles high and three wide; the processor adds the thumbnail.
    """
    model = copy.deepcopy(build())
    tower = model.model.vision_tower
    tower.embeddings.position_embeddings.data.zero_()
    for block in tower.encoder.layer:
        block.lambda_1.data.zero_()
        block.lambda_2.data.zero_()
    count = 2 * SIDE * 3 * SIDE
    colours = (torch.arange(count * 3).view(2 * SIDE, 3 * SIDE, 3) * 255) // (count * 3)
    tiles = processed(colours)
    assert len(tiles) == 7
    watch = Watch(retain_ratio=0.5)
    raw = dataclasses.replace(
        family_of(model),
        measure=lambda quantity, layer, hidden, called: hidden[:, 1:].flatten(0, 1),
    )
    monkeypatch.setattr("llava_todre.hf.attachment.family_of", lambda model: raw)
    inputs = batch_of((2, Shown(7), 4)) | {"pixel_values": tiles}
    with hf.prune(model, watch):
        model.generate(**inputs, max_new_tokens=1)
    (tokens,) = watch.seen
    assert tokens.view.unique().tolist() == list(range(7))
    assert (
        torch.stack([tokens.view, tokens.row, tokens.column]).unique(dim=1).shape[1] == 7 * TOKENS
    )

    def alone(pixels: Tensor) -> tuple[Tensor, Tensor]:  # of a (3, 28, 28) cell
        whole = pixels.repeat(1, SIDE, SIDE)[None]
        feature = model.model.get_image_features(whole).pooler_output[0, 0]
        return feature, tower.embeddings(whole)[0, 1:].view(8, 8, -1)[:2, :2].mean(dim=(0, 1))

    flat = processed(colours[:1, :1].expand(SIDE, SIDE, 3))  # one tile, for the scale of colours
    assert flat.shape[0] == 1
    cell = 2 * PATCH
    for index in range(len(tokens)):
        view, row, column = (int(each[index]) for each in (tokens.view, tokens.row, tokens.column))
        if view:
            down, right = divmod(view - 1, 3)
            colour = colours[down * SIDE + row, right * SIDE + column]
            shown = processed(colour.expand(SIDE, SIDE, 3))[0, :, :cell, :cell]
        else:  # the thumbnail mixes colours
            shown = tiles[-1][:, row * cell : (row + 1) * cell, column * cell : (column + 1) * cell]
        feature, patch = alone(shown)
        torch.testing.assert_close(tokens.features[index], feature, rtol=0, atol=1e-4)
        measured = tokens.vision["cls_attention", 0][index]
        torch.testing.assert_close(measured, patch, rtol=0, atol=1e-4)


def test_one_tile_is_the_only_view():
    layout = tiles_layout(1, 8, 2)
    assert layout.view.unique().tolist() == [0]
    assert layout.num_patches == 64
    assert layout.sources[1].tolist() == [2, 3, 10, 11]


@pytest.mark.parametrize("qk_norm", [False, True])
def test_cls_attention_is_that_of_the_tower(qk_norm):
    """The maps are those of the tower in eager mode."""
    model = build("eager", qk_norm)
    watch = Watch(retain_ratio=0.5, layer=2)
    with hf.prune(model, watch):
        model.generate(**batch_of(ONE), max_new_tokens=1)
    maps: list[Tensor] = []
    attention = model.model.vision_tower.encoder.layer[2].attention
    handle = attention.register_forward_hook(lambda module, args, output: maps.append(output[1]))
    with torch.no_grad():
        model.model.get_image_features(prompt(ONE)[1])
    handle.remove()
    paid = maps[0][:, :, 0, 1:].mean(dim=1)  # (tiles, patches)
    cells = paid.view(4, SIDE, 2, SIDE, 2).mean(dim=(2, 4)).flatten()
    torch.testing.assert_close(watch.seen[0].vision["cls_attention", 2], cells)


# ---------------------------------------------------------------- methods and errors


@pytest.mark.parametrize("name", [name for name in PRUNERS if name != "vanilla"])
def test_methods_run_or_say_what_they_miss(name):
    model, inputs = build(), batch_of(*BATCH)
    misses = {need for need in PRUNERS[name]().needs if isinstance(need, str)} - {"text_embeds"}
    if misses:
        with pytest.raises(TodreError, match="family internvl do not give; allowed needs"):
            hf.attach(model, name, retain_ratio=0.25)
        return
    with hf.prune(model, name, retain_ratio=0.25):
        output = model.generate(**inputs, max_new_tokens=3)
        stats = hf.last_stats(model)
    assert output.shape[1] == inputs["input_ids"].shape[1] + 3
    assert any(what.visual_tokens_per_layer[-1] < what.visual_tokens for what in stats)


@pytest.mark.parametrize("missing", [1, TOKENS])
def test_a_prompt_that_does_not_fit_the_pixels_is_an_error_of_one_line(missing):
    model, inputs = build(), batch_of(ONE)
    keep = torch.ones(inputs["input_ids"].shape[1], dtype=torch.bool)
    keep[10 : 10 + missing] = False
    inputs |= {key: inputs[key][:, keep] for key in ("input_ids", "attention_mask")}
    message = "in a row; allowed: multiples of 16" if missing == 1 else "room for 3 tiles"
    with hf.prune(model, retain_ratio=0.25), pytest.raises(TodreError, match=message) as told:
        model.generate(**inputs, max_new_tokens=1)
    assert "\n" not in str(told.value)


# ---------------------------------------------------------------- off, and afterwards


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_keeping_everything_changes_no_bit(attention):
    model, inputs = build(attention), batch_of(*BATCH)
    more = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    before = model.generate(**inputs, **more)
    with hf.prune(model, method="todre", retain_ratio=1.0, probe_depths=()):
        during = model.generate(**inputs, **more)
    after = model.generate(**inputs, **more)
    for other in (during, after):
        assert torch.equal(before.sequences, other.sequences)
        assert all(map(torch.equal, before.logits, other.logits))


def test_a_probe_that_drops_nothing_changes_no_token():
    model, inputs = build(), batch_of(*BATCH)
    before = model.generate(**inputs, **GREEDY)
    with hf.prune(model, method="todre", retain_ratio=1.0, probe_depths=(0.5,), tau=0.0):
        during = model.generate(**inputs, **GREEDY)
    assert torch.equal(before, during)


def test_nothing_is_left_behind():
    model = copy.deepcopy(build())

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
        model.generate(**batch_of(*BATCH), max_new_tokens=2)
    assert everything() == before


def test_off_asks_for_nothing_that_the_model_itself_does_not_need() -> None:
    model, inputs = build(), batch_of(ONE)
    inputs.pop("attention_mask")
    ids = inputs.pop("input_ids")
    plain = model.generate(ids, **inputs, max_new_tokens=3, do_sample=False)
    with hf.prune(model, "vanilla"):
        given = model.generate(ids, **inputs, max_new_tokens=3, do_sample=False)
        assert torch.equal(given, plain) and len(hf.last_stats(model)) == 1
