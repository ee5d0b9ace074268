"""Images that a stock model has read once, for any number of questions about them.

Symbols: B batch, L prompt length with every visual token, S tokens of one image in it, D decoder
width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from llava_todre.errors import TodreError
from llava_todre.hf.capture import DecoderInputs
from llava_todre.hf.family import Layouts
from llava_todre.hf.prompts import Visual
from llava_todre.spans import is_visual
from llava_todre.stage1.pack import SplicedPrompt, kept_deep_features, kept_positions
from llava_todre.stage1.select import ImageFeatures
from llava_todre.stage2.prefix import Prefix


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """One image or video after tower and projector; serves any prompt that shows it."""

    features: ImageFeatures
    modality: str
    """image or video."""
    deepstack: tuple[Tensor, ...] = ()
    """(S, D) added after each of the first decoder layers."""
    inputs: Mapping[str, Any] = field(default_factory=dict)
    """Its row of the arguments of ``generate`` that its positions are computed from, e.g. (1, 3)
    ``image_grid_thw``."""


def encoded_images(
    visuals: Sequence[Visual],
    features: Sequence[ImageFeatures],
    captured: DecoderInputs,
    inputs: Mapping[str, Any],
    positioned_by: Mapping[str, str],
) -> list[EncodedImage]:
    """Return the images and videos of the only prompt in a batch.

    Args:
        visuals: where they stand.
        features: each as Stage 1 reads it.
        captured: the prompt as the decoder would have read it.
        inputs: arguments of ``generate``.
        positioned_by: see :class:`~llava_todre.hf.family.Family`.
    """
    found: list[EncodedImage] = []
    for visual, image in zip(visuals, features, strict=True):
        deep: tuple[Tensor, ...] = ()
        if captured.deepstack is not None and captured.deepstack_at is not None:
            rows = captured.deepstack_at[0].cumsum(0)[visual.columns] - 1
            deep = tuple(each[rows.to(each.device)] for each in captured.deepstack)
        number = sum(each.modality == visual.modality for each in found)
        own = {
            key: inputs[key][number : number + 1]
            for key, modality in positioned_by.items()
            if modality == visual.modality and inputs.get(key) is not None
        }
        found.append(EncodedImage(image, visual.modality, deep, own))
    return found


def layouts_of(encoded: Sequence[EncodedImage]) -> Layouts:
    """Return how the images and videos lie, by modality."""
    found: Layouts = {}
    for image in encoded:
        found.setdefault(image.modality, []).append(image.features.layout)
    return found


def in_prompts(
    encoded: Sequence[EncodedImage], visuals: Sequence[Sequence[Visual]]
) -> list[list[EncodedImage]]:
    """Return the images and videos of each prompt, in the order of ``visuals``.

    Raises:
        TodreError: the prompts do not show all of them.
    """
    num_shown = sum(map(len, visuals))
    if num_shown != len(encoded):
        raise TodreError(
            f"encoded must hold the {num_shown} images and videos of the prompts, got "
            f"{len(encoded)}."
        )
    remaining = {
        modality: iter([image for image in encoded if image.modality == modality])
        for modality in ("image", "video")
    }
    return [[next(remaining[visual.modality]) for visual in row] for row in visuals]


def position_inputs(
    ids: Tensor,
    visuals: Sequence[Sequence[Visual]],
    images: Sequence[Sequence[EncodedImage]],
) -> dict[str, Any]:
    """Return the arguments of ``generate`` that a model computes positions in space from, if any.

    Args:
        ids: (B, L).
        visuals: where the images stand in each prompt.
        images: what they are.
    """
    shown = [image for row in images for image in row]
    found: dict[str, Any] = {}
    for key in dict.fromkeys(key for image in shown for key in image.inputs):
        parts = [image.inputs[key] for image in shown if key in image.inputs]
        is_tensor = isinstance(parts[0], Tensor)
        found[key] = torch.cat(parts) if is_tensor else [one for part in parts for one in part]
    if found:
        types = torch.zeros_like(ids)
        for row, of_row in zip(types, visuals, strict=True):
            for visual in of_row:
                row[visual.columns] = 1 if visual.modality == "image" else 2
        found["mm_token_type_ids"] = types
    return found


def with_deepstack(
    captured: DecoderInputs,
    visuals: Sequence[Sequence[Visual]],
    images: Sequence[Sequence[EncodedImage]],
) -> DecoderInputs:
    """Return a batch that was captured without pixels, with the deep features of its images.

    Args:
        captured: the batch.
        visuals: where the images stand in each prompt.
        images: what they are.
    """
    deep = [image.deepstack for row in images for image in row]
    if not any(deep):
        return captured
    at = torch.zeros(captured.embeds.shape[:2], dtype=torch.bool, device=captured.embeds.device)
    for row, of_row in zip(at, visuals, strict=True):
        for visual in of_row:
            row[visual.columns] = True
    layers = [torch.cat(list(each)) for each in zip(*deep, strict=True)]
    return replace(captured, deepstack=layers, deepstack_at=at)


def prefixes_of(prompts: Sequence[SplicedPrompt], captured: DecoderInputs) -> list[Prefix]:
    """Return what the decoder reads of each prompt up to its last visual token."""
    deep: list[list[Tensor]] = [[] for _ in prompts]
    if captured.deepstack is not None and captured.deepstack_at is not None:
        counts = [int(is_visual(prompt.kinds).sum()) for prompt in prompts]
        kept = kept_deep_features(captured.deepstack, captured.deepstack_at, prompts)
        deep = [list(parts) for parts in zip(*(each.split(counts) for each in kept), strict=True)]
    found = []
    for row, prompt in enumerate(prompts):
        inputs: dict[str, Any] = {}
        if captured.position_ids is not None:
            own = captured.position_ids[:, row : row + 1]
            inputs["position_ids"] = kept_positions(own, [prompt])[..., : prompt.prefix_len]
        embeds = prompt.embeds[: prompt.prefix_len]
        if deep[row]:
            inputs["visual_pos_masks"] = is_visual(prompt.kinds)[None, : prompt.prefix_len].to(
                embeds.device
            )
            inputs["deepstack_visual_embeds"] = deep[row]
        found.append(Prefix(prompt.prefix_ids, prompt.visuals, embeds, inputs))
    return found
