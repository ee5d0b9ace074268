"""Models that cannot be pruned are refused before anything expensive happens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import llava_todre.hf.stock
from llava_todre.errors import TodreError
from llava_todre.hf.stock import load_stock_model


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

    monkeypatch.setattr(llava_todre.hf.stock, "AutoModelForImageTextToText", Weights)
    with pytest.raises(
        TodreError, match=f"model {name} is not supported; allowed: Llava"
    ) as caught:
        load_stock_model(str(tmp_path))
    assert "\n" not in str(caught.value)
