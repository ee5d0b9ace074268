"""Where the images of a batch stand in prompts of a stock model, and what a method sees of them.

Symbols: B batch, L prompt length, S tokens of one image in the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava_todre.errors import TodreError
from llava_todre.hf.capture import DecoderInputs
from llava_todre.hf.family import STATES, Layouts
from llava_todre.pruners import Need
from llava_todre.stage1.layout import Layout
from llava_todre.stage1.select import ImageFeatures

_NOTHING = Layout.of_slots(torch.empty(0, dtype=torch.int64), 0, 1)


@dataclass(frozen=True)
class Visual:
    """One image or video in the prompt of one sample."""

    layout: Layout
    columns: Tensor
    """(S,) where its tokens stand in the sample's prompt."""
    patches: slice
    """Its part of what was measured in the tower."""
    modality: str = "image"
    """image or video."""


def find_visuals(
    ids: Tensor, real: Tensor, placeholders: Mapping[str, int], layouts: Layouts
) -> list[list[Visual]]:
    """Return the images and videos of every sample, in the order of their tokens.

    Args:
        ids: (B, L) with a placeholder for every token of an image or video.
        real: (B, L) bool, False for padding.
        placeholders: modality -> its id.
        layouts: how each image and video lies, in the order in which they appear.

    Raises:
        TodreError: placeholders and layouts do not fit each other.
    """
    start, parts = 0, {}
    for modality in ("image", "video"):  # the order in which the tower sees them
        ends = []
        for layout in layouts.get(modality, ()):
            ends.append((layout, slice(start, start + layout.num_patches)))
            start += layout.num_patches
        parts[modality] = iter(ends)
    visuals: list[list[Visual]] = []
    for row, keep in zip(ids.cpu(), real.cpu(), strict=True):
        found = []
        for modality, token in placeholders.items():
            columns = ((row == token) & keep).nonzero()[:, 0]
            while len(columns):
                layout, patches = next(parts[modality], (_NOTHING, slice(0)))
                if not 0 < len(layout) <= len(columns):
                    raise TodreError(
                        f"prompt has {len(columns)} {modality} tokens where its next "
                        f"{modality} has {len(layout)}; allowed: what the model's processor "
                        "makes of the same images."
                    )
                found.append(Visual(layout, columns[: len(layout)], patches, modality))
                columns = columns[len(layout) :]
        visuals.append(sorted(found, key=lambda visual: int(visual.columns[0])))
    return visuals


def features_of(
    visual: Visual,
    row: int,
    captured: DecoderInputs,
    needs: frozenset[Need],
    project: Callable[[Tensor], Tensor],
) -> ImageFeatures:
    """Return an image as Stage 1 reads it.

    Args:
        visual: the image or video.
        row: number of its sample in the batch.
        captured: the batch as the decoder would have read it.
        needs: what was measured.
        project: the projector, for methods that need features before it.
    """
    layout, embeds = visual.layout, captured.embeds[row]

    def of_tokens(measured: Tensor) -> Tensor:
        return layout.gather(measured[visual.patches]).to(embeds.device)

    before: dict[str, Any] = {}
    for need, states in captured.measured.items():
        if need[0] == STATES:  # (views of all images, 1 + P, W)
            num_patches = states.shape[1] - 1
            views = slice(visual.patches.start // num_patches, visual.patches.stop // num_patches)
            before = {
                "vision_features": of_tokens(states[:, 1:].flatten(0, 1)),
                "cls_features": states[views, 0].to(embeds.device),
                "project": project,
            }
    newlines = visual.columns[layout.is_newline]
    return ImageFeatures(
        embeds[visual.columns[~layout.is_newline]],
        layout,
        newline=embeds[newlines[0]] if len(newlines) else None,
        needs=needs,
        vision={
            need: of_tokens(value) for need, value in captured.measured.items() if need[0] != STATES
        },
        **before,
    )
