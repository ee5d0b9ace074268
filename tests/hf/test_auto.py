"""``--backend auto`` takes the class that can; what neither can is one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_todre import Request, TodreError, load_pretrained_model
from llava_todre.hf.load import load_stock_model, uses_stock
from llava_todre.model import bounded


@pytest.fixture
def variant(stock_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a copy of the checkpoint with other values in its config.json, a.b for nested ones."""

    def make(changes: dict[str, Any]) -> Path:
        folder = shutil.copytree(stock_folder, tmp_path / "variant")
        path = folder / "config.json"
        raw = json.loads(path.read_text())
        for key, value in changes.items():
            *within, last = key.split(".")
            place = raw
            for part in within:
                place = place[part]
            place[last] = value
        path.write_text(json.dumps(raw))
        return folder

    return make


def test_ours_where_it_can(stock_folder: Path) -> None:
    assert not uses_stock("auto", str(stock_folder))


def test_a_tilde_is_the_home_directory(
    variant: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(variant(MISTRAL).parent))
    assert uses_stock("auto", "~/variant")
    load_stock_model("~/variant")


@pytest.mark.parametrize("load", [load_pretrained_model, load_stock_model])
@pytest.mark.parametrize("path", ["x" * 5000, "~nobody-of-that-name/x"])
def test_a_path_that_leads_nowhere(load: Callable[[str], Any], path: str) -> None:
    assert not uses_stock("auto", path)
    with pytest.raises(TodreError, match="does not (exist|load)"):
        load(path)


MISTRAL = {"text_config.model_type": "mistral", "text_config.sliding_window": 4096}


@pytest.mark.parametrize(
    "changes",
    [
        MISTRAL,
        {"multimodal_projector_bias": False},
        {"projector_hidden_act": "relu"},
        {"vision_feature_layer": [-2, -3]},
        {"text_config.model_type": "qwen2"},
    ],
)
def test_stock_where_ours_cannot(variant: Callable[..., Path], changes: dict[str, Any]) -> None:
    folder = variant(changes)
    assert uses_stock("auto", str(folder))
    with pytest.raises(TodreError, match="transformers' own class: --backend transformers"):
        load_pretrained_model(folder)
    if changes is MISTRAL:
        assert load_stock_model(str(folder)).config.text_config.sliding_window == 4096


def test_a_feature_layer_in_a_list_of_one_is_that_layer(variant: Callable[..., Path]) -> None:
    folder = variant({"vision_feature_layer": [-2]})
    assert not uses_stock("auto", str(folder))
    assert load_pretrained_model(folder)[1].config.mm_vision_select_layer == -2
    stock = load_stock_model(str(folder))
    stock.set_pruner("visionzip", retain_ratio=0.25)  # needs vision_features
    assert stock.pruner.needs


@pytest.mark.parametrize("backend", ["ours", "stock"])
def test_a_stale_index_beside_whole_weights(
    stock_folder: Path, backend: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(stock_folder, tmp_path / "stale")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    stale = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00002.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(stale))
    assert not uses_stock("auto", str(folder))
    if backend == "ours":
        load_pretrained_model(folder)
        assert "lists model-00001-of-00002.safetensors, but that file is missing" in caplog.text
    else:  # transformers goes by the index; ours is what auto takes
        with pytest.raises(TodreError, match="does not load: ") as caught:
            load_stock_model(str(folder))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "stock_says", "ours_says"),
    [
        (
            {"quantization_config": {"quant_method": "awq", "bits": 4}},
            "does not load: .*requires gptqmodel",
            "quantization_config of 'awq', but the weights are not quantised; remove that key",
        ),
        (
            {"text_config": {"model_type": "llama"}},
            "describes a model of 6,.* parameters, but the weights next to it have",
            "do not fit its config",
        ),
        (
            {"text_config.num_hidden_layers": 1000},
            "describes a model of .* parameters, but the weights",
            "do not fit its config: .*missing",
        ),
        (
            {"text_config.num_hidden_layers": 10**6},
            "text_config.num_hidden_layers must be a whole number from 1 to 1000, got 1000000",
            "text_config.num_hidden_layers must be a whole number from 1 to 1000, got 1000000",
        ),
        (
            {"text_config.pad_token_id": 10**6},
            "pad_token_id must be null, or a token of the vocabulary.*got 1000000",
            "pad_token_id must be null, or a token of the vocabulary.*got 1000000",
        ),
        (
            {"image_token_index": 5},
            "has image_token_id 5, but its processor writes",
            "",
        ),
        (
            {"text_config.use_cache": "x"},
            "does not load: Validation error for field 'use_cache': TypeError: Field 'use_cache'",
            "config.json is not usable: Validation error for field 'use_cache'",
        ),
        (
            {"text_config.rms_norm_eps": float("nan")},
            "text_config.rms_norm_eps must be a number above 0.*got nan",
            "text_config.rms_norm_eps must be a number above 0.*got nan",
        ),
        (
            {"vision_config.hidden_act": "gleu"},
            "vision_config.hidden_act must be one of .*got 'gleu'",
            "vision_config.hidden_act must be one of .*got 'gleu'",
        ),
    ],
)
def test_what_no_class_can_load_is_one_line(
    variant: Callable[..., Path], changes: dict[str, Any], stock_says: str, ours_says: str
) -> None:
    folder = variant(changes)
    for load, says in ((load_stock_model, stock_says), (load_pretrained_model, ours_says)):
        if not says:  # ours needs no token for it
            load(str(folder))
            continue
        with pytest.raises(TodreError, match=says) as caught:
            load(str(folder))
        assert "\n" not in str(caught.value)


def test_an_adapter_over_a_stock_model(stock_folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    targets = r".*language_model.*(q_proj|v_proj)"
    settings = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    wrapped = peft.get_peft_model(load_stock_model(str(stock_folder)).model, settings)
    wrapped.save_pretrained(tmp_path, save_embedding_layers=False)
    ids = torch.arange(20, 40)[None]
    assert uses_stock("auto", str(tmp_path), model_base=str(stock_folder))
    merged = load_stock_model(str(tmp_path), model_base=str(stock_folder)).model
    with torch.no_grad():
        found, expected = merged(input_ids=ids).logits, wrapped.eval()(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(TodreError, match="has the layout of llava-hf.*--backend transformers"):
        load_pretrained_model(tmp_path, stock_folder)


def test_the_original_layout_is_ours_with_any_base(stock_folder: Path) -> None:
    golden = Path(__file__).parents[1] / "golden" / "llava-v1.6-tiny"
    assert not uses_stock("auto", "anything", model_base=str(golden))


BOMBS = {
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": "took longer",
    "{{ 'a' * 10**11 }}": "cannot write the prompt",
    "{% for x in": "cannot write the prompt",
    "{{ messages[5].x }}": "cannot write the prompt",
}


@pytest.mark.parametrize("template", BOMBS)
def test_a_chat_template_without_end(
    stock_folder: Path, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = load_stock_model(str(stock_folder))
    monkeypatch.setattr(bounded, "SECONDS", 0.3)
    stock.processor.chat_template = template
    with pytest.raises(TodreError, match=BOMBS[template]) as caught:
        stock.answer([Request("What is it?")])
    assert "\n" not in str(caught.value)


def test_whole_numbers_are_not_taken_for_weights(stock_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(stock_folder, tmp_path / "whole")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.weight") and "layers.3." in name)
    for kind in (torch.int8, torch.complex64):
        save_file(tensors | {name: tensors[name].to(kind)}, folder / "model.safetensors")
        with pytest.raises(TodreError, match=r"1 of wrong type \(.*q_proj.weight (int8|complex)"):
            load_pretrained_model(folder)
