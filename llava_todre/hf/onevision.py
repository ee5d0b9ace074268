"""LLaVA-OneVision: a SigLIP tower without [CLS]; large grids of crops and videos are shrunk.

An image alone in its prompt is cut into crops, several images are not. Shrinking is bilinear: a
token is made of up to four patches. To find them, the model's own packing and pooling are given
coordinates instead of features.

Symbols: V views, F frames, R patches in a row of a view, S tokens of an image, N without newlines.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llava_todre.hf.family import Family, Inputs, Layouts
from llava_todre.hf.llava import (
    crop_grid,
    image_sizes,
    require_strategy,
    tower_layers,
    tower_side,
)
from llava_todre.model.vision import attention_received
from llava_todre.stage1.anyres import NEWLINE
from llava_todre.stage1.layout import Layout


def _measure(quantity: str, layer: nn.Module, hidden: Tensor, called: Inputs) -> Tensor:
    del called
    assert quantity == "received_attention", "the only one listed below"
    return attention_received(layer, hidden).flatten(0, 1)


def _coordinates(rows: int, columns: int) -> Tensor:
    """Return (rows * columns, 2) float32, the row and column of each place of a grid."""
    return torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float()


def _neighbours(places: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the four places of a grid around each of ``places`` (N, 2).

    Returns:
        (N, 4) rows, (N, 4) columns, and (N, 4) shares.
    """
    first = places.floor()
    share = places - first  # (N, 2) of the second row and column
    low = first.long()
    high = torch.minimum(low + 1, torch.tensor([rows - 1, columns - 1]))
    row = torch.stack([low[:, 0], low[:, 0], high[:, 0], high[:, 0]], dim=1)
    column = torch.stack([low[:, 1], high[:, 1], low[:, 1], high[:, 1]], dim=1)
    down, right = share[:, :1], share[:, 1:]
    shares = torch.cat(
        [(1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right], dim=1
    )
    return row, column, shares


def anyres_max_layout(model: Any, height: int, width: int) -> Layout:
    """Return the layout of an image that is cut into crops: thumbnail, then the canvas of crops.

    A token of a shrunk canvas is placed at the patch nearest to it.
    """
    (columns, rows), side = crop_grid(model, height, width), tower_side(model)
    canvas = _coordinates(rows * side, columns * side)
    crops = canvas.view(rows, side, columns, side, 2).transpose(1, 2).reshape(-1, side**2, 2)
    packed, _ = model.model.pack_image_features(
        [torch.cat([crops[:1], crops])],
        torch.tensor([[height, width]]),
        image_newline=torch.full((2,), float(NEWLINE)),
        vision_aspect_ratio=model.config.vision_aspect_ratio,
    )
    is_newline = packed[0][:, 0] == NEWLINE
    line = is_newline.cumsum(0) - is_newline.long()
    line[: side**2] = -1
    places = packed[0][~is_newline][side**2 :]  # (N - R * R, 2)

    def patch(row: Tensor, column: Tensor) -> Tensor:
        view = 1 + row // side * columns + column // side
        return view * side**2 + row % side * side + column % side

    thumbnail = torch.arange(side**2)
    row, column, shares = _neighbours(places, rows * side, columns * side)
    whole = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(side**2, 4)
    nearest = (places + 0.5).long().unbind(dim=1)
    tokens = torch.cat([thumbnail, patch(*nearest)])
    return Layout(
        is_newline=is_newline,
        row_id=line,
        view=tokens // side**2,
        row=tokens % side**2 // side,
        column=tokens % side,
        sources=torch.cat([thumbnail[:, None].expand(-1, 4), patch(row, column)]),
        weights=torch.cat([whole, shares]),
        num_patches=(1 + rows * columns) * side**2,
        side=side,
        grid=(columns, rows),
    )


def single_view(side: int) -> Layout:
    """Return the layout of an image that is not cut: its patches and one newline."""
    slots = torch.cat([torch.arange(side**2), torch.tensor([NEWLINE])])
    return Layout.of_slots(slots, 1, side)


def video_layout(model: Any, num_frames: int) -> Layout:
    """Return the layout of a video: its frames, shrunk to half, and one newline."""
    side = tower_side(model)
    places = model.model.apply_pooling(_coordinates(side, side)[None])[0]  # of one frame
    row, column, shares = _neighbours(places, side, side)
    tokens = round(len(places) ** 0.5)  # in a row
    frame = torch.arange(num_frames).repeat_interleave(len(places))
    within = torch.arange(len(places)).repeat(num_frames)
    end = torch.tensor([True])
    return Layout(
        is_newline=torch.cat([torch.zeros(len(frame), dtype=torch.bool), end]),
        row_id=torch.zeros(len(frame) + 1, dtype=torch.int64),
        view=frame,
        row=within // tokens,
        column=within % tokens,
        sources=frame[:, None] * side**2 + (row * side + column).repeat(num_frames, 1),
        weights=shares.repeat(num_frames, 1),
        num_patches=num_frames * side**2,
        side=tokens,
        is_video=True,
    )


def _layouts(model: Any, inputs: Inputs) -> Layouts:
    require_strategy(model, "full")
    layouts: Layouts = {}
    if inputs.get("pixel_values") is not None:
        sizes, counts = image_sizes(inputs), inputs.get("batch_num_images")
        alone = [True] * len(sizes)
        if counts is not None:
            alone = [count == 1 for count in map(int, counts) for _ in range(count)]
        layouts["image"] = [
            anyres_max_layout(model, *size) if is_alone else single_view(tower_side(model))
            for size, is_alone in zip(sizes, alone, strict=True)
        ]
    if inputs.get("pixel_values_videos") is not None:
        videos = inputs["pixel_values_videos"]
        layouts["video"] = [video_layout(model, len(video)) for video in videos]
    return layouts


LLAVA_ONEVISION = Family(
    name="llava_onevision",
    models=("LlavaOnevisionForConditionalGeneration",),
    layouts=_layouts,
    tower_layers=tower_layers,
    measure=_measure,
    quantities=frozenset({"received_attention"}),
    towers=("siglip_vision_model",),
    inputs=(
        "pixel_values",
        "image_sizes",
        "batch_num_images",
        "pixel_values_videos",
        "image_sizes_videos",
    ),
    proxies={"cls_attention": "received_attention"},
)
