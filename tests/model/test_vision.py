"""The vision tower against transformers' own CLIP with eager attention maps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import VISION, randomise
from torch import Tensor
from transformers import CLIPVisionModel

from llava_todre.errors import TodreError
from llava_todre.model import vision
from llava_todre.model.vision import QUANTITIES, VisionTower
from llava_todre.pruners import VISION_NEEDS


def build(select_layer: int = -2, attention: str = "sdpa") -> VisionTower:
    """Return a random tower of 4 layers."""
    tower = VisionTower(VISION, select_layer, "patch").eval()
    tower.config._attn_implementation = attention
    randomise(tower, seed=0)
    return tower


@torch.no_grad()
def stock(tower: VisionTower, pixels: Tensor) -> Any:
    """Return hidden states and attention maps of the same weights in transformers' class."""
    config = type(tower.config).from_dict(tower.config.to_dict())
    config._attn_implementation = "eager"
    model = CLIPVisionModel(config).eval()
    model.load_state_dict(tower.vision_tower.state_dict())
    return model(pixels, output_hidden_states=True, output_attentions=True)


def wanted(layer: int | None) -> list[tuple[str, int | float]]:
    """Ask for the [CLS] attention of a layer, or for nothing."""
    return [] if layer is None else [("cls_attention", layer)]


@pytest.fixture
def pixels(draw: torch.Generator) -> Tensor:
    return torch.randn(5, 3, 56, 56, generator=draw)


@pytest.mark.parametrize("layer", [-1, -2, -4, 0, 3])
@torch.no_grad()
def test_cls_attention_is_that_of_the_eager_map(attention, pixels, layer):
    tower = build(attention=attention)
    got = tower(pixels, [("cls_attention", layer)]).measured["cls_attention", layer]
    expected = stock(tower, pixels).attentions[layer][:, :, 0, 1:].mean(dim=1)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    assert got.shape == (5, 16)
    assert (got.sum(dim=1) < 1).all() and got.std() > 0.005


@pytest.mark.parametrize("cls_layer", [None, -1, 0])
@pytest.mark.parametrize("select_layer", [-2, -1, -5, 0, 2, 4])
@torch.no_grad()
def test_features_are_the_hidden_states_of_the_selected_layer(
    attention, pixels, select_layer, cls_layer
):
    tower = build(select_layer, attention)
    got = tower(pixels, wanted(cls_layer))
    expected = stock(tower, pixels).hidden_states[select_layer]
    torch.testing.assert_close(got.patches, expected[:, 1:], rtol=0, atol=1e-5)
    torch.testing.assert_close(got.cls, expected[:, 0], rtol=0, atol=1e-5)
    assert set(got.measured) == set(wanted(cls_layer))


@pytest.mark.parametrize(
    ("select_layer", "cls_layer", "layers_run"),
    [(-2, None, 3), (-2, -1, 3), (-1, -1, 4), (1, None, 1), (1, 3, 3), (-2, 0, 3), (0, None, 0)],
)
@torch.no_grad()
def test_layers_that_no_one_reads_are_not_run(pixels, select_layer, cls_layer, layers_run):
    tower, ran = build(select_layer), []
    for index, layer in enumerate(tower.vision_tower.encoder.layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    tower(pixels, wanted(cls_layer))
    assert ran == list(range(layers_run))


@pytest.mark.parametrize("cls_layer", [None, -1])
@torch.no_grad()
def test_many_views_go_in_chunks_with_the_same_result(pixels, cls_layer, monkeypatch):
    tower = build()
    whole = tower(pixels, wanted(cls_layer))
    monkeypatch.setattr(vision, "MAX_VIEWS_CPU", 2)
    chunks = tower(pixels, wanted(cls_layer))
    torch.testing.assert_close(chunks.patches, whole.patches, rtol=0, atol=1e-6)
    torch.testing.assert_close(chunks.cls, whole.cls, rtol=0, atol=1e-6)
    torch.testing.assert_close(chunks.measured, whole.measured, rtol=0, atol=1e-6)


def test_side_is_patches_per_row():
    assert build().side == 4


@pytest.mark.parametrize("layer", [5, -6])
def test_a_layer_the_tower_does_not_have_is_an_error(layer):
    with pytest.raises(
        TodreError, match=f"mm_vision_select_layer must be from -5 to 4, got {layer}"
    ):
        VisionTower(VISION, layer, "patch")


@pytest.mark.parametrize("layer", [4, -5])
def test_a_cls_layer_the_tower_does_not_have_is_an_error(pixels, layer):
    with pytest.raises(
        TodreError, match=f"layer of cls_attention must be from -4 to 3, .* got {layer}"
    ):
        build()(pixels, wanted(layer))


def test_the_cls_feature_is_refused():
    with pytest.raises(TodreError, match="must be 'patch', got 'cls_patch'"):
        VisionTower(VISION, -2, "cls_patch")


@torch.no_grad()
def test_every_quantity_is_that_of_the_stock_model(pixels):
    """Oracle: attention maps of transformers' eager CLIP, and its own projections of layer 2."""
    tower, layer = build(), 2
    got = tower(pixels, [(name, layer) for name in VISION_NEEDS]).measured
    output = stock(tower, pixels)
    block = tower.vision_tower.encoder.layers[layer]
    states = block.layer_norm1(output.hidden_states[layer])
    query, key = block.self_attn.q_proj(states), block.self_attn.k_proj(states)  # (5, 17, 32)
    split_query, split_key = (t.view(5, 17, 4, 8) for t in (query, key))
    expected = {
        "cls_attention": output.attentions[layer][:, :, 0, 1:].mean(1),
        "cls_logits": torch.einsum("vhe,vphe->vp", split_query[:, 0], split_key[:, 1:])
        / (4 * 8**0.5),
        "cls_attention_unsplit": ((query[:, :1] @ key.mT) / 32**0.5).softmax(-1)[:, 0, 1:],
        "received_attention": output.attentions[layer].mean((1, 2))[:, 1:],
        "keys": split_key[:, 1:],
    }
    assert set(expected) == set(VISION_NEEDS) == set(QUANTITIES)
    for name, value in expected.items():
        torch.testing.assert_close(got[name, layer], value, rtol=0, atol=1e-5)
        assert len({tuple(row) for row in value.flatten(1).tolist()}) == 5


@pytest.mark.parametrize(("depth", "layer"), [(0.5, 2), (0.3, 1), (0.01, 0), (0.99, 3)])
@torch.no_grad()
def test_a_layer_can_be_a_depth(pixels, depth, layer):
    tower = build()
    got = tower(pixels, [("cls_attention", depth), ("cls_attention", layer)]).measured
    assert torch.equal(got["cls_attention", depth], got["cls_attention", layer])


@pytest.mark.parametrize("layer", [1.0, 0.0, -0.5, 2.0])
def test_a_depth_is_between_zero_and_one(pixels, layer):
    with pytest.raises(TodreError, match=f"depth between 0 and 1, got {layer}"):
        build()(pixels, [("cls_attention", layer)])


@torch.no_grad()
def test_smaller_pixels_give_fewer_patches_as_in_the_stock_model(pixels):
    tower = build()
    small = pixels[..., :28, :42]
    got = tower(small).patches
    assert got.shape == (5, 2 * 3, 32)
    model = tower.vision_tower
    expected = model(small, interpolate_pos_encoding=True, output_hidden_states=True)
    torch.testing.assert_close(got, expected.hidden_states[-2][:, 1:], rtol=0, atol=1e-5)
