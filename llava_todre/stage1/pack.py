"""From whole prompts to pruned ones, and from those to a batch.

All bookkeeping is on the CPU. Symbols: B batch, T token ids of a prompt as it is given, L its
length with every visual token, M its length after Stage 1, D decoder width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava_todre.pruners import Pruner
from llava_todre.spans import Spans, TokenType
from llava_todre.stage1.select import ImageFeatures, PerImage, PrunedImage, prune_images

IGNORE_INDEX = -100
"""Label of tokens that no loss is computed for."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """One prompt before Stage 1."""

    ids: Tensor
    """(T,) on the CPU, with one placeholder or more for each image or video."""
    embeds: Tensor
    """(T, D) of the ids; not read at placeholders."""
    images: Sequence[ImageFeatures]
    """In the order of their first tokens."""
    source: Tensor
    """(L,) int64 which of the ids each position of the prompt comes from; padding is left out."""
    image: Tensor
    """(L,) int64 which of the images each position belongs to; -1 is text."""
    labels: Tensor | None = None
    """(T,) int64."""


@dataclass(frozen=True, eq=False)
class SplicedPrompt:
    """One prompt as the decoder reads it."""

    columns: Tensor
    """(M,) int64 which of the given ids each position comes from."""
    ids: Tensor
    """(M,) those ids."""
    embeds: Tensor
    """(M, D)."""
    kinds: Tensor
    """(M,) int8 of :class:`~llava_todre.spans.TokenType`."""
    row_id: Tensor
    """(M,) int64, see :class:`~llava_todre.spans.Spans`."""
    labels: Tensor | None
    """(M,) int64, visual tokens ignored."""
    visuals: tuple[PrunedImage, ...]
    prefix_len: int
    """Positions up to the last visual token."""
    whole_length: int
    """L."""

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """The ids up to the last visual token."""
        return tuple(self.ids[: self.prefix_len].tolist())


def expand(is_image: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return ``source`` and ``image`` of a prompt with one placeholder per image.

    Args:
        is_image: (T,) bool, the placeholders.
        lengths: tokens of each image.
    """
    repeats = torch.ones(len(is_image), dtype=torch.int64)
    repeats[is_image] = torch.tensor(lengths, dtype=torch.int64)
    number = (is_image.cumsum(0) - 1).masked_fill(~is_image, -1)
    return (
        torch.arange(len(is_image)).repeat_interleave(repeats),
        number.repeat_interleave(repeats),
    )


def prune_prompts(
    prompts: Sequence[Prompt], pruner: Pruner, similarities: PerImage = None
) -> list[SplicedPrompt]:
    """Stage 1 on a batch of prompts.

    Args:
        prompts: B of them.
        pruner: the method.
        similarities: see :func:`~llava_todre.stage1.select.prune_images`.
    """
    texts = None
    if "text_embeds" in pruner.needs:
        questions = [_question(prompt) for prompt in prompts]
        texts = [
            text for prompt, text in zip(prompts, questions, strict=True) for _ in prompt.images
        ]
    images = [image for prompt in prompts for image in prompt.images]
    pruned = iter(prune_images(images, pruner, texts, similarities))
    return [_spliced(prompt, [next(pruned) for _ in prompt.images]) for prompt in prompts]


def _question(prompt: Prompt) -> Tensor:
    """Return (T', D) the text that follows the first image."""
    is_image = prompt.image >= 0
    rows = prompt.source[(is_image.cumsum(0) > 0) & ~is_image]
    return prompt.embeds[rows.to(prompt.embeds.device)]


def _spliced(prompt: Prompt, visuals: Sequence[PrunedImage]) -> SplicedPrompt:
    is_image = prompt.image >= 0
    stays = ~is_image
    kinds = torch.where(is_image.cumsum(0) > 0, TokenType.TEXT, TokenType.SYSTEM).to(torch.int8)
    row_id = torch.full_like(prompt.image, -1)
    num_rows = 0
    for index, visual in enumerate(visuals):
        layout, here = visual.layout, prompt.image == index
        stays[here] = visual.stays
        kinds[here] = torch.where(layout.is_newline, TokenType.NEWLINE, TokenType.VISUAL).to(kinds)
        row_id[here] = torch.where(layout.row_id < 0, -1, layout.row_id + num_rows)
        num_rows += visual.stats.num_newlines
    columns, of_image = prompt.source[stays], prompt.image[stays]
    text = prompt.embeds[columns[of_image < 0].to(prompt.embeds.device)]
    remaining = {-1: text, **{index: visual.embeds for index, visual in enumerate(visuals)}}
    pieces = [text[:0]]
    runs, lengths = of_image.unique_consecutive(return_counts=True)
    for index, length in zip(runs.tolist(), lengths.tolist(), strict=True):
        pieces.append(remaining[index][:length].to(text))
        remaining[index] = remaining[index][length:]
    labels = prompt.labels
    if labels is not None:
        labels = labels[columns.to(labels.device)]
        labels = labels.masked_fill((of_image >= 0).to(labels.device), IGNORE_INDEX)
    end = int(is_image.nonzero()[-1]) + 1 if visuals else 0
    return SplicedPrompt(
        columns=columns,
        ids=prompt.ids[columns],
        embeds=torch.cat(pieces),  # each token is copied once
        kinds=kinds[stays],
        row_id=row_id[stays],
        labels=labels,
        visuals=tuple(visuals),
        prefix_len=int(stays[:end].sum()),
        whole_length=len(stays),
    )


def padded(rows: Sequence[Tensor], value: float, side: str = "left") -> Tensor:
    """Return rows of different lengths as one tensor, filled up on one side."""
    if len(rows) == 1:
        return rows[0][None]  # nothing to fill up, nothing to copy
    return pad_sequence(list(rows), True, value, padding_side=side)


def pad_prompts(
    prompts: Sequence[SplicedPrompt], side: str = "left", by_part: bool = False
) -> tuple[Tensor, Spans, Tensor | None]:
    """Return (B, M) prompts as (B, M, D) embeddings, their spans, and (B, M) labels if any.

    Args:
        prompts: B of them.
        side: where the padding goes.
        by_part: pad the positions up to the last visual token and those after it on their own, so
            that either part begins and ends at the same position in all prompts.
    """

    def pad(rows: Sequence[Tensor], value: float) -> Tensor:
        if not by_part:
            return padded(rows, value, side)
        cut = [row.tensor_split([p.prefix_len]) for row, p in zip(rows, prompts, strict=True)]
        parts = zip(*cut, strict=True)
        return torch.cat([padded(part, value, side) for part in parts], dim=1)

    embeds = pad([prompt.embeds for prompt in prompts], 0.0)
    labels = [prompt.labels for prompt in prompts if prompt.labels is not None]
    spans = Spans(
        pad([prompt.kinds for prompt in prompts], TokenType.PADDING).to(embeds.device),
        pad([prompt.row_id for prompt in prompts], -1).to(embeds.device),
        tuple(tuple(len(each.stats.keep_idx) for each in prompt.visuals) for prompt in prompts),
    )
    return embeds, spans, pad(labels, IGNORE_INDEX) if labels else None


def kept_positions(position_ids: Tensor, prompts: Sequence[SplicedPrompt]) -> Tensor:
    """Return (4, B, M): plain positions, then those in time, height and width of the kept tokens.

    Args:
        position_ids: (3 or 4, B, T) of the whole prompts.
        prompts: B of them.
    """
    spatial = position_ids[-3:]
    kept = [spatial[:, row, prompt.columns].T for row, prompt in enumerate(prompts)]
    plain = [torch.arange(len(rows), device=rows.device) for rows in kept]
    return torch.cat([padded(plain, 0)[None], padded(kept, 0).permute(2, 0, 1)])


def kept_deep_features(
    features: Sequence[Tensor], visual: Tensor, prompts: Sequence[SplicedPrompt]
) -> list[Tensor]:
    """Return what is added after the first decoder layers, for the kept tokens of all prompts.

    Args:
        features: (visual tokens of the batch, D) for each of these layers.
        visual: (B, T) bool, the tokens it is added to.
        prompts: B of them.
    """
    stays = torch.zeros_like(visual)
    for row, prompt in zip(stays, prompts, strict=True):
        row[prompt.columns] = True
    kept = stays[visual]
    return [each[kept.to(each.device)] for each in features]
