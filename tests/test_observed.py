"""A method with every layer measured does what the method does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import IMAGE

from llava_todre.model.llava import LlavaLlamaForCausalLM
from llava_todre.pruners import PRUNERS, Observed, create_pruner

METHODS = [name for name in PRUNERS if "clip_similarity" not in create_pruner(name).needs]


@pytest.mark.parametrize("method", METHODS)
def test_a_method_keeps_drops_and_answers_the_same_when_observed(
    tiny_llava: Callable[..., LlavaLlamaForCausalLM], draw: torch.Generator, method: str
) -> None:
    model = tiny_llava()
    pixels = torch.randn(1, 5, 3, 56, 56, generator=draw)
    ids = torch.tensor([[1, 5, 6, IMAGE, 7, 8, 9, 10]])
    options: dict[str, Any] = {} if method == "vanilla" else {"retain_ratio": 0.25}
    if method.startswith("todre"):
        options["tau"] = 0.6

    def run(pruner: Any) -> Any:
        model.set_pruner(pruner)
        new = model.generate(
            ids, images=pixels, image_sizes=[(120, 80)], max_new_tokens=4, do_sample=False
        )
        return new, model.last_stats[0]

    plain = create_pruner(method, **options)
    (new, stats), (same, observed) = run(plain), run(Observed(method=plain))
    assert torch.equal(new, same)
    assert observed.visual_tokens_per_layer == stats.visual_tokens_per_layer
    assert torch.equal(observed.images[0].keep_idx, stats.images[0].keep_idx)
    dropped = {probe.layer: probe.dropped for probe in stats.probes if probe.dropped}
    assert {probe.layer: probe.dropped for probe in observed.probes if probe.dropped} == dropped
    holding = [layer for layer, count in enumerate(stats.visual_tokens_per_layer) if count]
    assert [probe.layer for probe in observed.probes] == holding
    measured = {probe.layer: probe.text_to_visual for probe in observed.probes}
    assert all(0 < share <= 1 for share in measured.values() if share is not None)
    for probe in stats.probes:
        if probe.text_to_visual is not None:
            assert measured[probe.layer] == probe.text_to_visual
    assert None not in measured.values()
