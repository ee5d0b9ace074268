"""InternVL: tiles of equal size, the thumbnail last, four patches to a token.

The prompt does not say how many tiles an image was cut into; the length of its run of placeholders
does. A video comes as one image per frame, and nothing in the model's inputs tells the two apart:
each frame is pruned as an image. In which shape the tiles were laid out is not known either, so
methods see views without a grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from llava_todre.errors import TodreError
from llava_todre.hf.family import Family, Inputs, Layouts
from llava_todre.hf.llava import require_strategy
from llava_todre.model.vision import QUANTITIES
from llava_todre.stage1.layout import Layout


def _layouts(model: Any, inputs: Inputs) -> Layouts:
    require_strategy(model, "default")
    shown = (inputs["input_ids"] == model.config.image_token_id) & inputs["attention_mask"].bool()
    patches, merge = _patches_per_side(model), round(1 / model.config.downsample_ratio)
    tokens = (patches // merge) ** 2
    num_tiles = []
    for row in shown.cpu():
        is_run, lengths = row.unique_consecutive(return_counts=True)
        for length in lengths[is_run].tolist():
            if length % tokens:
                raise TodreError(
                    f"image tokens in a row must be a multiple of {tokens}, as the processor makes "
                    f"them, got {length}."
                )
            num_tiles.append(length // tokens)
    num_given = len(inputs["pixel_values"])
    if sum(num_tiles) != num_given:
        raise TodreError(
            f"pixel_values must have {sum(num_tiles)} tiles, as the prompts have room for, got "
            f"{num_given}."
        )
    return {"image": [tiles_layout(count, patches, merge) for count in num_tiles]}


def tiles_layout(num_tiles: int, patches: int, merge: int) -> Layout:
    """Return the layout of an image cut into tiles, of which the last is the thumbnail.

    Args:
        num_tiles: 1 stands for an image that was not cut.
        patches: per row and column of a tile.
        merge: patches per row and column of a token.
    """
    side = patches // merge
    in_tile = torch.arange(patches**2).view(side, merge, side, merge).transpose(1, 2)
    starts = torch.arange(num_tiles) * patches**2
    sources = (starts[:, None, None] + in_tile.reshape(side**2, merge**2)).flatten(0, 1)
    views = torch.arange(1, num_tiles + 1) % num_tiles  # crops 1, 2, ..., then thumbnail 0
    return Layout.of_views(views, side, side, sources)


def _patches_per_side(model: Any) -> int:
    config = model.config.vision_config
    return int(config.image_size[0] // config.patch_size[0])


def _tower_layers(model: Any) -> Sequence[nn.Module]:
    return model.model.vision_tower.encoder.layer


def _measure(quantity: str, layer: nn.Module, hidden: Tensor, called: Inputs) -> Tensor:
    del called
    block: Any = layer
    attention = block.attention
    as_in_clip = SimpleNamespace(
        layer_norm1=block.layernorm_before,
        self_attn=SimpleNamespace(
            num_heads=attention.num_heads,
            q_proj=lambda states: attention.q_norm(attention.q_proj(states)),
            k_proj=lambda states: attention.k_norm(attention.k_proj(states)),
        ),
    )
    return QUANTITIES[quantity](as_in_clip, hidden).flatten(0, 1)


INTERNVL = Family(
    name="internvl",
    models=("InternVLForConditionalGeneration",),
    layouts=_layouts,
    tower_layers=_tower_layers,
    measure=_measure,
    quantities=frozenset(QUANTITIES),
    inputs=("pixel_values",),
)
