"""The multimodal half of LLaVA: tower, projector, newline; images in, encoded visuals out.

Symbols: V views of one image, S side of a view in pixels, P patches per view, D decoder width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from llava_todre.errors import TodreError, unknown
from llava_todre.model.vision import VisionTower
from llava_todre.pruners import Need, Pruner
from llava_todre.selection import check_finite
from llava_todre.settings import whole_rows
from llava_todre.stage1.anyres import Size, anyres_grid_shape, merge_slots
from llava_todre.stage1.layout import Layout
from llava_todre.stage1.select import ImageFeatures
from llava_todre.stage2.llama import PruningLlamaModel

MODALITIES = ("image", "video")


class LlavaConfig(LlamaConfig):
    """Llama's configuration, LLaVA's ``mm_*`` keys, and the tower's as ``vision_config``."""

    model_type = "llava_llama"

    mm_projector_type: str = "linear"
    mm_hidden_size: int = 1024
    mm_vision_tower: str | None = None
    mm_vision_select_layer: int = -2
    mm_vision_select_feature: str = "patch"
    mm_patch_merge_type: str = "flat"
    image_aspect_ratio: str = "square"
    image_grid_pinpoints: Any = None
    tokenizer_model_max_length: int | None = None
    tokenizer_padding_side: str = "right"
    vision_config: Any = None


class LlavaLlamaModel(PruningLlamaModel):
    """The decoder together with tower, projector and newline embedding."""

    config_class = LlavaConfig

    def __init__(self, config: LlavaConfig) -> None:
        """Build without weights; nothing is downloaded."""
        super().__init__(config)
        self.vision_tower = VisionTower(
            config.vision_config,
            config.mm_vision_select_layer,
            config.mm_vision_select_feature,
            config._attn_implementation,
        )
        self.mm_projector = build_projector(
            config.mm_projector_type, config.mm_hidden_size, config.hidden_size
        )
        self.image_newline = None
        if "unpad" in config.mm_patch_merge_type:
            self.image_newline = nn.Parameter(torch.empty(config.hidden_size))

    def encode(
        self,
        images: Sequence[Tensor],
        image_sizes: Sequence[Size] | None,
        modalities: Sequence[str] | None,
        pruner: Pruner,
    ) -> list[ImageFeatures]:
        """Run tower and projector over all views at once; see ``encode_images``."""
        views = [image if image.ndim == 4 else image[None] for image in images]
        sizes = [None] * len(views)
        if image_sizes is not None:
            sizes = whole_rows("image_sizes", image_sizes, 2)
        kinds = list(modalities or ["image"] * len(views))
        if not len(views) == len(sizes) == len(kinds):
            raise TodreError(
                f"images has {len(views)} entries, but image_sizes {len(sizes)} and modalities "
                f"{len(kinds)}; they must agree."
            )
        grids = [self._grid(size, kind) for size, kind in zip(sizes, kinds, strict=True)]
        side, merge_type = self.vision_tower.side, self.config.mm_patch_merge_type
        layouts = [
            Layout.of_slots(
                merge_slots(len(view), side, grid, size, merge_type),
                len(view),
                side,
                is_video=kind == "video",
                grid=grid,
            )
            for view, grid, size, kind in zip(views, grids, sizes, kinds, strict=True)
        ]
        selects = any(pruner.will_select(layout.num_tokens) for layout in layouts)
        needs = frozenset(pruner.needs) if selects else frozenset[Need]()
        before = bool(needs & {"vision_features", "clip_similarity"})
        parameter = next(self.vision_tower.parameters())
        pixels = torch.cat([view.to(parameter.device, parameter.dtype) for view in views])
        encoded = self.vision_tower(pixels, [need for need in needs if isinstance(need, tuple)])
        projected = self.mm_projector(encoded.patches)  # (all views, P, D)
        check_finite(projected.flatten(0, 1))
        visuals = []
        start = 0
        for view, layout in zip(views, layouts, strict=True):
            part = slice(start, start + len(view))
            start = part.stop

            def of_tokens(values: Tensor, part: slice = part, layout: Layout = layout) -> Tensor:
                return layout.gather(values[part].flatten(0, 1))

            visuals.append(
                ImageFeatures(
                    of_tokens(projected),
                    layout,
                    newline=self.image_newline,
                    needs=needs,
                    vision={need: of_tokens(value) for need, value in encoded.measured.items()},
                    vision_features=of_tokens(encoded.patches) if before else None,
                    cls_features=encoded.cls[part] if before else None,
                    project=self.mm_projector if before else None,
                    resized=partial(self._resized, pixels[part]) if "resized" in needs else None,
                )
            )
        return visuals

    def _resized(self, pixels: Tensor, rows: int, columns: int) -> Tensor:
        """Return (V, rows * columns, D) of (V, 3, S, S) pixels shrunk to that many patches."""
        patch = self.vision_tower.config.patch_size
        smaller = nn.functional.interpolate(
            pixels.float(), (rows * patch, columns * patch), mode="bicubic", antialias=True
        )
        return self.mm_projector(self.vision_tower(smaller.to(pixels)).patches)

    def _grid(self, size: Size | None, kind: str) -> Size | None:
        """Return (columns, rows) of the crops of an AnyRes image."""
        if kind not in MODALITIES:
            raise unknown("modality", kind, MODALITIES)
        config = self.config
        is_anyres = config.image_aspect_ratio == "anyres" and config.mm_patch_merge_type != "flat"
        if not is_anyres or kind == "video":
            return None
        if size is None:
            raise TodreError(
                "image_sizes is missing; AnyRes needs the (width, height) of every image."
            )
        tile = self.vision_tower.config.image_size
        return anyres_grid_shape(size, config.image_grid_pinpoints, tile)


def build_projector(kind: str, vision_width: int, width: int) -> nn.Module:
    """Return the vision-to-language projector named by ``mm_projector_type``.

    Args:
        kind: ``"linear"``, ``"mlpNx_gelu"`` (N linear layers with GELU between) or ``"identity"``.
        vision_width: features per patch.
        width: of the decoder.
    """
    if kind == "linear":
        return nn.Linear(vision_width, width)
    if kind == "identity":
        return nn.Identity()
    match = re.fullmatch(r"mlp([1-9])x_gelu", kind)
    if match is None:
        raise TodreError(
            "mm_projector_type must be linear, identity or mlp2x_gelu (1 to 9 layers), "
            f"got {kind!r}."
        )
    layers: list[nn.Module] = [nn.Linear(vision_width, width)]
    for _ in range(1, int(match[1])):
        layers += [nn.GELU(), nn.Linear(width, width)]
    return nn.Sequential(*layers)
