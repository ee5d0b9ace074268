"""A layout says which patches of the tower each token of a prompt is made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checks import GREEDY, Strides
from tiny import (
    BATCH,
    ONE,
    TWO_IMAGES,
    USUAL_DECODER,
    VIDEO_BATCH,
    build,
    inputs_for,
    model_of,
    visual_features,
)
from torch import Tensor

from llava_todre import hf
from llava_todre.errors import TodreError
from llava_todre.hf.families import FAMILIES, family_of
from llava_todre.hf.llava import anyres_layout
from llava_todre.hf.onevision import anyres_max_layout
from llava_todre.pruners import LayerView, create_pruner
from llava_todre.pruners.grid import Uniform
from llava_todre.spans import VisualTokens

OF_VIDEO = ("llava_next_video", "llava_onevision")
CASES = [(family, samples) for family in USUAL_DECODER for samples in (BATCH, TWO_IMAGES)]
CASES += [(family, VIDEO_BATCH) for family in OF_VIDEO]


@torch.no_grad()
def encoded_patches(model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Return (patches, W) of all images and all videos, before anything packs or pools them."""
    config, found = model.config, []
    first = 1 if config.vision_feature_select_strategy == "default" else 0

    def note(tower: Any, args: Any, output: Any) -> None:
        found.append(output.hidden_states[config.vision_feature_layer][:, first:].flatten(0, 1))

    handle = model.model.vision_tower.register_forward_hook(note)
    visual_features(model, inputs)
    handle.remove()
    keys = {"image": "pixel_values", "video": "pixel_values_videos"}
    there = [modality for modality, key in keys.items() if key in inputs]
    return dict(zip(there, found, strict=True))


@pytest.mark.parametrize(("family", "samples"), CASES)
def test_tokens_are_made_of_the_patches_the_layout_names(family, samples):
    model = model_of(family)
    inputs = inputs_for(model, samples)
    packed = dict(zip(("image", "video"), visual_features(model, inputs).values(), strict=True))
    projector = model.model.multi_modal_projector
    layouts = family_of(model).layouts(model, inputs)
    for modality, patches in encoded_patches(model, inputs).items():
        start = 0
        for layout, tokens in zip(layouts[modality], packed[modality], strict=True):
            own = patches[start : start + layout.num_patches]
            start += layout.num_patches
            weights = layout.weights
            if weights is None:
                weights = torch.full(layout.sources.shape, 1 / layout.sources.shape[1])
            with torch.no_grad():
                if family == "llava_onevision":  # pools what it has projected
                    made = (projector(own)[layout.sources] * weights[..., None]).sum(dim=1)
                else:
                    made = projector((own[layout.sources] * weights[..., None]).sum(dim=1))
            torch.testing.assert_close(made, tokens[~layout.is_newline], rtol=0, atol=2e-5)
            newline = getattr(model.model, "image_newline", None)
            if newline is not None:
                assert (tokens[layout.is_newline] == newline).all()
        assert start == len(patches)


@pytest.mark.parametrize("family", USUAL_DECODER)
def test_tokens_keep_their_order_and_have_places_of_their_own(family):
    model = model_of(family)
    inputs = inputs_for(model, VIDEO_BATCH if family in OF_VIDEO else BATCH)
    for layouts in family_of(model).layouts(model, inputs).values():
        for layout in layouts:
            place = (layout.view * layout.side + layout.row) * layout.side + layout.column
            assert len(place.unique()) == len(place)
            assert int(layout.row.max()) < layout.side and int(layout.column.max()) < layout.side
            assert layout.row_id[layout.is_newline].tolist() == list(
                range(int(layout.is_newline.sum()))
            )
            assert (layout.row_id[1:] >= layout.row_id[:-1]).all()


def test_sizes_whose_padding_our_own_class_rounds_differently():
    model = build("llava_next")
    model.config.vision_config.image_size, model.config.vision_config.patch_size = 336, 14
    model.config.image_grid_pinpoints = [
        *([336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]),
    ]
    for height, width in [(110, 176), (198, 176), (235, 1128), (376, 799)]:
        layout = anyres_layout(model, height, width)
        features = torch.zeros(layout.num_patches // 576, 576, 1)
        size = torch.tensor([[height, width]])
        packed, _ = model.model.pack_image_features([features], size, "default", torch.ones(1))
        assert len(layout) == len(packed[0])


@pytest.mark.parametrize(("height", "width"), [(900, 1500), (2300, 700), (384, 2304), (1000, 1000)])
def test_grids_shrunk_as_in_the_published_onevision(height, width, draw):
    model = build("llava_onevision")
    config = model.config
    config.vision_config.image_size, config.vision_config.patch_size = 384, 14
    config.vision_aspect_ratio = "anyres_max_3"
    sizes = range(384, 2305, 384)
    config.image_grid_pinpoints = [[rows, columns] for rows in sizes for columns in sizes]
    layout = anyres_max_layout(model, height, width)
    features = torch.randn(layout.num_patches, 2, generator=draw)
    packed, _ = model.model.pack_image_features(
        [features.view(-1, 729, 2)],
        torch.tensor([[height, width]]),
        image_newline=torch.zeros(2),
        vision_aspect_ratio=config.vision_aspect_ratio,
    )
    assert 729 + 1500 < len(layout) < 729 * 4.5
    assert layout.weights is not None
    made = (features[layout.sources] * layout.weights[..., None]).sum(dim=1)
    torch.testing.assert_close(made, packed[0][~layout.is_newline], rtol=0, atol=1e-3)
    place = (layout.view * 27 + layout.row) * 27 + layout.column
    assert len(place.unique()) == len(place)


class Looking(Uniform):
    """Takes down what a method is shown."""

    needs = frozenset({("cls_attention", -1), "text_embeds"})
    seen: list[VisualTokens] = []

    def select(self, tokens: VisualTokens, num_keep: int) -> Tensor:
        self.seen.append(tokens)
        return super().select(tokens, num_keep)


class LookingCloser(Looking):
    """The same, with what the projector reads."""

    needs = Looking.needs | {"vision_features"}


@pytest.mark.parametrize("family", USUAL_DECODER)
def test_what_a_method_is_shown(family):
    model = model_of(family)
    samples = VIDEO_BATCH if family in OF_VIDEO else BATCH
    inputs = inputs_for(model, samples)
    features = visual_features(model, inputs)
    served = family_of(model).served
    method = (LookingCloser if "vision_features" in served else Looking)(retain_ratio=0.25)
    method.seen.clear()
    with hf.prune(model, method):
        model.generate(**inputs, **GREEDY)
    order = [piece for sample in samples for piece in sample if not isinstance(piece, int)]
    assert len(method.seen) == len(order)
    for piece, tokens in zip(order, method.seen, strict=True):
        packed = next(features[298 if piece == "video" else 299])
        newline = getattr(model.model, "image_newline", None)
        if newline is not None:
            packed = packed[~(packed == newline).all(dim=1)]
        torch.testing.assert_close(tokens.features, packed, rtol=0, atol=2e-5)
        assert tokens.is_video == (piece == "video")
        if method.needs == LookingCloser.needs:
            projected = tokens.project(tokens.vision_features)
            torch.testing.assert_close(projected, tokens.features, rtol=0, atol=2e-5)
            assert len(tokens.cls_features) == int(tokens.view.max()) + 1
    shown = iter(method.seen)
    for sample, ids, mask in zip(
        samples, inputs["input_ids"], inputs["attention_mask"], strict=True
    ):
        behind = ids[mask.bool()][1 + sample[0] :]
        text = model.get_input_embeddings()(behind[behind < 298])
        for _ in range(sum(not isinstance(piece, int) for piece in sample)):
            assert torch.equal(next(shown).text_embeds, text)


def test_siglip_s_stand_in_is_the_attention_patches_receive():
    model = build("llava_onevision", attention="eager")
    inputs = inputs_for(model, TWO_IMAGES)  # single views
    method = Looking(retain_ratio=0.25)
    method.seen.clear()
    with hf.prune(model, method):
        model.generate(**inputs, **GREEDY)
    pixels = inputs["pixel_values"][:, 0]
    with torch.no_grad():
        maps = model.model.vision_tower(pixels, output_attentions=True).attentions[-1]
    for tokens, attention in zip(method.seen, maps, strict=True):
        expected = attention.mean(dim=(0, 1))
        torch.testing.assert_close(tokens.vision["cls_attention", -1], expected)
    assert family_of(model).proxies == {"cls_attention": "received_attention"}


def test_the_stand_in_is_shrunk_as_the_tokens_are():
    model = build("llava_onevision", attention="eager")
    inputs = inputs_for(model, ONE)  # crops, shrunk
    method = Looking(retain_ratio=0.25)
    method.seen.clear()
    with hf.prune(model, method):
        model.generate(**inputs, **GREEDY)
    with torch.no_grad():
        maps = model.model.vision_tower(inputs["pixel_values"][0], output_attentions=True)
    of_patches = maps.attentions[-1].mean(dim=(1, 2)).flatten()
    layout = family_of(model).layouts(model, inputs)["image"][0]
    assert layout.weights is not None and len(layout.weights.unique()) > 2
    expected = (of_patches[layout.sources] * layout.weights).sum(dim=1)
    torch.testing.assert_close(method.seen[0].vision["cls_attention", -1], expected)


def test_a_method_inside_the_decoder_is_told_how_many_patches_entered():
    entered = []

    class Asking(Strides):
        def at_layer(self, view: LayerView) -> None:
            entered.append(view.visual_counts)

    model = model_of("llava_next")
    with hf.prune(model, Asking(retain_ratio=0.25, plan=((9, 3, 0),))):
        model.generate(**inputs_for(model, BATCH), **GREEDY)
        kept = [tuple(len(i.keep_idx) for i in stats.images) for stats in hf.last_stats(model)]
    assert entered == kept == [(20,), (12, 8), ()]


def test_proxies_replace_what_a_family_lacks():
    for family in FAMILIES:
        for quantity, other in family.proxies.items():
            assert other in family.quantities and quantity not in family.quantities


def test_a_hidden_state_behind_the_last_layer_is_not_served():
    model = build("llava_next")
    model.config.vision_feature_layer = -1
    inputs = inputs_for(model, ONE)
    with (
        pytest.raises(TodreError, match="vision_feature_layer must be .* got -1"),
        hf.prune(model, create_pruner("visionzip")),
    ):
        model.generate(**inputs, **GREEDY)
