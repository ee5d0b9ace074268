"""Stage 1 on prompts of a stock model: where their images stand, and what a method reads of them.

Symbols: B batch, L prompt length, S tokens of one image in the prompt, D decoder width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava_todre.errors import TodreError
from llava_todre.hf.capture import DecoderInputs
from llava_todre.hf.family import STATES, Layouts
from llava_todre.pruners import Need, Pruner
from llava_todre.stage1.layout import Layout
from llava_todre.stage1.pack import Prompt, SplicedPrompt, prune_prompts
from llava_todre.stage1.select import ImageFeatures
from llava_todre.stats import PruneStats

_PLACEHOLDERS = {
    "image": ("image_token_id", "image_token_index"),
    "video": ("video_token_id", "video_token_index"),
}
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


Visuals = list[list[Visual]]
"""The images and videos of each sample, in the order of their first tokens."""


def placeholders_of(config: Any) -> dict[str, int]:
    """Return modality -> the id that stands for its tokens in prompts of a model."""
    found: dict[str, int] = {}
    for modality, names in _PLACEHOLDERS.items():
        for token in (getattr(config, name, None) for name in names):
            if isinstance(token, int):
                found.setdefault(modality, token)
    return found


def find_visuals(
    ids: Tensor, real: Tensor, placeholders: Mapping[str, int], layouts: Layouts
) -> Visuals:
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
    visuals: Visuals = []
    for row, keep in zip(ids.cpu(), real.cpu(), strict=True):
        found = []
        for modality, token in placeholders.items():
            columns = ((row == token) & keep).nonzero()[:, 0]
            while len(columns):
                layout, patches = next(parts[modality], (_NOTHING, slice(0)))
                if not 0 < len(layout) <= len(columns):
                    raise TodreError(
                        f"prompt must have the {len(layout)} tokens of its next {modality}, as "
                        f"the processor makes them, got {len(columns)}."
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
        newline=embeds[newlines[0]].clone() if len(newlines) else None,
        needs=needs,
        vision={
            need: of_tokens(value) for need, value in captured.measured.items() if need[0] != STATES
        },
        **before,
    )


def prune_batch(
    ids: Tensor,
    real: Tensor,
    visuals: Visuals,
    embeds: Tensor,
    features: Sequence[Sequence[ImageFeatures]],
    pruner: Pruner,
) -> list[SplicedPrompt]:
    """Let the method select from the images of all prompts.

    Args:
        ids: (B, L).
        real: (B, L) bool, False for padding.
        visuals: where the images stand in each prompt.
        embeds: (B, L, D).
        features: the images of each prompt.
        pruner: the method.
    """
    prompts = []
    for row, (of_row, keep) in enumerate(zip(visuals, real.cpu(), strict=True)):
        image = torch.full_like(keep, -1, dtype=torch.int64)
        for number, visual in enumerate(of_row):
            image[visual.columns] = number
        source = keep.nonzero()[:, 0]
        prompts.append(Prompt(ids[row].cpu(), embeds[row], features[row], source, image[keep]))
    return prune_prompts(prompts, pruner)


def unpruned_stats(real: Tensor, visuals: Visuals, num_layers: int) -> tuple[PruneStats, ...]:
    """Return the statistics of a call in which nothing is dropped.

    Args:
        real: (B, L) bool, False for padding.
        visuals: the images and videos of each sample.
        num_layers: of the decoder.
    """
    found = []
    for of_sample, length in zip(visuals, real.sum(dim=1).tolist(), strict=True):
        images = tuple(visual.layout.stats() for visual in of_sample)
        shown = sum(len(visual.columns) for visual in of_sample)
        newlines = sum(image.num_newlines for image in images)
        lengths, counts = (length,) * num_layers, (shown,) * num_layers
        found.append(PruneStats(images, newlines, (), lengths, counts))
    return tuple(found)
