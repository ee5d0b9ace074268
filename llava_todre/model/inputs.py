"""From token ids and images to whole prompts, once they are checked.

Symbols: B batch, T token ids of a prompt, L its length with every visual token, D decoder width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llava_todre.errors import TodreError
from llava_todre.finite import require_finite_pixels
from llava_todre.model.clip_text import ClipText
from llava_todre.model.prompt import IMAGE_TOKEN_INDEX
from llava_todre.spans import Spans
from llava_todre.stage1.pack import Prompt, expand
from llava_todre.stage1.select import ImageFeatures

Images = Tensor | Sequence[Tensor] | Sequence[ImageFeatures]


def check_pixels(entries: Sequence[Any], side: int) -> None:
    """Raise a TodreError unless all images are finite pixels of the right shape.

    Args:
        entries: one per image or video.
        side: of a view, in pixels.
    """
    for entry in entries:
        is_tensor = isinstance(entry, Tensor)
        fits = is_tensor and entry.ndim in (3, 4) and entry.shape[-3:] == (3, side, side)
        if not fits or not entry.is_floating_point() or entry.numel() == 0:
            received = (tuple(entry.shape), entry.dtype) if is_tensor else type(entry).__name__
            raise TodreError(
                f"images must be floating-point tensors of shape (3, {side}, {side}) or "
                f"(views, 3, {side}, {side}), as process_images returns them, got {received}."
            )
    require_finite_pixels("images", entries)


def check_ids(ids: Sequence[Tensor], num_images: int, vocab_size: int) -> None:
    """Raise a TodreError for ids that no token has, or placeholders without an image.

    Args:
        ids: (T,) of each prompt, without padding.
        num_images: of all prompts together.
        vocab_size: of the model.
    """
    joined = torch.cat(list(ids))
    is_image = joined == IMAGE_TOKEN_INDEX
    wrong = joined[((joined < 0) | (joined >= vocab_size)) & ~is_image]
    if len(wrong):
        raise TodreError(
            f"input_ids must be from 0 to {vocab_size - 1}, or {IMAGE_TOKEN_INDEX} for an image, "
            f"got {int(wrong[0])}."
        )
    expected = int(is_image.sum())
    if expected != num_images:
        raise TodreError(
            f"prompt has {expected} '<image>' placeholders, but {num_images} images were given; "
            "they must agree."
        )


def refuse_placeholders(input_ids: Tensor) -> None:
    """Raise the error that the embedding would raise as an illegal index."""
    if bool((input_ids == IMAGE_TOKEN_INDEX).any()):
        raise TodreError("images is missing, but the prompt contains '<image>'.")


def whole_prompts(
    ids: Sequence[Tensor],
    labels: Sequence[Tensor | None],
    images: Sequence[ImageFeatures],
    embed: Callable[[Tensor], Tensor],
) -> list[Prompt]:
    """Return B prompts before Stage 1.

    Args:
        ids: (T,) of each prompt, without padding.
        labels: (T,) of each prompt, or None.
        images: of all prompts, in order.
        embed: (T,) ids to (T, D) embeddings.
    """
    remaining, prompts = iter(images), []
    for row, of_row in zip(ids, labels, strict=True):
        is_image = (row == IMAGE_TOKEN_INDEX).cpu()
        own = [next(remaining) for _ in range(int(is_image.sum()))]
        source, image = expand(is_image, [len(each.layout) for each in own])
        text = embed(row.clamp_min(0))
        prompts.append(Prompt(row.cpu(), text, own, source, image, of_row))
    return prompts


def clip_similarities(
    clip_text: ClipText, prompts: Sequence[Prompt], questions: Sequence[str] | None
) -> list[Tensor | None]:
    """Return how well the patches of each image match the question of its prompt, in words."""
    features = [[image.vision_features for image in prompt.images] for prompt in prompts]
    texts = () if questions is None or isinstance(questions, str) else questions
    if len(texts) != len(prompts):
        if any(each is not None for row in features for each in row):
            raise TodreError(
                f"questions must hold the question of each of the {len(prompts)} prompts, in "
                f"words, for a method that needs clip_similarity, got {len(texts)}."
            )
        texts = [""] * len(prompts)  # not read
    return [
        None if each is None else clip_text.similarity(each, text)
        for row, text in zip(features, texts, strict=True)
        for each in row
    ]


def padding_mask(spans: Spans) -> Tensor | None:
    """Return the (B, L) attention mask; None where nothing is padded."""
    return None if bool(spans.valid.all()) else spans.valid.long()
