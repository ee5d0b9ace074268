"""LLaVA-1.5 and LLaVA-NeXT: a CLIP tower, one token per patch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llava_todre.errors import TodreError
from llava_todre.hf.family import Family, Inputs, Layouts
from llava_todre.model.convert import feature_layer
from llava_todre.model.vision import QUANTITIES
from llava_todre.settings import whole_rows
from llava_todre.stage1.anyres import NEWLINE, Size, anyres_grid_shape
from llava_todre.stage1.layout import Layout

CLIP = ("clip_vision_model",)


def clip_measure(quantity: str, layer: nn.Module, hidden: Tensor, called: Inputs) -> Tensor:
    """Return (V * P, ...) a quantity of one encoder layer with input (V, 1 + P, W)."""
    del called
    return QUANTITIES[quantity](layer, hidden).flatten(0, 1)


def tower_layers(model: Any) -> Sequence[nn.Module]:
    """Return the encoder layers of a CLIP or SigLIP tower."""
    return encoder_layers(model.model.vision_tower)


def encoder_layers(tower: Any) -> Sequence[nn.Module]:
    """Return the encoder layers of a vision model of transformers."""
    layers: Sequence[nn.Module] = getattr(tower, "vision_model", tower).encoder.layers
    return layers


def tower_side(model: Any) -> int:
    """Return the patches in a row of a view."""
    config = model.config.vision_config
    return int(config.image_size // config.patch_size)


def clip_feature_layer(model: Any) -> int:
    """Return the tower layer whose input the projector reads."""
    layer, num_layers = feature_layer(model.config.vision_feature_layer), len(tower_layers(model))
    if not isinstance(layer, int) or not -num_layers - 1 <= layer < num_layers or layer == -1:
        raise TodreError(
            f"vision_feature_layer must be {-num_layers - 1} to -2 for methods that need "
            f"vision_features, got {layer}."
        )
    return layer % (num_layers + 1)


def require_strategy(model: Any, allowed: str) -> None:
    """Raise a TodreError unless the tower's tokens are used as its family does.

    Args:
        model: a model.
        allowed: default, which drops [CLS], or full.
    """
    strategy = model.config.vision_feature_select_strategy
    if strategy != allowed:
        raise TodreError(f"vision_feature_select_strategy must be {allowed}, got {strategy}.")


def crop_grid(model: Any, height: int, width: int) -> Size:
    """Return the (columns, rows) of crops that an image of this size in pixels is cut into."""
    # transformers writes sizes as (height, width), LLaVA as (width, height).
    resolutions = [[x, y] for y, x in model.config.image_grid_pinpoints]
    return anyres_grid_shape((width, height), resolutions, model.config.vision_config.image_size)


def anyres_layout(model: Any, height: int, width: int) -> Layout:
    """Return the layout of an image in LLaVA-NeXT: thumbnail, then the crops without padding.

    The model's own packing says which patch goes where: it is given their numbers.
    """
    grid, side = crop_grid(model, height, width), tower_side(model)
    num_views = 1 + grid[0] * grid[1]
    numbers = torch.arange(num_views * side**2, dtype=torch.float32).view(num_views, -1, 1)
    packed, _ = model.model.pack_image_features(
        [numbers],
        torch.tensor([[height, width]]),
        vision_feature_select_strategy="default",
        image_newline=torch.tensor([float(NEWLINE)]),
    )
    return Layout.of_slots(packed[0][:, 0].long(), num_views, side, grid=grid)


def image_sizes(inputs: Inputs) -> list[Size]:
    """Return the (height, width) of the images in pixels.

    Raises:
        TodreError: they are missing, no sizes, or of another number of images.
    """
    pixels, given = inputs["pixel_values"], inputs.get("image_sizes")
    if given is None:
        raise TodreError("image_sizes is missing; give the (height, width) of every image.")
    sizes: list[Size] = whole_rows("image_sizes", given, 2)
    by_image = isinstance(pixels, (list, tuple)) or pixels.ndim == 5
    if by_image and len(sizes) != len(pixels):
        raise TodreError(
            f"image_sizes holds {len(sizes)} sizes, but pixel_values {len(pixels)} images; they "
            "must agree."
        )
    return sizes


def _llava(model: Any, inputs: Inputs) -> Layouts:
    require_strategy(model, "default")
    side = tower_side(model)
    slots = torch.arange(side * side)
    return {"image": [Layout.of_slots(slots, 1, side) for _ in inputs["pixel_values"]]}


def _llava_next(model: Any, inputs: Inputs) -> Layouts:
    require_strategy(model, "default")
    return {"image": [anyres_layout(model, *size) for size in image_sizes(inputs)]}


LLAVA = Family(
    name="llava",
    models=("LlavaForConditionalGeneration",),
    layouts=_llava,
    tower_layers=tower_layers,
    measure=clip_measure,
    quantities=frozenset(QUANTITIES),
    towers=CLIP,
    inputs=("pixel_values",),
    feature_layer=clip_feature_layer,
)
LLAVA_NEXT = Family(
    name="llava_next",
    models=("LlavaNextForConditionalGeneration",),
    layouts=_llava_next,
    tower_layers=tower_layers,
    measure=clip_measure,
    quantities=frozenset(QUANTITIES),
    towers=CLIP,
    inputs=("pixel_values", "image_sizes"),
    feature_layer=clip_feature_layer,
)
