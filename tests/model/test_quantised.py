"""Our class with quantised weights keeps what the same model keeps with its weights dequantised."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from quantised import FORMATS, MAIN, configuration, make_twin, weight_of
from torch import nn

from llava_todre import TodreError, load_pretrained_model
from llava_todre.model.vision import QUANTITIES, is_plain
from llava_todre.pruners import PRUNERS

V16 = Path(__file__).parent.parent / "golden" / "llava-v1.6-tiny"
SIZE = (112, 100)
# CLIP's text tower is no part of the model.
METHODS = sorted(PRUNERS)


def _load(**arguments: Any) -> Any:
    return load_pretrained_model(V16, **arguments)[1]


@pytest.fixture(scope="module")
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """(quantised model, twin) of the format that the test names."""
    model = _load(quantization_config=configuration(request.param))
    twin = _load()
    layers = model.config.num_hidden_layers * 7 + 4 * 6 + 2  # decoder, tower, projector
    assert make_twin(model, twin, FORMATS[request.param].rounds_inputs) == layers
    return model, twin


def _prompt() -> dict[str, Any]:
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 390, (1, 20), generator=draw)
    ids[0, 6] = -200
    pixels = torch.randn(1, 5, 3, 56, 56, generator=draw)
    return {"input_ids": ids, "images": pixels, "image_sizes": [SIZE]}


@torch.no_grad()
def _kept(model: Any, method: str) -> tuple[dict[str, Any], torch.Tensor]:
    """Return all that was kept, before the decoder and in each of its layers, and logits."""
    model.set_pruner(method, **({} if method == "vanilla" else {"retain_ratio": 0.25}))
    output = model(**_prompt(), use_cache=True)
    (stats,) = model.last_stats
    counted = stats.as_dict()
    probes = [(probe["layer"], probe["dropped"]) for probe in counted.pop("probes")]
    keys = [layer.keys.shape[-2] for layer in output.past_key_values.layers]
    return counted | {"probes": probes, "keys": keys}, output.logits[0, -1]


def _same(pair: tuple[Any, Any], method: str) -> None:
    (kept, logits), (expected, right) = (_kept(model, method) for model in pair)
    assert kept == expected
    # Which tokens stay inside the decoder shows in what it says.
    torch.testing.assert_close(logits, right, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pair", MAIN, indirect=True)
def test_every_method_keeps_what_it_keeps_with_plain_weights(
    pair: tuple[Any, Any], method: str
) -> None:
    _same(pair, method)


@pytest.mark.parametrize("pair", sorted(set(FORMATS) - set(MAIN)), indirect=True)
def test_other_formats(pair: tuple[Any, Any]) -> None:
    for method in ("fastervlm", "prumerge", "todre", "fastv", "sparsevlm"):
        _same(pair, method)


@pytest.mark.parametrize("pair", sorted(FORMATS), indirect=True)
def test_quantities_are_those_of_the_attention_that_the_tower_computes(
    pair: tuple[Any, Any],
) -> None:
    tower = pair[0].get_vision_tower()
    layer = tower.vision_tower.encoder.layers[2]
    layer.self_attn.config._attn_implementation = "eager"
    hidden = torch.randn(3, 17, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        _, maps = layer.self_attn(layer.layer_norm1(hidden))  # (V, H, 1 + P, 1 + P)
        found = {name: measure(layer, hidden) for name, measure in QUANTITIES.items()}
    layer.self_attn.config._attn_implementation = "sdpa"
    torch.testing.assert_close(found["cls_attention"], maps[:, :, 0, 1:].mean(dim=1))
    received = maps.mean(dim=(1, 2))[:, 1:]
    torch.testing.assert_close(found["received_attention"], received)


# ------------------------------------------------------------------ other modules in the way


class _Scaled(nn.Linear):
    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return super().forward(states) * torch.arange(1, self.out_features + 1) ** 0.5


def _subclass(attention: Any) -> None:
    scaled = _Scaled(32, 32)
    scaled.load_state_dict(attention.k_proj.state_dict())
    attention.k_proj = scaled


def _hook(attention: Any) -> None:
    attention.k_proj.register_forward_hook(lambda module, args, output: output.flip(-1) * 2)


def _parametrised(attention: Any) -> None:
    class Rounded(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return (weight * 4).round() / 4

    nn.utils.parametrize.register_parametrization(attention.k_proj, "weight", Rounded())


def _weight_norm(attention: Any) -> None:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(attention.k_proj)  # written before every call, read around it never
    attention.k_proj.weight_g.data *= 2


def _forward_replaced(attention: Any) -> None:
    own = attention.k_proj.forward
    attention.k_proj.forward = lambda states: own(states) ** 3


def _adapter(attention: Any) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["k_proj", "q_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, attention)


@pytest.mark.parametrize(
    "change", [_subclass, _hook, _parametrised, _weight_norm, _forward_replaced, _adapter]
)
def test_whatever_stands_in_for_a_projection_is_run(change: Any) -> None:
    torch.manual_seed(0)
    layer = _load().get_vision_tower().vision_tower.encoder.layers[1]
    hidden = torch.randn(2, 17, 32)
    before = QUANTITIES["cls_attention"](layer, hidden)
    change(layer.self_attn)
    assert not is_plain(layer.self_attn.k_proj)
    layer.self_attn.config._attn_implementation = "eager"
    with torch.no_grad():
        _, maps = layer.self_attn(layer.layer_norm1(hidden))
        found = QUANTITIES["cls_attention"](layer, hidden)
    torch.testing.assert_close(found, maps[:, :, 0, 1:].mean(dim=1))
    assert not torch.allclose(found, before, atol=1e-3)


def test_a_plain_projection_is_read() -> None:
    layer = _load().get_vision_tower().vision_tower.encoder.layers[1]
    assert is_plain(layer.self_attn.k_proj)


# ------------------------------------------------------------------ as LLaVA users type it


@pytest.mark.parametrize(
    ("argument", "kind"), [("load_8bit", "Linear8bitLt"), ("load_4bit", "Linear4bit")]
)
def test_load_8bit_and_load_4bit_quantise_the_decoder(argument: str, kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    tokenizer, model, processor, length = load_pretrained_model(
        V16, None, "llava-v1.6", **{argument: True}
    )
    names = {name for name, part in model.named_modules() if type(part).__name__ == kind}
    assert len(names) == 7 * model.config.num_hidden_layers
    assert all(name.startswith("model.layers.") for name in names)
    plain = _load()
    for name, weight in plain.get_vision_tower().state_dict().items():
        assert torch.equal(model.get_vision_tower().state_dict()[name], weight)
    layer, own = (each.model.layers[0].mlp.up_proj for each in (model, plain))
    difference = (weight_of(layer) - own.weight).norm() / own.weight.norm()
    assert difference < (0.02 if argument == "load_8bit" else 0.15)
    assert (model.dtype, length) == (torch.float32, 4096)
    assert model.get_vision_tower().image_processor is processor


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"load_8bit": True, "load_4bit": True}, "load_8bit and load_4bit were both given"),
        ({"quantization_config": "8bit"}, "quantization_config must be one of .* got str"),
        ({"quantization_config": {"bits": 8}}, "quantization_config is not usable: "),
    ],
)
def test_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TodreError, match=message) as caught:
        _load(**arguments)
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    hidden = lambda name: None if name == "bitsandbytes" else find(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    with pytest.raises(TodreError, match="bitsandbytes needs bitsandbytes: pip install bitsandb"):
        _load(load_4bit=True)
