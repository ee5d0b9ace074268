"""Attention between text and visual tokens: single rows must equal whole softmax maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import reference
import torch
from conftest import MeasureAll, layer_view
from reference import SYSTEM, TEXT, VISUAL
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from llava_todre import relevance
from llava_todre.model.llava import LlavaLlamaForCausalLM
from llava_todre.pruners import LayerView, Todre
from llava_todre.relevance import attention_mass, attention_rows
from llava_todre.spans import TokenType
from llava_todre.stage1.layout import Layout
from llava_todre.stage1.select import ImageFeatures

SCALING = 0.3
PROMPTS = {
    "image, then question": [SYSTEM] * 3 + [VISUAL] * 9 + [TEXT] * 5,
    "interleaved": [SYSTEM] * 2 + [VISUAL] * 6 + [TEXT] * 4 + [VISUAL] * 5 + [TEXT] * 3,
    "image first": [VISUAL] * 7 + [TEXT] * 6,
}


def heads(groups: int, num_tokens: int = 17, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return (4, N, E) queries and (groups, N, E) keys."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(4, num_tokens, 8, generator=generator)
    return queries, torch.randn(groups, num_tokens, 8, generator=generator)


def whole_map(queries: Tensor, keys: Tensor) -> Tensor:
    """Return the (H, N, N) causal attention map in float64."""
    keys = keys.double().repeat_interleave(len(queries) // len(keys), dim=0)
    logits = queries.double() @ keys.transpose(1, 2) * SCALING
    hidden = torch.ones(logits.shape[1:], dtype=torch.bool).triu(1)
    return logits.masked_fill(hidden, -torch.inf).softmax(dim=-1)


def view_of(kinds: Tensor, queries: Tensor, keys: Tensor) -> LayerView:
    """Return the view of a layer with these rotated queries and keys."""
    return layer_view(
        layer=3,
        num_layers=8,
        kinds=kinds,
        queries=lambda rows: queries[:, rows],
        keys=lambda: keys,
        scaling=SCALING,
    )


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("rows", [range(17), [16], [0, 3, 11]])
def test_rows_equal_those_of_the_whole_map(groups, rows):
    queries, keys = heads(groups)
    rows = torch.tensor(list(rows))
    got = attention_rows(queries[:, rows], keys, rows, SCALING)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), whole_map(queries, keys)[:, rows], rtol=0, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_mass_is_the_share_of_the_whole_map(groups, draw):
    queries, keys = heads(groups)
    rows = torch.rand(17, generator=draw) < 0.5
    columns = torch.rand(17, generator=draw) < 0.5
    where = rows.nonzero()[:, 0]
    got = attention_mass(queries[:, where], keys, where, columns, SCALING)
    expected = reference.mass(whole_map(queries, keys), rows, columns)
    assert got == pytest.approx(expected, abs=1e-6)
    assert 0.05 < got < 0.95


@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_how_many_heads_are_done_at_once_changes_nothing(at_once, monkeypatch, draw):
    queries, keys = heads(4)
    rows = torch.tensor([3, 9, 16])
    columns = torch.rand(17, generator=draw) < 0.5
    monkeypatch.setattr(relevance, "_AT_ONCE_CPU", at_once * len(rows) * 17)
    done = []

    def spy(queries: Tensor, *args: Tensor) -> Tensor:
        done.append(len(queries))
        return attention_rows(queries, *args)

    monkeypatch.setattr(relevance, "attention_rows", spy)
    got = attention_mass(queries[:, rows], keys, rows, columns, SCALING)
    assert done == [at_once] * (4 // at_once)
    where = torch.zeros(17, dtype=torch.bool)
    where[rows] = True
    expected = reference.mass(whole_map(queries, keys), where, columns)
    assert got == pytest.approx(expected, abs=1e-6)


def test_all_columns_take_everything_and_none_take_nothing():
    queries, keys = heads(2)
    rows = torch.arange(17)
    everything = torch.ones(17, dtype=torch.bool)
    assert attention_mass(queries, keys, rows, everything, SCALING) == pytest.approx(1.0, abs=1e-6)
    assert attention_mass(queries, keys, rows, ~everything, SCALING) == 0.0
    assert attention_mass(queries[:, :0], keys, rows[:0], everything, SCALING) == 0.0


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("text_set", ["after_image", "all"])
def test_both_ratios_equal_those_of_the_whole_map(groups, prompt, text_set):
    kinds = torch.tensor(PROMPTS[prompt], dtype=torch.int8)
    visual = kinds == TokenType.VISUAL
    text = ~visual if text_set == "all" else kinds == TokenType.TEXT
    queries, keys = heads(groups, len(kinds))
    view = view_of(kinds, queries, keys)
    to_visual, to_text = view.attention_ratios(text)
    attention = whole_map(queries, keys)
    assert to_visual == pytest.approx(reference.mass(attention, text, visual), abs=1e-6)
    assert to_text == pytest.approx(reference.mass(attention, visual, text), abs=1e-6)
    assert view.measured == {"text_to_visual": to_visual, "visual_to_text": to_text}
    if int(text.nonzero()[0]) > int(visual.nonzero()[-1]):
        assert to_text == 0.0, "exactly: causal attention cannot look ahead"
    else:
        assert to_text > 0.01


def test_any_row_of_attention_is_on_offer():
    kinds = torch.tensor(PROMPTS["interleaved"], dtype=torch.int8)
    queries, keys = heads(2, len(kinds))
    rows = torch.tensor([4, 19])
    got = view_of(kinds, queries, keys).attention(rows)
    torch.testing.assert_close(got.double(), whole_map(queries, keys)[:, rows], rtol=0, atol=1e-6)


# ---------------------------------------------------------------- inside the decoder


def stock_maps(model: LlavaLlamaForCausalLM, embeds: Tensor) -> list[Tensor]:
    """Return the eager attention maps of transformers' own decoder on the same weights."""
    config = LlamaConfig(**{**model.config.to_dict(), "model_type": "llama"})
    config._attn_implementation = "eager"
    stock = LlamaModel(config).eval()
    missing, _ = stock.load_state_dict(model.model.state_dict(), strict=False)
    assert not missing
    with torch.no_grad():
        output = stock(inputs_embeds=embeds[None], output_attentions=True)
    return [layer[0].double() for layer in output.attentions]


@pytest.mark.parametrize("all_text", [False, True])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("ids", [[1, 5, 6, -200, 7, 8, 9], [1, -200, 7, 8, -200, 9]])
def test_probes_equal_eager_attention_maps(
    tiny_llava: Callable[..., LlavaLlamaForCausalLM], attention, draw, ids, key_heads, all_text
):
    model = tiny_llava(attention, num_key_value_heads=key_heads)
    visuals = [torch.randn(12 + i, 64, generator=draw) for i in range(ids.count(-200))]
    images = [ImageFeatures(v, Layout.of_slots(torch.arange(len(v)), 1, 4)) for v in visuals]
    model.set_pruner(MeasureAll(all_text=all_text))
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]), images=images)
    embeds, kinds = reference.splice(model.get_input_embeddings().weight.detach(), ids, visuals)
    visual = kinds == VISUAL
    text = ~visual if all_text else kinds == TEXT
    probes = model.last_stats[0].probes
    assert [probe.layer for probe in probes] == list(range(8))
    for probe, map_of_layer in zip(probes, stock_maps(model, embeds), strict=True):
        assert probe.dropped == 0
        expected = reference.mass(map_of_layer, text, visual)
        assert probe.text_to_visual == pytest.approx(expected, abs=1e-5)
        expected = reference.mass(map_of_layer, visual, text)
        assert probe.visual_to_text == pytest.approx(expected, abs=1e-5)
        assert (expected == 0.0) == (ids.count(-200) == 1 and not all_text)


def test_ratios_after_an_earlier_drop_leave_the_dropped_tokens_out(tiny_llava, draw):
    """The second probe of a method that drops at the first one sees the smaller map."""

    @dataclass(frozen=True, kw_only=True)
    class HalveThenMeasure(MeasureAll):
        def at_layer(self, view: LayerView) -> Tensor | None:
            super().at_layer(view)
            return view.patches[::2] if view.layer == 2 else None

    model = tiny_llava()
    visual = torch.randn(12, 64, generator=draw)
    ids = [1, 5, 6, -200, 7, 8, 9]
    model.set_pruner(HalveThenMeasure())
    with torch.no_grad():
        model(
            input_ids=torch.tensor([ids]),
            images=[ImageFeatures(visual, Layout.of_slots(torch.arange(12), 1, 4))],
        )
    slow = reference.LlamaReference(model)
    embeds, kinds = reference.splice(slow.embedding, ids, [visual])
    present = reference.presence(kinds, 8, {2: 2})
    maps = slow.run(embeds, present).attention
    probes = model.last_stats[0].probes
    assert [probe.dropped for probe in probes] == [0, 0, 6, 0, 0, 0, 0, 0]
    for layer, probe in enumerate(probes):
        seen = present[layer] & (kinds == VISUAL)
        expected = reference.mass(maps[layer], kinds == TEXT, seen)
        assert probe.text_to_visual == pytest.approx(expected, abs=1e-5)


def test_the_second_ratio_is_not_computed_when_it_is_zero_by_causality():
    kinds = torch.tensor(PROMPTS["image, then question"], dtype=torch.int8)
    queries, keys = heads(2, len(kinds))
    asked = []

    def spy(rows: Tensor) -> Tensor:
        asked.append(rows.tolist())
        return queries[:, rows]

    view = layer_view(kinds=kinds, queries=spy, keys=lambda: keys, scaling=SCALING)
    Todre().at_layer(view)
    assert asked == [list(range(12, 17))], "only the rows of the text are projected"


@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_a_prompt_that_ends_with_an_image_can_be_measured(tiny_llava, draw, use_cache):
    model = tiny_llava()
    model.set_pruner(MeasureAll())
    image = ImageFeatures(
        torch.randn(9, 64, generator=draw), Layout.of_slots(torch.arange(9), 1, 4)
    )
    model(input_ids=torch.tensor([[1, 5, -200]]), images=[image], use_cache=use_cache)
    ratios = [(p.text_to_visual, p.visual_to_text) for p in model.last_stats[0].probes]
    assert ratios == [(0.0, 0.0)] * 8
