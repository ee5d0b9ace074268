"""Folders with a projector or a LoRA adapter only, as LLaVA's training leaves them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llava_todre import TodreError, hf, load_pretrained_model
from llava_todre.hf.load import load_stock_model

peft = pytest.importorskip("peft")

GOLDEN = Path(__file__).parent.parent / "golden"
V15 = GOLDEN / "llava-v1.5-tiny"
PROJECTOR = "model.mm_projector."


def _logits(model: Any) -> Tensor:
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 390, (1, 12), generator=draw)
    ids[0, 4] = -200
    with torch.no_grad():
        return model(input_ids=ids, images=torch.randn(1, 3, 56, 56, generator=draw)).logits


@pytest.fixture(scope="module")
def vicuna(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The decoder alone, as a language model."""
    folder = tmp_path_factory.mktemp("vicuna")
    for name in ("tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        if (V15 / name).exists():
            shutil.copy(V15 / name, folder / name)
    raw = json.loads((V15 / "config.json").read_text())
    raw = {key: value for key, value in raw.items() if not key.startswith("mm_")}
    (folder / "config.json").write_text(json.dumps(raw | {"model_type": "llama"}))
    tensors = load_file(V15 / "model.safetensors")
    decoder = {name: t for name, t in tensors.items() if "mm_projector" not in name}
    save_file(decoder, folder / "model.safetensors", {"format": "pt"})
    return folder


def _config(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    raw = json.loads((V15 / "config.json").read_text())
    raw["mm_vision_tower"] = str(GOLDEN / "clip-v15")
    (folder / "config.json").write_text(json.dumps(raw))


def _projector() -> dict[str, Tensor]:
    tensors = load_file(V15 / "model.safetensors")
    return {name: t + 0.1 for name, t in tensors.items() if "mm_projector" in name}


def _lora(folder: Path, *, as_bin: bool = False, **options: Any) -> dict[str, Tensor]:
    """Write what LLaVA's LoRA training leaves; returns all weights as they should be."""
    _config(folder)
    _, model, _, _ = load_pretrained_model(V15)
    for parameter in model.get_vision_tower().parameters():
        parameter.requires_grad = False
    chosen = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "up_proj"]}
    settings = peft.LoraConfig(
        **(chosen | options), task_type="CAUSAL_LM", exclude_modules=r".*vision_tower.*"
    )
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, settings)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    wrapped.save_pretrained(folder, safe_serialization=not as_bin, save_embedding_layers=False)
    # The original knows nothing of the tower when it puts adapters into a model.
    written = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(written | {"exclude_modules": None}))
    torch.save(
        {f"base_model.model.{name}": tensor for name, tensor in _projector().items()},
        folder / "non_lora_trainables.bin",
    )
    state = wrapped.state_dict()
    merged = {}
    for name, weight in load_pretrained_model(V15)[1].state_dict().items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_B.default.weight" in state:
            first, second = (state[f"{stem}.lora_{x}.default.weight"] for x in "BA")
            weight = weight + first @ second * (16 / 4)
        merged[name] = weight
    return merged | _projector()


def _oracle(weights: dict[str, Tensor]) -> Any:
    _, model, _, _ = load_pretrained_model(V15)
    model.load_state_dict(weights)
    return model


@pytest.mark.parametrize("base", ["vicuna", "llava"])
def test_projector_only(vicuna: Path, base: str, tmp_path: Path) -> None:
    _config(tmp_path)
    torch.save(_projector(), tmp_path / "mm_projector.bin")
    model_base = str(vicuna if base == "vicuna" else V15)
    tokenizer, model, _, length = load_pretrained_model(tmp_path, model_base, "llava-pretrain")
    weights = load_pretrained_model(V15)[1].state_dict() | _projector()
    torch.testing.assert_close(_logits(model), _logits(_oracle(weights)), rtol=0, atol=0)
    assert len(tokenizer) == 400
    assert length == 4096
    assert model.generation_config.eos_token_id == 2  # the base's
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    again = load_pretrained_model(tmp_path, model_base)[1]
    assert again.generation_config.eos_token_id == [2, 7]


@pytest.mark.parametrize(("base", "as_bin"), [("vicuna", True), ("llava", False)])
def test_lora(vicuna: Path, base: str, as_bin: bool, tmp_path: Path) -> None:
    weights = _lora(tmp_path / "llava-lora", as_bin=as_bin)
    model_base = vicuna if base == "vicuna" else V15
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    _, model, _, _ = load_pretrained_model(tmp_path / "llava-lora", model_base, "llava-lora")
    assert torch.equal(torch.rand(1), expected)  # nothing was drawn
    assert not any("lora" in name for name, _ in model.named_modules())
    found = _logits(model)
    torch.testing.assert_close(found, _logits(_oracle(weights)), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, _logits(load_pretrained_model(V15)[1]), atol=0.1)


def test_lora_is_merged_before_it_is_quantised(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from quantised import weight_of

    weights = _lora(tmp_path / "lora")
    _, model, _, _ = load_pretrained_model(tmp_path / "lora", V15, load_8bit=True)
    layer = model.model.layers[1].self_attn.q_proj
    assert type(layer).__name__ == "Linear8bitLt"
    right = weights["model.layers.1.self_attn.q_proj.weight"]
    assert (weight_of(layer) - right).norm() / right.norm() < 0.02


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "lora"
    _lora(folder)
    return folder


def _without(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def _edit(**changes: Any) -> Any:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def _unsafe(folder: Path) -> None:
    torch.save({"x": Path()}, folder / "non_lora_trainables.bin")


def _whole(folder: Path) -> None:
    shutil.copy(V15 / "model.safetensors", folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("adapter_model.safetensors"), "has no adapter; one of: adapter_model.safet"),
        (_edit(target_modules=["q_proj"]), "does not fit the model: .* only in one of the two"),
        (_edit(r=8), "the adapter in .* does not merge: "),
        (_edit(peft_type="NEW"), "the adapter in .* does not merge: "),
        (_unsafe, "non_lora_trainables.bin .*more than tensors and is not loaded for safety"),
        (_whole, "holds a whole model and adapter_config.json; move one"),
    ],
)
def test_damaged_adapters(change: Any, message: str, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "lora")
    change(tmp_path / "lora")
    with pytest.raises(TodreError, match=message) as caught:
        load_pretrained_model(tmp_path / "lora", V15)
    assert "\n" not in str(caught.value)


def test_a_part_without_its_base_says_what_to_give(adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "lora")
    _edit(base_model_name_or_path="lmsys/vicuna-7b-v1.5")(tmp_path / "lora")
    with pytest.raises(TodreError, match="as model_base, 'lmsys/vicuna-7b-v1.5' by its adapter"):
        load_pretrained_model(tmp_path / "lora")
    with pytest.raises(TodreError, match="as model_base, 'lmsys/vicuna-7b-v1.5' by its adapter"):
        load_stock_model(str(tmp_path / "lora"))
    _config(tmp_path / "projector")
    torch.save(_projector(), tmp_path / "projector" / "mm_projector.bin")
    with pytest.raises(TodreError, match="only a part of a model .mm_projector.bin.; give"):
        load_pretrained_model(tmp_path / "projector")
    with pytest.raises(TodreError, match="leave model_base out"):
        load_pretrained_model(V15, V15)


# ------------------------------------------------------------------ PeftModel


def _wrapped(model: Any) -> Any:
    torch.manual_seed(0)
    targets = r".*(layers\.\d+\.self_attn\.(q|k)_proj)"  # of decoder and tower
    settings = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    return peft.get_peft_model(model, settings).eval()


def test_a_peft_model_of_ours_prunes_as_the_merged_one() -> None:
    wrapped = _wrapped(load_pretrained_model(V15)[1])
    seen = []
    for _ in range(2):
        wrapped.set_pruner("todre", retain_ratio=0.25)
        seen.append((_logits(wrapped), wrapped.last_stats[0].as_dict()))
        wrapped = wrapped.merge_and_unload() if len(seen) == 1 else wrapped
    torch.testing.assert_close(seen[0][0], seen[1][0], rtol=1e-4, atol=1e-4)
    assert seen[0][1]["keep_idx"] == seen[1][1]["keep_idx"]
    with pytest.raises(TodreError, match="prunes by itself; call its set_pruner"):
        hf.attach(_wrapped(load_pretrained_model(V15)[1]))
