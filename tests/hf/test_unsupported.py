"""Models that cannot be pruned are refused before anything expensive happens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import llava_todre.hf.load
from llava_todre.errors import TodreError
from llava_todre.hf import attach
from llava_todre.hf.load import load_stock_model


def test_our_own_class_says_how_it_prunes(tiny_llava: Any) -> None:
    with pytest.raises(TodreError, match="call its set_pruner"):
        attach(tiny_llava())


def test_a_class_of_the_same_name_from_elsewhere_is_refused() -> None:
    class LlavaLlamaForCausalLM(nn.Module):
        pass

    with pytest.raises(TodreError, match=r"must be one of .* llava\.LlavaLlamaFor.*, got LlavaL"):
        attach(LlavaLlamaForCausalLM())


@pytest.mark.parametrize(
    ("model_type", "name"), [("gemma3", "Gemma3ForConditionalGeneration"), ("llama", "llama")]
)
def test_the_configuration_is_enough_to_refuse_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, name: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))

    class Weights:
        @staticmethod
        def from_pretrained(*args: Any, **options: Any) -> Any:
            raise AssertionError("weights were asked for")

    monkeypatch.setattr(llava_todre.hf.load, "AutoModelForImageTextToText", Weights)
    with pytest.raises(TodreError, match=f"model must be one of Llava.*, got {name}") as caught:
        load_stock_model(str(tmp_path))
    assert "\n" not in str(caught.value)
