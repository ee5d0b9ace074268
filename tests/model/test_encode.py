"""What a method asks for is what the tower computed, token by token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llava_todre.errors import TodreError
from llava_todre.model.encode import build_projector
from llava_todre.model.llava import LlavaLlamaForCausalLM
from llava_todre.pruners import NEEDS, VISION_NEEDS, Pruner, Random
from llava_todre.spans import VisualTokens

EVERYTHING = frozenset({*NEEDS - {"clip_similarity"}, *((name, -2) for name in VISION_NEEDS)})
IDS = torch.tensor([[1, 5, -200, 7, -200, 8, 9, -200, 3]])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recorder(Pruner):
    given: list[VisualTokens] = dataclasses.field(default_factory=list, hash=False)
    needs = EVERYTHING

    def select(self, tokens: VisualTokens, num_keep: int) -> Tensor:
        self.given.append(tokens)
        return Random().select(tokens, num_keep)


class Modest(Recorder):
    needs = frozenset()


def pixels() -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(views, 3, 56, 56, generator=draw) for views in (5, 3, 4)]


def prompt() -> dict[str, Any]:
    return {
        "images": pixels(),
        "image_sizes": [(112, 70), (112, 40), (56, 56)],
        "modalities": ["image", "image", "video"],
    }


def record(model: LlavaLlamaForCausalLM, pruner: Recorder) -> list[VisualTokens]:
    model.set_pruner(pruner)
    with torch.no_grad():
        model(input_ids=IDS, **prompt())
    return pruner.given


@pytest.fixture(scope="module")
def model(tiny_llava: Callable[..., LlavaLlamaForCausalLM]) -> LlavaLlamaForCausalLM:
    return tiny_llava()


def test_every_quantity_belongs_to_its_token(model: LlavaLlamaForCausalLM) -> None:
    tower = model.get_vision_tower()
    given = record(model, Recorder())
    wanted = [(name, -2) for name in VISION_NEEDS]
    for tokens, views in zip(given, pixels(), strict=True):
        with torch.no_grad():
            alone = tower(views, wanted)
        place = tokens.view * 16 + tokens.row * 4 + tokens.column
        assert len(tokens) == len(set(place.tolist())) > 16
        for need in wanted:
            expected = alone.measured[need].flatten(0, 1)[place]
            torch.testing.assert_close(tokens.vision[need], expected, rtol=0, atol=1e-5)
        assert tokens.vision_features is not None and tokens.cls_features is not None
        assert tokens.project is not None
        features = alone.patches.flatten(0, 1)[place]
        torch.testing.assert_close(tokens.vision_features, features, rtol=0, atol=1e-5)
        torch.testing.assert_close(tokens.cls_features, alone.cls, rtol=0, atol=1e-5)
        projected = tokens.project(tokens.vision_features)
        torch.testing.assert_close(projected, tokens.features, rtol=0, atol=1e-5)
    assert [tokens.grid for tokens in given] == [(2, 2), (2, 1), None]
    assert [tokens.is_video for tokens in given] == [False, False, True]
    assert len(given[0]) < 5 * 16, "padding is gone"


def test_resized_views_are_those_of_smaller_pixels(model: LlavaLlamaForCausalLM) -> None:
    tokens, views = record(model, Recorder())[0], pixels()[0]
    assert tokens.resized is not None
    with torch.no_grad():
        same, small = tokens.resized(4, 4), tokens.resized(2, 3)
        shrunk = nn.functional.interpolate(views, (28, 42), mode="bicubic", antialias=True)
        expected = model.model.mm_projector(model.get_vision_tower()(shrunk).patches)
        full = model.model.mm_projector(model.get_vision_tower()(views).patches)
    assert small.shape == (5, 6, 64)
    torch.testing.assert_close(small, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(same, full, rtol=0, atol=1e-4)


def test_what_nobody_asks_for_is_not_computed(model: LlavaLlamaForCausalLM) -> None:
    for tokens in record(model, Modest()):
        assert not tokens.vision
        assert tokens.vision_features is tokens.cls_features is tokens.project is None
        assert tokens.resized is tokens.text_embeds is None
    [encoded] = model.encode_images(pixels()[:1], [(112, 70)])
    assert not encoded.needs


def test_needs_are_served_only_when_a_token_is_dropped(model: LlavaLlamaForCausalLM) -> None:
    model.set_pruner(Recorder(retain_ratio=1.0))
    encoded = model.encode_images(pixels()[:1], [(112, 70)])[0]
    assert not encoded.needs
    model.set_pruner(Recorder())
    with pytest.raises(TodreError, match="encoded without .*resized.* Recorder needs"):
        model.generate(torch.tensor([[1, -200, 4]]), images=[encoded], max_new_tokens=1)


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        ("linear", [nn.Linear]),
        ("mlp1x_gelu", [nn.Linear]),
        ("mlp2x_gelu", [nn.Linear, nn.GELU, nn.Linear]),
        ("mlp3x_gelu", [nn.Linear, nn.GELU, nn.Linear, nn.GELU, nn.Linear]),
    ],
)
def test_projectors_have_the_layers_their_names_tell(kind: str, layers: list[type]) -> None:
    projector = build_projector(kind, 6, 10)
    found = list(projector) if isinstance(projector, nn.Sequential) else [projector]
    assert [type(layer) for layer in found] == layers
    assert projector(torch.zeros(3, 6)).shape == (3, 10)


def test_identity_changes_nothing_and_other_names_are_errors() -> None:
    assert torch.equal(build_projector("identity", 6, 6)(torch.ones(2, 6)), torch.ones(2, 6))
    for kind in ("mlp2x_relu", "mlp0x_gelu", "resampler"):
        with pytest.raises(TodreError, match=f"mm_projector_type must be linear, .* got '{kind}'"):
            build_projector(kind, 6, 10)
