"""FLOPs of a pruned prefill, the method's own probes included, against PyTorch's counter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import MeasureAll
from test_in_decoder import METHODS
from torch.utils.flop_counter import FlopCounterMode
from transformers.cache_utils import DynamicCache

from llava_todre.flops import decoder_prefill_flops
from llava_todre.model.llava import LlavaLlamaForCausalLM
from llava_todre.pruners import Observed, Pruner, create_pruner
from llava_todre.work import prefill_work

ASKED = METHODS | {"todre_v1": {"tau": 0.0}, "todre": {"text_set": "all", "tau": 0.0}}


def counted(model: LlavaLlamaForCausalLM) -> int:
    """Return what PyTorch counts of the decoder on one picture with a question on both sides."""
    draw = torch.Generator().manual_seed(3)
    ids = torch.tensor([[1, 5, 9, 31, 80, 17, -200, 7, 8, 11, 12, 60, 4, 99, 2, 45]])
    images = [torch.randn(5, 3, 56, 56, generator=draw)]
    with torch.no_grad():
        prepared = model.prepare_inputs_labels_for_multimodal(
            ids, None, None, None, None, images, [(112, 100)]
        )
        cache, embeds = prepared[3], prepared[4]
        cache = DynamicCache(config=model.config) if cache is None else cache
        with FlopCounterMode(display=False) as counter:
            model(inputs_embeds=embeds, past_key_values=cache, logits_to_keep=1)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("name", ASKED)
def test_a_pruned_prefill_equals_the_torch_counter(
    name: str, tiny_llava: Callable[..., LlavaLlamaForCausalLM]
) -> None:
    model = tiny_llava("eager")
    model.set_pruner(create_pruner(name.partition(",")[0], **ASKED[name]))
    total = counted(model)
    (stats,) = model.last_stats
    work = prefill_work(model, stats)
    assert work is not None and work.flops == pytest.approx(total, rel=2e-3)
    layers = decoder_prefill_flops(model.decoder_shape, stats.prompt_tokens_per_layer)
    assert work.probe_flops == stats.probe_flops == work.flops - layers
    assert (work.probe_flops > 0) == (name != "vtw"), "which looks at nothing"
    if name == "pyramiddrop":
        assert work.probe_flops > 0.02 * total


def test_observing_a_method_is_not_its_work(
    tiny_llava: Callable[..., LlavaLlamaForCausalLM],
) -> None:
    model, spent = tiny_llava("eager"), []
    method = create_pruner("pyramiddrop", retain_ratio=0.25)
    asked: list[Pruner] = [method, Observed(method=method), MeasureAll()]
    for pruner in asked:
        model.set_pruner(pruner)
        counted(model)
        spent.append(model.last_stats[0].probe_flops)
    assert spent[0] == spent[1] > 0 and spent[2] > 0


def test_work_is_not_told_where_it_is_not_known(
    tiny_llava: Callable[..., LlavaLlamaForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = tiny_llava()
    counted(model)
    assert prefill_work(model, model.last_stats[0]) is not None
    monkeypatch.setattr(type(model.config), "model_type", "mamba")
    assert prefill_work(model, model.last_stats[0]) is None
