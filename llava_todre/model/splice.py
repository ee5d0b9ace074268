"""Putting visual tokens where a prompt says ``<image>``, and padding prompts to a batch.

Symbols: T prompt ids, P placeholders among them, L spliced length, D decoder width, B batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava_todre.model.multimodal import PackedVisual
from llava_todre.model.prompt import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_todre.spans import Kind, Spans


@dataclass(frozen=True)
class SplicedPrompt:
    """One prompt as the decoder reads it."""

    embeds: Tensor
    """(L, D)."""
    kinds: Tensor
    """(L,) int8 of :class:`~llava_todre.spans.Kind`."""
    labels: Tensor | None
    """(L,) int64, visual tokens ignored."""
    visuals: tuple[PackedVisual, ...]


def question_rows(ids: Tensor) -> Tensor:
    """Return (T,) bool: the text that follows the first image."""
    is_image = ids == IMAGE_TOKEN_INDEX
    return (is_image.cumsum(0) > 0) & ~is_image


def splice(
    ids: Tensor, labels: Tensor | None, text: Tensor, visuals: Sequence[PackedVisual]
) -> SplicedPrompt:
    """Replace each placeholder by its visual tokens.

    Args:
        ids: (T,) with P placeholders.
        labels: (T,) or None.
        text: (T, D) embeddings of the ids; rows of placeholders are not read.
        visuals: P of them, in order.
    """
    places = (ids == IMAGE_TOKEN_INDEX).nonzero()[:, 0].tolist()
    embeds: list[Tensor] = []
    kinds: list[Tensor] = []
    targets: list[Tensor] = []

    def append(piece: Tensor, kind: Kind, target: Tensor | None) -> None:
        embeds.append(piece)
        kinds.append(torch.full((len(piece),), kind, dtype=torch.int8, device=ids.device))
        if labels is not None:
            ignored = labels.new_full((len(piece),), IGNORE_INDEX)
            targets.append(ignored if target is None else target)

    for index, (start, stop) in enumerate(zip([-1, *places], [*places, len(ids)], strict=True)):
        if index > 0:
            append(visuals[index - 1].embeds.to(text), Kind.VISUAL, None)
        piece = slice(start + 1, stop)
        kind = Kind.TEXT if index > 0 else Kind.SYSTEM
        append(text[piece], kind, None if labels is None else labels[piece])
    return SplicedPrompt(
        torch.cat(embeds), torch.cat(kinds), torch.cat(targets) if targets else None, tuple(visuals)
    )


def pad_prompts(prompts: Sequence[SplicedPrompt], side: str) -> tuple[Tensor, Spans, Tensor | None]:
    """Return (B, L, D) embeddings, the kinds of their positions, and (B, L) labels if any."""

    def pad(rows: Sequence[Tensor], value: float) -> Tensor:
        return pad_sequence(list(rows), True, value, padding_side=side)

    labels = [prompt.labels for prompt in prompts if prompt.labels is not None]
    return (
        pad([prompt.embeds for prompt in prompts], 0.0),
        Spans(pad([prompt.kinds for prompt in prompts], Kind.PADDING)),
        pad(labels, IGNORE_INDEX) if labels else None,
    )
