"""Dropping tokens between layers, against a decoder that starts over for every token.

The oracle (reference.LlamaReference) has no cache, no padding and no batch: float64 products in
which a dropped token is hidden from the later layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import reference
import torch
from reference import IMAGE
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)
from transformers.masking_utils import flash_attention_mask

from llava_todre.errors import TodreError
from llava_todre.model.llava import LlavaLlamaForCausalLM
from llava_todre.pruners import LayerView, Pruner
from llava_todre.settings import ROLLS_BACK_BY_LAYER
from llava_todre.spans import TokenType
from llava_todre.stage1.layout import Layout
from llava_todre.stage1.select import ImageFeatures
from llava_todre.stage2 import DecoderPruning, LayerInputs, PrunedCache

STEPS = 8
TOLERANCE = {"rtol": 0, "atol": 5e-5}  # 9e-6 measured; logits have a spread of 1

Plan = dict[int, int]
"""Layer -> stride: after it only every stride-th visual token stays (0: none)."""


# ---------------------------------------------------------------- prompts


@dataclass(frozen=True)
class Sample:
    """One prompt: ids with placeholders, the visual tokens of its images, and what it drops."""

    ids: list[int]
    visuals: list[Tensor]
    plan: Plan

    @property
    def num_text(self) -> int:
        """Tokens after the first image; the method below tells samples apart by it."""
        return 0 if IMAGE not in self.ids else len(self.after_image) - self.after_image.count(IMAGE)

    @property
    def after_image(self) -> list[int]:
        return self.ids[self.ids.index(IMAGE) :]


def make_sample(pieces: list[int], images: list[int], plan: Plan | None = None) -> Sample:
    """Return text pieces of given lengths with images of given sizes between them."""
    generator = torch.Generator().manual_seed(sum(pieces) + 100 * len(images))
    ids = [1]
    for index, length in enumerate(pieces):
        ids += torch.randint(2, 290, (length,), generator=generator).tolist()
        ids += [IMAGE] if index < len(images) else []
    visuals = [torch.randn(size, 64, generator=generator) for size in images]
    return Sample(ids, visuals, plan or {})


BATCHES = {
    "one": [make_sample([3, 9], [20], {3: 0})],
    "one, late": [make_sample([3, 9], [20], {6: 0})],
    "one, never": [make_sample([3, 9], [20])],
    "one, after the first layer": [make_sample([3, 9], [20], {0: 0})],
    "one, part": [make_sample([3, 9], [20], {3: 2})],
    "one, part, part, rest": [make_sample([3, 9], [20], {1: 2, 3: 3, 5: 0})],
    "two images with text between": [make_sample([3, 4, 5], [8, 11], {2: 2, 5: 0})],
    "image first": [make_sample([0, 6], [20], {3: 0})],
    "two, padded": [make_sample([3, 9], [20], {3: 0}), make_sample([5, 4], [13], {3: 0})],
    "two, equal lengths": [make_sample([3, 9], [20], {3: 0}), make_sample([5, 9], [18], {3: 0})],
    "two, different layers": [make_sample([3, 9], [20], {3: 0}), make_sample([5, 7], [20], {5: 0})],
    "two, one never": [make_sample([3, 9], [20], {4: 0}), make_sample([5, 7], [20])],
    "two, padded, one never": [make_sample([3, 9], [20]), make_sample([5, 4], [13], {4: 0})],
    "two, padded, parts": [
        make_sample([3, 9], [20], {2: 2, 5: 3}),
        make_sample([5, 4], [13], {3: 2, 5: 0}),
    ],
    "three, mixed": [
        make_sample([3, 9], [20], {3: 0}),
        make_sample([5, 4], [13], {5: 0}),
        make_sample([2, 6], [24]),
    ],
    "three, one without image": [
        make_sample([3, 9], [20], {3: 0}),
        make_sample([25], []),
        make_sample([2, 3, 3], [5, 6], {2: 3}),
    ],
}


@dataclass(frozen=True, kw_only=True)
class Scripted(Pruner):
    """Drops what each sample's plan says, whatever the attention."""

    drops: frozenset[tuple[int, int, int]]
    """(text tokens of the sample, layer, stride)."""
    retain_ratio: float = 1.0

    def probe_layers(self, num_layers: int) -> tuple[int, ...]:
        return tuple(sorted({layer for _, layer, _ in self.drops}))

    def at_layer(self, view: LayerView) -> Tensor | None:
        num_text = int((view.kinds == TokenType.TEXT).sum())
        plan = {layer: stride for text, layer, stride in self.drops if text == num_text}
        stride = plan.get(view.layer)
        if stride is None:
            return None
        return view.patches[::stride] if stride else view.patches[:0]


def batch_of(samples: list[Sample], side: str = "left") -> dict[str, Any]:
    """Return padded ids, their mask, and encoded images."""
    length = max(len(sample.ids) for sample in samples)
    ids = torch.zeros(len(samples), length, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sample in enumerate(samples):
        count = len(sample.ids)
        where = slice(length - count, length) if side == "left" else slice(0, count)
        ids[row, where], mask[row, where] = torch.tensor(sample.ids), 1
    images = [
        ImageFeatures(visual, Layout.of_slots(torch.arange(len(visual)), 1, 4))
        for sample in samples
        for visual in sample.visuals
    ]
    return {"inputs": ids, "attention_mask": mask, "images": images}


def set_plans(
    model: LlavaLlamaForCausalLM, samples: list[Sample], method: type[Scripted] = Scripted
) -> None:
    drops = [(sample.num_text, *drop) for sample in samples for drop in sample.plan.items()]
    model.set_pruner(method(drops=frozenset(drops)))


def generate(model: LlavaLlamaForCausalLM, samples: list[Sample], **options: Any) -> Any:
    """Return ``generate``'s output with tokens, logits and cache."""
    set_plans(model, samples)
    options = {"max_new_tokens": STEPS, "do_sample": False, "output_logits": True} | options
    return model.generate(**batch_of(samples), **options, return_dict_in_generate=True)


def prepared(model: LlavaLlamaForCausalLM, samples: list[Sample]) -> dict[str, Any]:
    """Return what to call the model with: left-padded embeddings, mask and cache."""
    batch = batch_of(samples)
    _, _, mask, cache, embeds, _ = model.prepare_inputs_labels_for_multimodal(
        batch["inputs"], None, batch["attention_mask"], None, None, batch["images"],
        padding_side="left",
    )  # fmt: skip
    return {"inputs_embeds": embeds, "attention_mask": mask, "past_key_values": cache}


class Oracle:
    """What the reference decoder says about samples under their plans."""

    def __init__(self, model: nn.Module) -> None:
        self.decoder = reference.LlamaReference(model)

    def prompt(self, sample: Sample) -> tuple[Tensor, Tensor]:
        """Return (N, D) embeddings and (layers, N) which tokens each layer holds."""
        embeds, kinds = reference.splice(self.decoder.embedding, sample.ids, sample.visuals)
        return embeds, reference.presence(kinds, 8, sample.plan)

    def greedy(self, sample: Sample, steps: int = STEPS) -> tuple[list[int], Tensor]:
        embeds, present = self.prompt(sample)
        return self.decoder.greedy(embeds, steps, present)


def assert_equals_oracle(model: LlavaLlamaForCausalLM, samples: list[Sample], output: Any) -> None:
    """Compare every token and every logit of a greedy generation."""
    oracle = Oracle(model)
    logits = torch.stack(output.logits, dim=1)
    for row, sample in enumerate(samples):
        tokens, expected = oracle.greedy(sample, output.sequences.shape[1])
        assert output.sequences[row].tolist() == tokens, row
        torch.testing.assert_close(logits[row].double(), expected, **TOLERANCE)


def assert_later_layers_hold_fewer_keys(
    model: LlavaLlamaForCausalLM, samples: list[Sample], cache: Any
) -> None:
    present = [Oracle(model).prompt(sample)[1] for sample in samples]
    for layer in range(8):
        prompt = max(int(held[layer].sum()) for held in present)
        assert cache.layers[layer].keys.shape[2] == prompt + STEPS - 1
        assert cache.layers[layer].values.shape[2] == prompt + STEPS - 1


def assert_stats_tell_what_every_layer_held(
    model: LlavaLlamaForCausalLM, samples: list[Sample]
) -> None:
    oracle = Oracle(model)
    assert len(model.last_stats) == len(samples)
    for stats, sample in zip(model.last_stats, samples, strict=True):
        present = oracle.prompt(sample)[1].sum(dim=1).tolist()
        num_text = len(sample.ids) - len(sample.visuals)
        num_visual = sum(len(visual) for visual in sample.visuals)
        assert stats.prompt_tokens_per_layer == tuple(present)
        assert stats.visual_tokens_per_layer == tuple(count - num_text for count in present)
        assert stats.text_tokens == num_text
        assert stats.visual_tokens == stats.kept_tokens == num_visual
        assert stats.newline_tokens == 0
        dropped = [before - after for before, after in zip(present, present[1:], strict=False)]
        assert {probe.layer: probe.dropped for probe in stats.probes} == {
            layer: dropped[layer] for layer in sample.plan
        }
        gone = [layer + 1 for layer, stride in sample.plan.items() if stride == 0]
        assert stats.withdrawn_from == (gone[0] if gone else None)


# ---------------------------------------------------------------- FlashAttention's contract


def flash_contract(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
    scaling: float, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attend as FlashAttention does: causal from the bottom right, mask None or (B, own keys)."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    share = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(share, dim=1) for states in (key, value))
    last = torch.arange(num_keys - num_queries, num_keys)
    visible = (torch.arange(num_keys) <= last[:, None])[None, None]
    if mask is not None:
        assert mask.shape == (len(query), num_keys), "FlashAttention would read the wrong keys"
        visible = visible & mask.bool()[:, None, None]
    logits = (query @ key.transpose(2, 3) * scaling).masked_fill(~visible, -torch.inf)
    weights = logits.softmax(dim=-1).nan_to_num()  # rows of padding are zero, as in the kernel
    return (weights @ value).transpose(1, 2).contiguous(), None


@pytest.fixture(scope="module", autouse=True)
def register_flash_contract() -> Iterator[None]:
    AttentionInterface.register("emulated_flash", flash_contract)
    AttentionMaskInterface.register("emulated_flash", flash_attention_mask)
    yield
    del AttentionInterface._global_mapping["emulated_flash"]
    del AttentionMaskInterface._global_mapping["emulated_flash"]


IMPLEMENTATIONS = ("eager", "sdpa", "emulated_flash")


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> str:
    return request.param


# ---------------------------------------------------------------- off is off


def stock_decoder(model: LlavaLlamaForCausalLM) -> LlamaForCausalLM:
    """Return transformers' own model with the same weights."""
    config = LlamaConfig(**{**model.config.to_dict(), "model_type": "llama"})
    stock = LlamaForCausalLM(config).eval()
    stock.config._attn_implementation = model.config._attn_implementation
    missing, _ = stock.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    return stock


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["one", "two, padded", "three, mixed"])
@torch.no_grad()
def test_off_is_the_stock_decoder_bit_for_bit(
    tiny_llava: Callable[..., LlavaLlamaForCausalLM], implementation, name, side
):
    model = tiny_llava(implementation, tokenizer_padding_side=side)
    samples = BATCHES[name]
    batch = batch_of(samples)
    oracle = Oracle(model)
    longest = max(len(oracle.prompt(sample)[0]) for sample in samples)
    embeds = torch.zeros(len(samples), longest, 64)
    mask = torch.zeros(len(samples), longest, dtype=torch.int64)
    for row, sample in enumerate(samples):
        prompt = oracle.prompt(sample)[0].float()
        where = slice(longest - len(prompt), None) if side == "left" else slice(0, len(prompt))
        embeds[row, where], mask[row, where] = prompt, 1
    call = {"inputs_embeds": embeds, "attention_mask": None if mask.all() else mask}
    expected = stock_decoder(model)(**call).logits
    real = mask.bool()
    off = {"retain_ratio": 1.0}
    for method, options in [
        ("vanilla", {}),
        ("random", off),
        ("todre", off | {"probe_depths": ()}),
        ("todre_v1", off | {"probe_depths": ()}),
        ("todre", off | {"tau": 0.0}),  # looks, but never drops
    ]:
        model.set_pruner(method, **options)
        logits = model(batch["inputs"], batch["attention_mask"], images=batch["images"]).logits
        assert torch.equal(logits[real], expected[real]), method
    assert torch.equal(model(**call).logits, expected)


@pytest.mark.parametrize("name", ["one", "two, padded"])
def test_off_generates_as_the_stock_decoder(tiny_llava, implementation, name):
    model = tiny_llava(implementation)
    options = {"max_new_tokens": STEPS, "do_sample": False}
    expected = stock_decoder(model).generate(**prepared(model, BATCHES[name]), **options)
    model.set_pruner("todre", retain_ratio=1.0, probe_depths=())
    assert torch.equal(model.generate(**batch_of(BATCHES[name]), **options), expected)


# ---------------------------------------------------------------- dropping equals masking


@pytest.mark.parametrize("name", BATCHES)
@torch.no_grad()
def test_prefill_equals_masking_the_dropped_keys(tiny_llava, implementation, name):
    """With a cache and without, in turn: each with every batch and every implementation."""
    use_cache = (IMPLEMENTATIONS.index(implementation) + list(BATCHES).index(name)) % 2 == 0
    model = tiny_llava(implementation)
    samples = BATCHES[name]
    set_plans(model, samples)
    logits = model(**prepared(model, samples), use_cache=use_cache).logits
    oracle = Oracle(model)
    for row, sample in enumerate(samples):
        prompt, present = oracle.prompt(sample)
        remaining = present[-1]
        expected = oracle.decoder.run(prompt, present).logits[remaining]
        got = logits[row, -int(remaining.sum()) :]
        torch.testing.assert_close(got.double(), expected, **TOLERANCE)
    longest = max(int(oracle.prompt(sample)[1][-1].sum()) for sample in samples)
    assert logits.shape[1] == longest, "the tensors are as short as the longest sample allows"


@torch.no_grad()
def test_right_padded_prompts_are_repacked_too(tiny_llava, implementation):
    """A plain forward pads on the checkpoint's side, which is the right."""
    model = tiny_llava(implementation)
    samples = BATCHES["three, mixed"]
    set_plans(model, samples)
    batch = batch_of(samples, side="right")
    batch["input_ids"] = batch.pop("inputs")
    logits = model(**batch).logits
    oracle = Oracle(model)
    for row, sample in enumerate(samples):
        prompt, present = oracle.prompt(sample)
        expected = oracle.decoder.run(prompt, present).logits[present[-1]]
        got = logits[row, -len(expected) :]
        torch.testing.assert_close(got.double(), expected, **TOLERANCE)


# ---------------------------------------------------------------- cached decoding


@pytest.mark.parametrize(
    ("implementation", "name"),
    [
        (implementation, name)
        for implementation in IMPLEMENTATIONS
        for name in BATCHES
        if implementation == "sdpa" or name.startswith(("two, ", "three, "))
    ],
)
def test_cached_decoding_equals_starting_over(tiny_llava, implementation, name):
    """Batches with every kind of mask, samples alone with one."""
    model = tiny_llava(implementation)
    output = generate(model, BATCHES[name])
    assert_equals_oracle(model, BATCHES[name], output)
    assert_later_layers_hold_fewer_keys(model, BATCHES[name], output.past_key_values)
    assert_stats_tell_what_every_layer_held(model, BATCHES[name])


@pytest.mark.parametrize(("attention", "key_heads"), [("eager", 1), ("sdpa", 4)])
def test_any_number_of_key_heads(tiny_llava, attention, key_heads):
    model = tiny_llava(attention, seed=1, num_key_value_heads=key_heads)
    samples = BATCHES["three, mixed"]
    assert_equals_oracle(model, samples, generate(model, samples))


def test_a_batch_of_three_equals_three_singles(tiny_llava, implementation):
    model = tiny_llava(implementation)
    samples = BATCHES["three, mixed"]
    together = generate(model, samples)
    for row, sample in enumerate(samples):
        alone = generate(model, [sample])
        assert torch.equal(together.sequences[row], alone.sequences[0])
        for step, logits in enumerate(alone.logits):
            torch.testing.assert_close(together.logits[step][row], logits[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("attention", "dtype"), [("sdpa", torch.float16), ("eager", torch.bfloat16)]
)
def test_half_precision_follows_single(tiny_llava, attention, dtype):
    """Masks and filler rows must not overflow; the answers may differ by rounding."""
    samples = BATCHES["three, mixed"]
    single = generate(tiny_llava(attention), samples, max_new_tokens=1).logits[0]
    half = generate(tiny_llava(attention).to(dtype), samples, max_new_tokens=1).logits[0]
    assert half.isfinite().all()
    assert (half.float() - single).abs().mean() < 0.1 * single.std()


def test_padding_side_of_the_ids_does_not_matter(tiny_llava):
    model = tiny_llava()
    samples = BATCHES["two, padded, parts"]
    set_plans(model, samples)
    left, right = (
        model.generate(**batch_of(samples, side), max_new_tokens=STEPS, do_sample=False)
        for side in ("left", "right")
    )
    assert torch.equal(left, right)


@pytest.mark.parametrize("name", ["one", "two, padded, parts", "two, one never"])
def test_beam_search_equals_beam_search_that_starts_over(tiny_llava, attention, name):
    model = tiny_llava(attention)
    samples = BATCHES[name]
    output = generate(model, samples, num_beams=3, max_new_tokens=6)
    oracle = Oracle(model)
    for row, sample in enumerate(samples):
        embeds, present = oracle.prompt(sample)
        assert output.sequences[row].tolist() == oracle.decoder.beams(embeds, 6, 3, present)
    for stats, sample in zip(model.last_stats, samples, strict=True):
        present = oracle.prompt(sample)[1]
        assert stats.prompt_tokens_per_layer == tuple(present.sum(1).tolist())


def test_prompt_lookup_rolls_back_rightly(tiny_llava, implementation):
    """Candidates are checked several at a time (q_len > 1) and rejected ones leave the cache."""
    model = tiny_llava(implementation)
    samples = [make_sample([3, 9], [20], {3: 0})]
    set_plans(model, samples)
    if not ROLLS_BACK_BY_LAYER:
        with pytest.raises(TodreError, match="prompt_lookup_num_tokens is not supported"):
            model.generate(**batch_of(samples), prompt_lookup_num_tokens=3)
        return
    tokens = model.generate(
        **batch_of(samples), max_new_tokens=16, do_sample=False, prompt_lookup_num_tokens=3
    )
    expected, _ = Oracle(model).greedy(samples[0], 16)
    assert tokens[0].tolist() == expected
    assert len(set(expected)) < len(expected) - 2, "the answer repeats itself, so there are some"


@pytest.mark.parametrize("name", ["one", "two, padded", "two, different layers", "three, mixed"])
@torch.no_grad()
def test_a_second_turn_continues_a_withdrawn_cache(tiny_llava, implementation, name, draw):
    model = tiny_llava(implementation)
    samples = BATCHES[name]
    set_plans(model, samples)
    call = prepared(model, samples)
    mask, cache = call["attention_mask"], call["past_key_values"]
    model(**call)
    oracle = Oracle(model)
    grown = [oracle.prompt(sample) for sample in samples]
    for num_new in (6, 1, 3):
        new = torch.randint(2, 290, (len(samples), num_new), generator=draw)
        if mask is not None:
            mask = torch.cat([mask, torch.ones_like(new)], dim=1)
        logits = model(input_ids=new, attention_mask=mask, past_key_values=cache).logits
        for row, tokens in enumerate(new.tolist()):
            grown[row] = oracle.decoder.extend(*grown[row], *tokens)
            expected = oracle.decoder.run(*grown[row]).logits[-num_new:]
            torch.testing.assert_close(logits[row].double(), expected, **TOLERANCE)


@torch.no_grad()
def test_state_lives_with_the_cache(tiny_llava):
    """Two conversations of one model, under two methods, take turns without mixing."""
    model = tiny_llava()
    oracle = Oracle(model)
    talks = []
    for sample in (make_sample([3, 9], [20], {3: 0}), make_sample([5, 4], [13], {1: 2, 5: 0})):
        batch = batch_of([sample])
        set_plans(model, [sample])
        output = model(input_ids=batch["inputs"], images=batch["images"])
        tokens, _ = oracle.greedy(sample)
        assert int(output.logits[0, -1].argmax()) == tokens[0]
        talks.append((output.past_key_values, tokens))
    model.set_pruner("vanilla")
    for step in range(1, STEPS):
        for cache, tokens in talks:
            logits = model(torch.tensor([[tokens[step - 1]]]), past_key_values=cache).logits
            assert int(logits[0, -1].argmax()) == tokens[step]


# ---------------------------------------------------------------- what a method sees


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", ["one", "two, padded, parts", "three, one without image"])
@torch.no_grad()
def test_a_method_sees_one_sample_without_padding(tiny_llava, attention, name, use_cache):
    """Kinds, hidden states and attention of the tokens still present, before and after drops."""
    seen: list[tuple[int, Tensor, Tensor, Tensor]] = []

    @dataclass(frozen=True, kw_only=True)
    class Watching(Scripted):
        def probe_layers(self, num_layers: int) -> tuple[int, ...]:
            return tuple(range(num_layers))

        def at_layer(self, view: LayerView) -> Tensor | None:
            rows = torch.arange(len(view.kinds))
            seen.append((view.layer, view.kinds, view.hidden_states(), view.attention(rows)))
            assert view.num_layers == 8
            return super().at_layer(view)

    model = tiny_llava(attention)
    samples = BATCHES[name]
    set_plans(model, samples, Watching)
    model(**prepared(model, samples), use_cache=use_cache)
    oracle = Oracle(model)
    runs = []
    for sample in samples:
        prompt, present = oracle.prompt(sample)
        kinds = reference.splice(oracle.decoder.embedding, sample.ids, sample.visuals)[1]
        runs.append((kinds, present, oracle.decoder.run(prompt, present)))
    assert [layer for layer, *_ in seen] == sorted(list(range(8)) * len(samples))
    for index, (layer, kinds, hidden, weights) in enumerate(seen):
        all_kinds, present, run = runs[index % len(samples)]
        held = present[layer]
        assert kinds.tolist() == all_kinds[held].tolist()
        torch.testing.assert_close(hidden.double(), run.hidden[layer][held], **TOLERANCE)
        expected = run.attention[layer][:, held][:, :, held]
        torch.testing.assert_close(weights.double(), expected, rtol=0, atol=1e-5)


# ---------------------------------------------------------------- the tests can fail


def no_repair_in_decode(
    self: DecoderPruning,
    layer: int,
    inputs: LayerInputs,
    cache: Any,
    flash: bool,
    module: Any = None,
) -> LayerInputs:
    """Do what ``DecoderPruning.enter`` does, except re-expressing masks after the prefill."""
    return inputs if not self.prefilling else _ENTER(self, layer, inputs, cache, flash, module)


_ENTER = DecoderPruning.enter


@pytest.mark.parametrize("name", ["two, padded", "two, different layers", "three, mixed"])
def test_without_mask_repair_the_oracle_disagrees(tiny_llava, implementation, name, monkeypatch):
    monkeypatch.setattr(DecoderPruning, "enter", no_repair_in_decode)
    model = tiny_llava(implementation)
    with pytest.raises((AssertionError, RuntimeError)):
        assert_equals_oracle(model, BATCHES[name], generate(model, BATCHES[name]))


@pytest.mark.parametrize("name", [name for name in BATCHES if name != "one, never"])
def test_dropping_changes_the_answer(tiny_llava, name):
    oracle = Oracle(tiny_llava())
    for sample in BATCHES[name]:
        if sample.plan:
            _, with_drops = oracle.greedy(sample, 1)
            _, without = oracle.greedy(Sample(sample.ids, sample.visuals, {}), 1)
            assert (with_drops - without).abs().max() > 0.02


# ---------------------------------------------------------------- lengths and reports


def test_todre_withdraws_by_its_ratios(tiny_llava):
    """The whole of Stage 2 through the model: tau above the largest ratio, then below it."""
    model = tiny_llava()
    sample = make_sample([3, 9], [20])
    batch = batch_of([sample])
    model.set_pruner("todre", retain_ratio=1.0, tau=0.0)
    model.generate(**batch, max_new_tokens=1, do_sample=False)
    (probe,) = model.last_stats[0].probes
    assert (probe.layer, probe.dropped, probe.visual_to_text) == (7, 0, 0.0)
    for change, withdrawn_from in ((1e-4, 6), (-1e-4, None)):
        model.set_pruner("todre", retain_ratio=1.0, tau=0.0, probe_depths=(5 / 8,))
        model.generate(**batch, max_new_tokens=1, do_sample=False)
        (probe,) = model.last_stats[0].probes
        tau = probe.text_to_visual + change
        model.set_pruner("todre", retain_ratio=1.0, tau=tau, probe_depths=(5 / 8,))
        output = model.generate(
            **batch, max_new_tokens=STEPS, do_sample=False,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        assert model.last_stats[0].withdrawn_from == withdrawn_from
        plan = {5: 0} if withdrawn_from else {}
        assert_equals_oracle(model, [Sample(sample.ids, sample.visuals, plan)], output)


def test_nothing_can_be_dropped_after_the_last_layer(tiny_llava):
    model = tiny_llava()
    samples = [make_sample([3, 9], [20], {7: 0})]
    output = generate(model, samples)
    assert_equals_oracle(model, [make_sample([3, 9], [20])], output)
    stats = model.last_stats[0]
    assert stats.prompt_tokens_per_layer == (33,) * 8
    assert stats.withdrawn_from is None
    assert sum(probe.dropped for probe in stats.probes) == 0


@torch.no_grad()
def test_running_the_same_prompt_again_starts_over(tiny_llava):
    decisions = [True, True, False]  # the method may decide otherwise the next time

    class Fickle(Scripted):
        def at_layer(self, view: LayerView) -> Tensor | None:
            return super().at_layer(view) if decisions.pop(0) else None

    model = tiny_llava()
    samples = [make_sample([3, 9], [20], {3: 0})]
    set_plans(model, samples, Fickle)
    call = prepared(model, samples) | {"use_cache": False}
    assert torch.equal(model(**call).logits, model(**call).logits)
    assert len(model.last_stats[0].probes) == 1
    assert torch.equal(model(**call).logits, model(inputs_embeds=call["inputs_embeds"]).logits)
    assert model.last_stats[0].prompt_tokens_per_layer == (33,) * 8


# ---------------------------------------------------------------- refusals


def test_without_stage_2_nothing_is_refused(tiny_llava):
    model = tiny_llava()
    batch = batch_of([make_sample([3, 9], [20])])
    ids = batch["inputs"]
    labels = ids.masked_fill(ids == IMAGE, -100)
    model.set_pruner("todre", retain_ratio=1.0, probe_depths=())
    loss = model.train()(input_ids=ids, images=batch["images"], labels=labels).loss
    assert torch.isfinite(loss)
    static = StaticCache(config=model.config, max_cache_len=64)
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = model.eval().generate(**batch, **options)
    assert torch.equal(model.generate(**batch, **options, past_key_values=static), expected)


@pytest.mark.parametrize("what", ["labels", "training"])
def test_training_and_losses_are_refused(tiny_llava, what):
    model = tiny_llava()
    samples = [make_sample([3, 9], [20], {3: 0})]
    set_plans(model, samples)
    batch = batch_of(samples)
    labels = batch["inputs"] if what == "labels" else None
    model.train(what == "training")
    with pytest.raises(TodreError, match="training and losses .* probe_depths"):
        model(input_ids=batch["inputs"], images=batch["images"], labels=labels)


def test_a_static_cache_is_refused(tiny_llava):
    model = tiny_llava()
    static = StaticCache(config=model.config, max_cache_len=64)
    with pytest.raises(TodreError, match="past_key_values must be a DynamicCache, got StaticCache"):
        generate(model, [make_sample([3, 9], [20], {3: 0})], past_key_values=static)


@torch.no_grad()
def test_a_prompt_in_pieces_is_refused(tiny_llava):
    model = tiny_llava()
    samples = [make_sample([3, 9], [20], {3: 0})]
    set_plans(model, samples)
    call = prepared(model, samples)
    call["inputs_embeds"] = call["inputs_embeds"][:, :16]
    with pytest.raises(TodreError, match="prompt of 16 tokens, expected 33: chunked prefill"):
        model(**call)


def test_an_empty_dynamic_cache_of_the_caller_is_used(tiny_llava):
    model = tiny_llava()
    samples = [make_sample([3, 9], [20], {3: 0})]
    mine = DynamicCache(config=model.config)
    output = generate(model, samples, past_key_values=mine)
    assert output.past_key_values is mine
    assert_equals_oracle(model, samples, output)


@torch.no_grad()
def test_a_copy_of_a_cache_goes_on_by_itself(tiny_llava):
    model = tiny_llava()
    samples = [make_sample([3, 9], [20], {3: 0})]
    set_plans(model, samples)
    call = prepared(model, samples)
    call["past_key_values"] = PrunedCache.convert(
        DynamicCache(config=model.config), call["past_key_values"].state
    )
    model(**call)
    cache = call["past_key_values"]
    copied = copy.deepcopy(cache)
    assert copied.state is not cache.state and cache.num_bytes == copied.num_bytes
    prompt = Oracle(model).prompt(samples[0])
    for held, tokens in ((copied, [7, 8]), (cache, [9])):
        logits = model(torch.tensor([tokens]), past_key_values=held).logits[0]
        oracle = Oracle(model).decoder
        expected = oracle.run(*oracle.extend(*prompt, *tokens)).logits[-len(tokens) :]
        torch.testing.assert_close(logits.double(), expected, **TOLERANCE)


@torch.no_grad()
def test_the_queries_of_a_probed_layer_are_its_own_and_nothing_stays_on_it(
    tiny_llava: Callable[..., LlavaLlamaForCausalLM],
) -> None:
    """One call of the query projection per layer, and no hook afterwards, nor after a failure."""
    model = tiny_llava("sdpa")
    model.set_pruner("todre", retain_ratio=0.25, probe_depths=(0.25, 0.5))
    pixels = [torch.randn(5, 3, 56, 56, generator=torch.Generator().manual_seed(1))]
    ids = torch.tensor([[1, -200, 7, 8]])
    given = {"images": pixels, "image_sizes": [(112, 112)], "max_new_tokens": 1}
    calls: list[int] = []
    projections = [layer.self_attn.q_proj for layer in model.model.layers]
    counters = [
        each.register_forward_hook(lambda *_, index=index: calls.append(index))
        for index, each in enumerate(projections)
    ]
    model.generate(ids, **given)
    assert calls == list(range(8))
    assert len(model.last_stats[0].probes) == 2
    for counter in counters:
        counter.remove()

    def fail(*_: object) -> None:
        raise RuntimeError("planted")

    breaking = model.model.layers[2].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="planted"):
        model.generate(ids, **given)
    breaking.remove()
    assert not any(each._forward_hooks for each in projections)
