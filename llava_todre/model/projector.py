"""The projector from the vision tower's features to the decoder's embeddings."""

from __future__ import annotations

import re

from torch import nn

from llava_todre.errors import TodreError


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
