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
from llava_todre.model.vision import VisionTower


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


@pytest.fixture
def pixels(draw: torch.Generator) -> Tensor:
    return torch.randn(5, 3, 56, 56, generator=draw)


@pytest.mark.parametrize("layer", [-1, -2, -4, 0, 3])
@torch.no_grad()
def test_cls_attention_is_that_of_the_eager_map(attention, pixels, layer):
    tower = build(attention=attention)
    got = tower(pixels, layer).cls_attention
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
    got = tower(pixels, cls_layer)
    expected = stock(tower, pixels).hidden_states[select_layer][:, 1:]
    torch.testing.assert_close(got.patches, expected, rtol=0, atol=1e-5)
    assert (got.cls_attention is None) == (cls_layer is None)


@pytest.mark.parametrize(
    ("select_layer", "cls_layer", "layers_run"),
    [(-2, None, 3), (-2, -1, 3), (-1, -1, 4), (1, None, 1), (1, 3, 3), (-2, 0, 3), (0, None, 0)],
)
@torch.no_grad()
def test_layers_that_no_one_reads_are_not_run(pixels, select_layer, cls_layer, layers_run):
    tower, ran = build(select_layer), []
    for index, layer in enumerate(tower.vision_tower.encoder.layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    tower(pixels, cls_layer)
    assert ran == list(range(layers_run))


@pytest.mark.parametrize("cls_layer", [None, -1])
@torch.no_grad()
def test_many_views_go_in_chunks_with_the_same_result(pixels, cls_layer, monkeypatch):
    tower = build()
    whole = tower(pixels, cls_layer)
    monkeypatch.setattr(vision, "MAX_VIEWS", 2)
    chunks = tower(pixels, cls_layer)
    torch.testing.assert_close(chunks.patches, whole.patches, rtol=0, atol=1e-6)
    if cls_layer is None:
        assert chunks.cls_attention is None
    else:
        torch.testing.assert_close(chunks.cls_attention, whole.cls_attention, rtol=0, atol=1e-6)


def test_side_is_patches_per_row():
    assert build().side == 4


@pytest.mark.parametrize("layer", [5, -6])
def test_a_layer_the_tower_does_not_have_is_an_error(layer):
    with pytest.raises(TodreError, match=f"mm_vision_select_layer {layer} .* -5 to 4"):
        VisionTower(VISION, layer, "patch")


@pytest.mark.parametrize("layer", [4, -5])
def test_a_cls_layer_the_tower_does_not_have_is_an_error(pixels, layer):
    with pytest.raises(TodreError, match=f"cls_layer {layer} .* -4 to 3"):
        build()(pixels, layer)


def test_the_cls_feature_is_refused():
    with pytest.raises(TodreError, match="'cls_patch' is not supported.*patch"):
        VisionTower(VISION, -2, "cls_patch")
