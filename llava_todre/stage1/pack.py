"""Putting visual tokens where a prompt says ``<image>``, and padding prompts to a batch.

Symbols: T prompt ids, P placeholders among them, L spliced length, D decoder width, B batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava_todre.model.prompt import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_todre.spans import Spans, TokenType
from llava_todre.stage1.select import PrunedImage


@dataclass(frozen=True)
class SplicedPrompt:
    """One prompt as the decoder reads it."""

    embeds: Tensor
    """(L, D)."""
    kinds: Tensor
    """(L,) int8 of :class:`~llava_todre.spans.TokenType`."""
    row_id: Tensor
    """(L,) int64, see :class:`~llava_todre.spans.Spans`."""
    labels: Tensor | None
    """(L,) int64, visual tokens ignored."""
    visuals: tuple[PrunedImage, ...]
    prefix_len: int
    """Positions up to the last visual token."""
    prefix_ids: tuple[int, ...]
    """The ids they were made from, placeholders included."""

    @property
    def whole_length(self) -> int:
        """L before anything was pruned."""
        stats = [visual.stats for visual in self.visuals]
        whole = sum(each.num_tokens + each.num_newlines for each in stats)
        return len(self.embeds) + whole - sum(len(visual.embeds) for visual in self.visuals)


def question_rows(ids: Tensor) -> Tensor:
    """Return (T,) bool: the text that follows the first image."""
    is_image = ids == IMAGE_TOKEN_INDEX
    return (is_image.cumsum(0) > 0) & ~is_image


def splice(
    ids: Tensor, labels: Tensor | None, text: Tensor, visuals: Sequence[PrunedImage]
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
    line: list[Tensor] = []
    targets: list[Tensor] = []
    num_lines = prefix_len = 0

    for index, (start, stop) in enumerate(zip([-1, *places], [*places, len(ids)], strict=True)):
        if index > 0:
            visual = visuals[index - 1]
            size = len(visual.embeds)
            embeds.append(visual.embeds.to(text))
            kinds.append(torch.where(visual.is_newline, TokenType.NEWLINE, TokenType.VISUAL))
            line.append(torch.where(visual.row_id < 0, -1, visual.row_id + num_lines))
            num_lines += visual.stats.num_newlines
            prefix_len = sum(map(len, embeds))
            if labels is not None:
                targets.append(labels.new_full((size,), IGNORE_INDEX))
        piece = slice(start + 1, stop)
        size = stop - start - 1
        embeds.append(text[piece])
        kinds.append(torch.full((size,), TokenType.TEXT if index > 0 else TokenType.SYSTEM))
        line.append(torch.full((size,), -1))
        if labels is not None:
            targets.append(labels[piece])
    return SplicedPrompt(
        torch.cat(embeds),
        torch.cat(kinds).to(ids.device, torch.int8),
        torch.cat(line).to(ids.device),
        torch.cat(targets) if targets else None,
        tuple(visuals),
        prefix_len,
        tuple(ids[: places[-1] + 1].tolist()) if places else (),
    )


def pad_prompts(
    prompts: Sequence[SplicedPrompt], side: str, by_part: bool = False
) -> tuple[Tensor, Spans, Tensor | None]:
    """Return (B, L, D) embeddings, what their positions hold, and (B, L) labels if any.

    Args:
        prompts: B of them.
        side: where the padding goes.
        by_part: pad the positions up to the last visual token and those behind it on their own, so
            that either part begins and ends at the same position in all prompts.
    """

    def pad(rows: Sequence[Tensor], value: float) -> Tensor:
        if not by_part:
            return pad_sequence(list(rows), True, value, padding_side=side)
        parts = (
            [row[: prompt.prefix_len] for row, prompt in zip(rows, prompts, strict=True)],
            [row[prompt.prefix_len :] for row, prompt in zip(rows, prompts, strict=True)],
        )
        padded = [pad_sequence(part, True, value, padding_side=side) for part in parts]
        return torch.cat(padded, dim=1)

    labels = [prompt.labels for prompt in prompts if prompt.labels is not None]
    return (
        pad([prompt.embeds for prompt in prompts], 0.0),
        Spans(
            pad([prompt.kinds for prompt in prompts], TokenType.PADDING),
            pad([prompt.row_id for prompt in prompts], -1),
            tuple(
                tuple(len(visual.stats.keep_idx) for visual in prompt.visuals) for prompt in prompts
            ),
        ),
        pad(labels, IGNORE_INDEX) if labels else None,
    )
