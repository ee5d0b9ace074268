"""Which decoders a method can look into: those whose attention it is told as it is."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from checks import Strides

from llava_todre import hf
from llava_todre.errors import TodreError
from llava_todre.stage2.hooks import READABLE

STAGE_1 = Strides(retain_ratio=0.25)
STAGE_2 = Strides(retain_ratio=0.25, plan=((9, 3, 0),))
NEXT = {"max_new_tokens": 1, "do_sample": False}
READ = ("Llama", "Mistral", "Mixtral", "Qwen2", "Qwen2Moe", "Qwen3", "Qwen3Moe")


def model_on(decoder: str, monkeypatch: pytest.MonkeyPatch, **text: Any) -> Any:
    monkeypatch.setitem(tiny.DECODERS, "this", f"{decoder}Config")
    return tiny.build("llava", "this", "eager", **text)


@pytest.mark.parametrize("decoder", READ)
def test_a_probe_tells_the_attention_that_the_layer_computes(
    decoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    window = {"sliding_window": None} if decoder in ("Mistral", "Mixtral") else {}
    model = model_on(decoder, monkeypatch, head_dim=16, **window)
    inputs = tiny.inputs_for(model, tiny.ONE)
    asked = {"output_attentions": True, "return_dict_in_generate": True}
    maps = model.generate(**inputs, **NEXT, **asked).attentions[0]
    is_visual = inputs["input_ids"][0] == tiny.IMAGE_ID
    is_text = ~is_visual & (is_visual.cumsum(0) > 0)
    with hf.prune(model, "todre", retain_ratio=1.0, tau=0.0, probe_depths=(3 / 8, 5 / 8)):
        model.generate(**inputs, **NEXT)
        probes = hf.last_stats(model)[0].probes
    for probe in probes:
        paid = maps[probe.layer][0].mean(dim=0)[is_text][:, is_visual].sum(dim=1).mean()
        assert probe.text_to_visual == pytest.approx(float(paid), abs=1e-5)
    assert [probe.layer for probe in probes] == [3, 5]


def test_each_of_them_is_compared_here_or_with_the_slow_decoder() -> None:
    families = [tiny.model_of(family) for family in tiny.QWEN]
    seen = {type(each.model.language_model.layers[0].self_attn).__name__ for each in families}
    assert {f"{decoder}Attention" for decoder in READ} | seen == READABLE


@pytest.mark.parametrize(
    ("decoder", "text", "name"),
    [
        ("Cohere", {"head_dim": 16}, "CohereAttention"),  # rotates neighbours, not halves
        ("Phi3", {}, "Phi3Attention"),  # one projection for all
        ("OPT", {}, "OPTModel"),  # keeps its layers elsewhere
    ],
)
def test_other_decoders_are_refused_inside_and_served_before(
    decoder: str, text: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_on(decoder, monkeypatch, **text)
    with pytest.raises(TodreError, match=f"decoder must be one of Llama.*, got {name}") as caught:
        hf.attach(model, STAGE_2)
    assert "\n" not in str(caught.value)
    inputs = tiny.inputs_for(model, tiny.ONE)
    with hf.prune(model, STAGE_1):
        output = model.generate(**inputs, **NEXT)
        assert hf.last_stats(model)[0].kept_tokens == 4
    assert torch.equal(output[:, :-1], inputs["input_ids"])
