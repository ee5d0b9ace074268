"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL.

An image keeps its shape, so views are rectangles. A token is a cell of 2 x 2 patches, and the tower
computes the patches cell by cell. A view of a video is a temporal group (two frames); Qwen3-VL
writes the time between them, the others do not.

The towers have no [CLS] token: in place of its attention, methods get the attention that a patch
receives from all patches of its view (``received_attention``), as VisionZip and VisPruner do.

Symbols: N tokens of an image or video, P patches of a batch, H heads, E head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llava_todre.errors import TodreError
from llava_todre.hf.family import Family, Inputs, Layouts
from llava_todre.settings import whole_rows
from llava_todre.stage1.layout import Layout

_GRIDS = {"image": "image_grid_thw", "video": "video_grid_thw"}
_PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
# Entries of attention maps that are held at once.
_MAX_ENTRIES = 2**26


def _layouts(model: Any, inputs: Inputs) -> Layouts:
    if inputs.get("mm_token_type_ids") is None:
        raise TodreError(
            "mm_token_type_ids is missing, which positions in space are computed from; give all "
            "that the processor returns."
        )
    for modality, key in _GRIDS.items():
        if inputs.get(key) is not None and inputs.get(_PIXELS[modality]) is None:
            raise TodreError(f"{_PIXELS[modality]} is missing, but {key} is given; give both.")
    return {
        modality: [
            _layout(model, frames, height, width, modality == "video")
            for frames, height, width in whole_rows(key, inputs[key], 3)
        ]
        for modality, key in _GRIDS.items()
        if inputs.get(key) is not None
    }


def _layout(model: Any, frames: int, height: int, width: int, is_video: bool) -> Layout:
    """Return the layout of one image or video of ``height`` x ``width`` patches."""
    config = model.config.vision_config
    merge = config.spatial_merge_size
    rows, columns = height // merge, width // merge
    place = torch.arange(frames * rows * columns)
    if getattr(config, "window_size", None):
        place = windowed_places(
            frames, rows, columns, config.window_size // config.patch_size // merge
        )
    sources = place[:, None] * merge**2 + torch.arange(merge**2)
    return Layout.of_views(torch.arange(frames), rows, columns, sources, is_video)


def windowed_places(frames: int, rows: int, columns: int, window: int) -> Tensor:
    """Return (N,) where the tower of Qwen2.5-VL puts each token: windows one after the other.

    Args:
        frames: views.
        rows: tokens per column of a view.
        columns: tokens per row of a view.
        window: tokens along one side of a window.
    """
    token = torch.arange(frames * rows * columns)
    band = token // columns % rows // window
    stack = token % columns // window
    number = (token // (rows * columns) * rows + band) * columns + stack
    return number.argsort(stable=True).argsort()


def _tower_layers(model: Any) -> Sequence[nn.Module]:
    return model.model.visual.blocks


def _full_attention_layer(model: Any, quantity: str, layer: int) -> int:
    """Return the nearest layer that sees whole views: the others see windows."""
    del quantity
    full = model.config.vision_config.fullatt_block_indexes
    return min(full, key=lambda index: abs(index - layer))


def _measure(quantity: str, layer: nn.Module, hidden: Tensor, called: Inputs) -> Tensor:
    """Return (P,) attention that patches receive, mean over heads and all patches of their view."""
    assert quantity == "received_attention"
    block: Any = layer
    num_heads = block.attn.num_heads
    projected = block.attn.qkv(block.norm1(hidden)).float()  # (P, 3 * H * E)
    queries, keys, _ = projected.unflatten(-1, (3, num_heads, -1)).permute(1, 2, 0, 3)
    cosines, sines = (table[None].to(queries) for table in called["position_embeddings"])
    queries, keys = apply_rotary_pos_emb(queries[None], keys[None], cosines, sines)
    ends = called["cu_seqlens"].tolist()
    lengths = [end - start for start, end in zip(ends[:-1], ends[1:], strict=True)]
    views = zip(queries[0].split(lengths, 1), keys[0].split(lengths, 1), strict=True)
    return torch.cat([_received(*view) for view in views])


def _received(queries: Tensor, keys: Tensor) -> Tensor:
    """Return (n,) the mean over heads and queries of the attention in one view of n patches.

    Args:
        queries: (H, n, E).
        keys: (H, n, E).
    """
    num_heads, length, width = keys.shape
    total = keys.new_zeros(length)
    for some in queries.split(max(1, _MAX_ENTRIES // (num_heads * length)), dim=1):
        logits = some @ keys.transpose(1, 2) * width**-0.5
        total += logits.softmax(dim=-1).sum(dim=(0, 1))
    return total / (num_heads * length)


def _deep_layers(model: Any) -> int:
    return len(model.config.vision_config.deepstack_visual_indexes)


def _family(name: str, model: str, **differences: Any) -> Family:
    return Family(
        name=name,
        models=(model,),
        layouts=_layouts,
        tower_layers=_tower_layers,
        measure=_measure,
        quantities=frozenset({"received_attention"}),
        inputs=(
            *("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"),
            "second_per_grid_ts",
        ),
        positioned_by={
            "image_grid_thw": "image",
            "video_grid_thw": "video",
            "second_per_grid_ts": "video",
        },
        proxies={"cls_attention": "received_attention"},
        **differences,
    )


QWEN = (
    _family("qwen2_vl", "Qwen2VLForConditionalGeneration"),
    _family("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", measured_at=_full_attention_layer),
    _family("qwen3_vl", "Qwen3VLForConditionalGeneration", deep_layers=_deep_layers),
)
