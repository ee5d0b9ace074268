"""LLaVA-NeXT-Video: images as in LLaVA-NeXT, and videos whose frames are pooled.

Symbols: F frames, R patches in a row of a view, K rows and columns that are pooled into one token.
"""

from __future__ import annotations

from typing import Any

import torch

from llava_todre.errors import TodreError
from llava_todre.hf.family import Family, Inputs, Layouts
from llava_todre.hf.llava import (
    CLIP,
    anyres_layout,
    clip_feature_layer,
    clip_measure,
    image_sizes,
    require_strategy,
    tower_layers,
    tower_side,
)
from llava_todre.model.vision import QUANTITIES
from llava_todre.stage1.layout import Layout


def pooled_video(num_frames: int, side: int, stride: int) -> Layout:
    """Return the layout of a video of F frames, each of (R // K)**2 tokens.

    Args:
        num_frames: F.
        side: R.
        stride: K; rows and columns that do not fill a window are left out.
    """
    tokens = side // stride
    patches = torch.arange(num_frames * side**2).view(num_frames, side, side)
    windows = patches.unfold(1, stride, stride).unfold(2, stride, stride)  # (F, R/K, R/K, K, K)
    places = torch.cartesian_prod(*(torch.arange(size) for size in windows.shape[:3]))
    frame, row, column = places.unbind(dim=1)
    return Layout(
        is_newline=torch.zeros(len(frame), dtype=torch.bool),
        row_id=torch.full((len(frame),), -1),
        view=frame,
        row=row,
        column=column,
        sources=windows.reshape(-1, stride**2),
        num_patches=patches.numel(),
        side=tokens,
        is_video=True,
    )


def _layouts(model: Any, inputs: Inputs) -> Layouts:
    require_strategy(model, "default")
    layouts: Layouts = {}
    if inputs.get("pixel_values") is not None:
        layouts["image"] = [anyres_layout(model, *size) for size in image_sizes(inputs)]
    if inputs.get("pixel_values_videos") is not None:
        stride = model.config.spatial_pool_stride
        layouts["video"] = [
            pooled_video(len(video), tower_side(model), stride)
            for video in inputs["pixel_values_videos"]
        ]
    return layouts


def _feature_layer(model: Any) -> int:
    mode = model.config.spatial_pool_mode
    if mode != "average":
        raise TodreError(
            f"spatial_pool_mode must be average for methods that need vision_features, got {mode}."
        )
    return clip_feature_layer(model)


LLAVA_NEXT_VIDEO = Family(
    name="llava_next_video",
    models=("LlavaNextVideoForConditionalGeneration",),
    layouts=_layouts,
    tower_layers=tower_layers,
    measure=clip_measure,
    quantities=frozenset(QUANTITIES),
    towers=CLIP,
    inputs=("pixel_values", "image_sizes", "pixel_values_videos"),
    feature_layer=_feature_layer,
)
