"""Stock models with quantised weights keep what they keep with the same weights, dequantised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quantised import FORMATS, MAIN, configuration, make_twin
from tiny import ONE, build, inputs_for
from transformers import AutoModelForImageTextToText

from llava_todre import hf
from llava_todre.hf.families import family_of
from llava_todre.hf.load import load_stock_model, uses_stock
from llava_todre.model.load import load_pretrained_model
from llava_todre.pruners import PRUNERS, Pruner, create_pruner


@pytest.fixture(params=zip(MAIN, ["llava", "llava_next"] * 2, strict=True), ids=MAIN)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Any]:
    name, family = request.param
    configured = configuration(name)
    build(family, num_hidden_layers=4).save_pretrained(tmp_path)
    load = AutoModelForImageTextToText.from_pretrained
    model = load(tmp_path, quantization_config=configured).eval()
    twin = load(tmp_path).eval()
    assert make_twin(model, twin, FORMATS[name].rounds_inputs) == 4 * 7 + 4 * 6 + 2
    return model, twin


def _kept(model: Any, pruner: Pruner) -> tuple[Any, torch.Tensor]:
    with hf.prune(model, pruner):
        output = model.generate(
            **inputs_for(model, ONE),
            max_new_tokens=1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        (stats,) = hf.last_stats(model)
    counted = stats.as_dict()
    probes = [(probe["layer"], probe["dropped"]) for probe in counted.pop("probes")]
    return counted | {"probes": probes}, output.logits[0]


def test_every_method_keeps_what_it_keeps_with_plain_weights(pair: tuple[Any, Any]) -> None:
    served = family_of(pair[0]).served
    for method in sorted(PRUNERS):
        pruner = create_pruner(method, **({} if method == "vanilla" else {"retain_ratio": 0.25}))
        if not {need[0] if isinstance(need, tuple) else need for need in pruner.needs} <= served:
            continue
        (kept, logits), (expected, right) = (_kept(model, pruner) for model in pair)
        assert kept == expected, method
        torch.testing.assert_close(logits, right, rtol=0.02, atol=0.02)


# ------------------------------------------------------------------ saved after quantising


@pytest.mark.parametrize("name", ["bitsandbytes-8bit", "bitsandbytes-nf4", "torchao-int8"])
def test_weights_quantised_before_they_were_saved(
    stock_folder: Path, name: str, tmp_path: Path
) -> None:
    first = load_stock_model(str(stock_folder), quantization_config=configuration(name))
    first.model.save_pretrained(tmp_path)
    first.processor.save_pretrained(tmp_path)
    stated = json.loads((tmp_path / "config.json").read_text())
    assert stated["quantization_config"]
    assert uses_stock("auto", str(tmp_path))
    again = load_stock_model(str(tmp_path))
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        expected, found = (each.model(input_ids=ids).logits for each in (first, again))
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="use transformers' own class .--backend"):
        load_pretrained_model(tmp_path)


def test_load_4bit_of_a_stock_model_leaves_tower_and_projector(stock_folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = load_stock_model(str(stock_folder), load_4bit=True).model
    names = {name for name, part in model.named_modules() if type(part).__name__ == "Linear4bit"}
    assert len(names) == 7 * model.config.text_config.num_hidden_layers
    assert all(name.startswith("model.language_model.layers.") for name in names)
