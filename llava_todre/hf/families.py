"""What differs between model families of transformers; everything else is the same for all.

To add a family: where its decoder and tower are, how the tokens of its images lie in the prompt,
and what of its tower a method may ask about.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llava_todre.errors import TodreError
from llava_todre.hf.layout import Layout
from llava_todre.model.images import anyres_grid_shape
from llava_todre.model.multimodal import merge_slots
from llava_todre.model.vision import QUANTITIES

Inputs = Mapping[str, Any]
Layouts = dict[str, list[Layout]]
"""By modality, "image" and "video", in the order of the tensors of pixels."""


@dataclass(frozen=True)
class Family:
    """One family."""

    name: str
    models: tuple[str, ...]
    """Classes of transformers."""
    layouts: Callable[[Any, Inputs], Layouts]
    """Model, arguments of ``generate`` -> how its images and videos lie in the prompt."""
    tower_layers: Callable[[Any], Sequence[nn.Module]]
    """Model -> encoder layers of its tower."""
    measure: Callable[[str, nn.Module, Tensor], Tensor]
    """Quantity, encoder layer, its input -> (patches of all images, ...)."""
    quantities: frozenset[str]
    """What ``measure`` knows, of :data:`llava_todre.pruners.base.VISION_NEEDS`."""
    inputs: tuple[str, ...]
    """Arguments of ``generate`` that describe images and videos."""


def _clip_measure(quantity: str, layer: nn.Module, hidden: Tensor) -> Tensor:
    return QUANTITIES[quantity](layer, hidden).flatten(0, 1)


def _clip_layers(model: Any) -> Sequence[nn.Module]:
    tower = model.model.vision_tower
    return getattr(tower, "vision_model", tower).encoder.layers


def _clip_side(model: Any) -> int:
    config = model.config.vision_config
    return int(config.image_size // config.patch_size)


def _require_patches_only(model: Any) -> None:
    strategy = model.config.vision_feature_select_strategy
    if strategy != "default":
        raise TodreError(
            f"vision_feature_select_strategy {strategy!r} is not supported; allowed: default."
        )


def _llava(model: Any, inputs: Inputs) -> Layouts:
    _require_patches_only(model)
    side = _clip_side(model)
    slots = torch.arange(side * side)
    return {"image": [Layout.of_slots(slots, 1, side) for _ in inputs["pixel_values"]]}


def anyres_layout(model: Any, height: int, width: int) -> Layout:
    """Return the layout of an image in LLaVA-NeXT: thumbnail, then the crops without padding."""
    config, side = model.config, _clip_side(model)
    # transformers writes sizes as (height, width), LLaVA as (width, height).
    resolutions = [[x, y] for y, x in config.image_grid_pinpoints]
    tile = config.vision_config.image_size
    grid = anyres_grid_shape((width, height), resolutions, tile)
    num_views = 1 + grid[0] * grid[1]
    slots = merge_slots(num_views, side, grid, (width, height), "spatial_unpad")
    return Layout.of_slots(slots, num_views, side, grid=grid)


def _llava_next(model: Any, inputs: Inputs) -> Layouts:
    _require_patches_only(model)
    sizes = torch.as_tensor(inputs["image_sizes"]).tolist()
    return {"image": [anyres_layout(model, height, width) for height, width in sizes]}


FAMILIES = (
    Family(
        "llava",
        ("LlavaForConditionalGeneration",),
        _llava,
        _clip_layers,
        _clip_measure,
        frozenset(QUANTITIES),
        ("pixel_values",),
    ),
    Family(
        "llava_next",
        ("LlavaNextForConditionalGeneration",),
        _llava_next,
        _clip_layers,
        _clip_measure,
        frozenset(QUANTITIES),
        ("pixel_values", "image_sizes"),
    ),
)


def family_of(model: Any) -> Family:
    """Return the family of a model, or raise a TodreError that names those there are."""
    names = {base.__name__ for base in type(model).__mro__}
    for family in FAMILIES:
        if names & set(family.models):
            return family
    known = ", ".join(name for family in FAMILIES for name in family.models)
    raise TodreError(f"model {type(model).__name__} is not supported; allowed: {known}.")
