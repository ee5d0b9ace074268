"""Run a method on a stock model, and compare every token and logit with the oracle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from oracle import Oracle, Stage
from test_withdrawal import flash_contract
from tiny import IMAGE_ID, VIDEO_ID, Sample, inputs_for
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from llava_todre import hf
from llava_todre.pruners import LayerView, Pruner
from llava_todre.spans import TokenType, VisualTokens
from llava_todre.stats import PruneStats

STEPS = 8
ANY = -1
GREEDY = {"max_new_tokens": STEPS, "do_sample": False}
TOLERANCE = {"rtol": 0, "atol": 5e-5}
PROBES = (3 / 8, 4 / 8, 5 / 8, 6 / 8)


@dataclass(frozen=True, kw_only=True)
class Watch(Pruner):
    """Keeps the first tokens, and remembers what it was given."""

    quantity: str
    """Of the tower, that it asks for."""
    seen: list[VisualTokens] = field(default_factory=list)
    layer: int = 0

    @property
    def needs(self) -> frozenset[Any]:
        return frozenset({(self.quantity, self.layer)})

    def select(self, tokens: VisualTokens, num_keep: int) -> Tensor:
        self.seen.append(tokens)
        return torch.arange(num_keep)


@dataclass(frozen=True, kw_only=True)
class Strides(Pruner):
    """Selects at random, the same for all models; drops by plan inside the decoder."""

    plan: tuple[tuple[int, int, int], ...] = ()
    """(text tokens behind the first image or ANY, layer, stride): of the visual tokens still
    there, every stride-th stays; 0 is none."""

    def select(self, tokens: VisualTokens, num_keep: int) -> Tensor:
        draw = torch.Generator().manual_seed(len(tokens))
        return torch.randperm(len(tokens), generator=draw)[:num_keep]

    def probe_layers(self, num_layers: int) -> tuple[int, ...]:
        return tuple(sorted({layer for _, layer, _ in self.plan}))

    def at_layer(self, view: LayerView) -> Tensor | None:
        num_text = int((view.kinds == TokenType.TEXT).sum())
        strides = {layer: stride for layer, stride in self.steps(num_text)}
        if view.layer not in strides:
            return None
        stride = strides[view.layer]
        return view.patches[::stride] if stride else view.patches[:0]

    def stages(self, stats: PruneStats, num_text: int) -> list[Stage]:
        """Return what a sample must have gone through."""
        held = [set(image.keep_idx.tolist()) for image in stats.images]
        stages = [(0, held)]
        for layer, stride in self.steps(num_text):
            still = [(i, patch) for i, image in enumerate(held) for patch in sorted(image)]
            chosen = set(still[::stride] if stride else [])
            held = [{p for i, p in chosen if i == image} for image in range(len(held))]
            stages.append((layer + 1, held))
        return stages

    def steps(self, num_text: int) -> list[tuple[int, int]]:
        """Return (layer, stride) of a sample with so many text tokens behind its first image."""
        return sorted((at, stride) for text, at, stride in self.plan if text in (ANY, num_text))


def text_behind(inputs: dict[str, Any], row: int) -> int:
    """Return the text tokens behind the first image or video of a sample."""
    ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
    is_visual = torch.isin(ids, torch.tensor([IMAGE_ID, VIDEO_ID]))
    first = int(is_visual.nonzero()[0]) if bool(is_visual.any()) else len(ids)
    return int((~is_visual[first:]).sum())


def planned(
    inputs: dict[str, Any], ratio: float, *plan: tuple[int, int, int], **options: Any
) -> Strides:
    """Return a method that drops by (sample, layer, stride)."""
    by_text = tuple((text_behind(inputs, row), layer, stride) for row, layer, stride in plan)
    assert len({text for text, _, _ in by_text}) == len({row for row, _, _ in plan})
    return Strides(retain_ratio=ratio, plan=by_text, **options)


def run(
    model: Any, inputs: dict[str, Any], method: str | Pruner, steps: int = STEPS, **knobs: Any
) -> tuple[Any, tuple[PruneStats, ...]]:
    """Return the greedy answer with its logits, and what happened."""
    more = {"max_new_tokens": steps, "output_logits": True, "return_dict_in_generate": True}
    with hf.prune(model, method, **knobs):
        output = model.generate(**inputs, **(GREEDY | more))
        assert output.sequences.shape[1] == inputs["input_ids"].shape[1] + steps
        return output, hf.last_stats(model)


def assert_follows(
    model: Any, inputs: dict[str, Any], method: Strides, steps: int = STEPS
) -> tuple[PruneStats, ...]:
    """Compare greedy answers of a plan with the oracle."""
    output, stats = run(model, inputs, method, steps)
    rows = range(len(stats))
    stages = [method.stages(stats[row], text_behind(inputs, row)) for row in rows]
    assert_equals_oracle(model, inputs, output, stages, method.newlines)
    return stats


def assert_equals_oracle(
    model: Any,
    inputs: dict[str, Any],
    output: Any,
    stages: Sequence[list[Stage]],
    newlines: str = "row",
) -> None:
    """Compare every token and logit of greedy answers."""
    length = inputs["input_ids"].shape[1]
    assert torch.equal(output.sequences[:, :length], inputs["input_ids"])
    logits = torch.stack(output.logits, dim=1)
    oracle = Oracle(model, inputs, newlines)
    for row, of_row in enumerate(stages):
        tokens = output.sequences[row, length:]
        expected = oracle.logits(row, of_row, tokens.tolist())
        assert torch.equal(tokens, expected.argmax(dim=-1)), row
        torch.testing.assert_close(logits[row].double(), expected, **TOLERANCE)


def assert_stats_tell_what_was_kept(
    stats: PruneStats, stages: list[Stage], oracle: Oracle, row: int
) -> None:
    whole = oracle.held(row, [set(range(image.num_tokens)) for image in stats.images])
    is_visual = torch.isin(oracle.samples[row].ids, torch.tensor([IMAGE_ID, VIDEO_ID]))
    assert stats.unpruned_prompt_tokens == len(whole)
    for layer in range(oracle.num_layers):
        kept = [held for start, held in stages if start <= layer][-1]
        present = oracle.held(row, kept)
        assert stats.prompt_tokens_per_layer[layer] == int(present.sum())
        assert stats.visual_tokens_per_layer[layer] == int((present & is_visual).sum())


def tau_between(model: Any, samples: Sequence[Sample], ratio: float) -> float:
    """Return a threshold under which samples with images withdraw at as many layers as can be."""
    knobs = {"retain_ratio": ratio, "probe_depths": PROBES}
    with hf.prune(model, "todre", tau=0.0, **knobs):
        model.generate(**inputs_for(model, samples), max_new_tokens=1)
        stats = hf.last_stats(model)
    shares = [
        [max(probe.text_to_visual, probe.visual_to_text) for probe in of_sample.probes]
        for of_sample in stats
        if of_sample.images
    ]

    def layers(tau: float) -> list[int]:
        return [next((i for i, s in enumerate(row) if s < tau), len(row)) for row in shares]

    candidates = sorted(share + 1e-6 for row in shares for share in row)
    return min(1.0, max(candidates, key=lambda tau: (len(set(layers(tau))), -sum(layers(tau)))))


@contextmanager
def emulated_flash(model: Any) -> Iterator[list[int]]:
    """Let the decoder attend as FlashAttention does; counts the calls."""
    calls: list[int] = []

    def attend(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(query.shape[2])
        return flash_contract(module, query, *args, **kwargs)

    config = model.model.language_model.config
    before = config._attn_implementation
    AttentionInterface.register("emulated_flash", attend)
    AttentionMaskInterface.register("emulated_flash", flash_attention_mask)
    config._attn_implementation = "emulated_flash"
    try:
        yield calls
    finally:
        config._attn_implementation = before
        del AttentionInterface._global_mapping["emulated_flash"]
        del AttentionMaskInterface._global_mapping["emulated_flash"]
