"""The models of the original ``llava`` package (PyPI ``llava-torch``), where it is installed.

Nothing of the package is imported: a model that is to be pruned has brought it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from llava_todre.errors import TodreError
from llava_todre.hf.family import Family, Inputs, Layouts
from llava_todre.hf.llava import clip_measure, encoder_layers
from llava_todre.model.vision import QUANTITIES
from llava_todre.settings import whole_rows
from llava_todre.stage1.anyres import anyres_grid_shape, merge_slots
from llava_todre.stage1.layout import Layout


def _tower(model: Any) -> Any:
    tower = model.get_vision_tower()
    if tower is None or not tower.is_loaded:
        raise TodreError(
            "the vision tower is not loaded; call model.get_vision_tower().load_model() first."
        )
    if tower.select_feature != "patch":
        raise TodreError(f"mm_vision_select_feature must be patch, got {tower.select_feature}.")
    return tower


def _layouts(model: Any, inputs: Inputs) -> Layouts:
    """Return the layouts of all images, those included that no prompt shows."""
    tower, config, images = _tower(model), model.config, inputs["images"]
    side, sizes = tower.num_patches_per_side, inputs.get("image_sizes")
    if sizes is not None:
        sizes = whole_rows("image_sizes", sizes, 2)
        if len(sizes) < len(images):
            raise TodreError(
                f"image_sizes holds {len(sizes)} sizes, but images {len(images)} images; they "
                "must agree."
            )
    in_views = isinstance(images, list) or images.ndim == 5
    merge = getattr(config, "mm_patch_merge_type", "flat") if in_views else "flat"
    layouts = []
    for index, image in enumerate(images):
        num_views = len(image) if image.ndim == 4 else 1
        size, grid = None, (1, 1)
        if num_views > 1 and merge != "flat":
            if sizes is None:
                raise TodreError("image_sizes is missing; AnyRes needs (width, height) per image.")
            size = sizes[index]
            tile = tower.config.image_size
            grid = anyres_grid_shape(size, config.image_grid_pinpoints, tile)
        slots = merge_slots(num_views, side, grid, size, merge)
        layouts.append(Layout.of_slots(slots, num_views, side, grid=None if size is None else grid))
    return {"image": layouts}


def _tower_layers(model: Any) -> Sequence[nn.Module]:
    return encoder_layers(_tower(model).vision_tower)


def _feature_layer(model: Any) -> int:
    layer, num_layers = _tower(model).select_layer, len(_tower_layers(model))
    if not -num_layers - 1 <= layer < num_layers or layer == -1:
        raise TodreError(
            f"mm_vision_select_layer must be {-num_layers - 1} to -2 for methods that need "
            f"vision_features, got {layer}."
        )
    return int(layer) % (num_layers + 1)


def _project(model: Any, features: Tensor) -> Tensor:
    projected: Tensor = model.get_model().mm_projector(features)
    return projected


ORIGINAL = Family(
    name="llava_original",
    models=("llava.LlavaLlamaForCausalLM", "llava.LlavaMistralForCausalLM"),
    layouts=_layouts,
    tower_layers=_tower_layers,
    measure=clip_measure,
    quantities=frozenset(QUANTITIES),
    inputs=("images", "image_sizes"),
    feature_layer=_feature_layer,
    project=_project,
)
