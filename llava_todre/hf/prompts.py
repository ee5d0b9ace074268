"""Stage 1 on the prompts of a batch: where their images stand, and what is left behind it.

Embeddings and what the tower measured stay where they are; all bookkeeping is on the CPU.

Symbols: B batch, L prompt length, M prompt length after pruning, S tokens of one image in the
    prompt, N patch tokens among them, D decoder width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava_todre.errors import TodreError
from llava_todre.hf.capture import DecoderInputs
from llava_todre.hf.family import STATES, Layouts
from llava_todre.pruners import Pruner
from llava_todre.spans import Spans, TokenType, VisualTokens
from llava_todre.stage1.layout import Layout
from llava_todre.stats import ImageStats, PruneStats

_NOTHING = Layout.of_slots(torch.empty(0, dtype=torch.int64), 0, 1)


@dataclass(frozen=True)
class Visual:
    """One image or video in the prompt of one sample."""

    layout: Layout
    columns: Tensor
    """(S,) where its tokens stand in the sample's prompt."""
    patches: slice
    """Its part of what was measured in the tower."""


@dataclass(frozen=True)
class Prompt:
    """One sample after Stage 1."""

    columns: Tensor
    """(M,) kept positions of the original prompt."""
    embeds: Tensor
    """(M, D)."""
    kinds: Tensor
    """(M,) int8 of :class:`~llava_todre.spans.TokenType`."""
    row_id: Tensor
    """(M,) see :class:`~llava_todre.spans.Spans`."""
    images: tuple[ImageStats, ...]


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
                found.append(Visual(layout, columns[: len(layout)], patches))
                columns = columns[len(layout) :]
        visuals.append(sorted(found, key=lambda visual: int(visual.columns[0])))
    return visuals


def prune_prompt(
    pruner: Pruner,
    captured: DecoderInputs,
    row: int,
    real: Tensor,
    visuals: Sequence[Visual],
    project: Callable[[Tensor], Tensor],
) -> Prompt:
    """Let a method select from every image of a sample.

    Args:
        pruner: the method.
        captured: the batch as the decoder would have read it.
        row: number of the sample in it.
        real: (L,) bool, False for padding.
        visuals: the images and videos of the sample.
        project: the projector, for methods that need features before it.
    """
    embeds, real = captured.embeds[row], real.cpu()
    stays = real.clone()
    kinds = torch.full_like(real, TokenType.SYSTEM, dtype=torch.int8)
    line = torch.full_like(real, -1, dtype=torch.int64)
    images, num_lines = [], 0
    is_visual = torch.zeros_like(stays)
    for visual in visuals:
        is_visual[visual.columns] = True
    if visuals:
        kinds[int(visuals[0].columns[0]) :] = TokenType.TEXT
    is_text = (kinds == TokenType.TEXT) & ~is_visual & real
    text = embeds[is_text] if "text_embeds" in pruner.needs else None
    for visual in visuals:
        layout, columns = visual.layout, visual.columns
        tokens = _tokens(visual, embeds, text, captured, project)
        (selection,) = pruner.keep([tokens])
        kept = selection.indices
        if selection.features is not None:
            embeds = embeds.clone()
            places = columns[~layout.is_newline][kept]
            embeds[places] = selection.features.to(embeds)
        stays[columns] = layout.keep(kept)
        kinds[columns] = torch.where(layout.is_newline, TokenType.NEWLINE, TokenType.VISUAL).to(
            kinds
        )
        line[columns] = torch.where(layout.row_id < 0, -1, layout.row_id + num_lines)
        images.append(_image_stats(layout, kept))
        num_lines += images[-1].num_newlines
    columns = stays.nonzero()[:, 0]
    return Prompt(columns, embeds[columns], kinds[columns], line[columns], tuple(images))


def _tokens(
    visual: Visual,
    embeds: Tensor,
    text: Tensor | None,
    captured: DecoderInputs,
    project: Callable[[Tensor], Tensor],
) -> VisualTokens:
    """Return what a method selects from."""
    layout, device = visual.layout, embeds.device

    def of_tokens(measured: Tensor) -> Tensor:  # mean over the patches under a token
        patches = measured[visual.patches][layout.sources.to(measured.device)]  # (N, C, ...)
        if layout.weights is None:
            return patches.mean(dim=1)
        weights = layout.weights.to(patches)
        return torch.einsum("nc,nc...->n...", weights, patches)

    measured = dict(captured.measured)
    given: dict[str, Any] = {}
    for need in [need for need in measured if need[0] == STATES]:
        states = measured.pop(need)  # (views of all images, 1 + P, W)
        num_patches = states.shape[1] - 1
        views = slice(visual.patches.start // num_patches, visual.patches.stop // num_patches)
        given = {
            "vision_features": of_tokens(states[:, 1:].flatten(0, 1)).to(device),
            "cls_features": states[views, 0].to(device),
            "project": project,
        }
    return VisualTokens(
        features=embeds[visual.columns[~layout.is_newline]],
        view=layout.view.to(device),
        row=layout.row.to(device),
        column=layout.column.to(device),
        is_video=layout.is_video,
        grid=layout.grid,
        vision={need: of_tokens(value).to(device) for need, value in measured.items()},
        text_embeds=text,
        **given,
    )


def untouched(
    real: Tensor, visuals: Sequence[Sequence[Visual]], layers: int
) -> tuple[PruneStats, ...]:
    """Return the statistics of a call in which nothing is dropped.

    Args:
        real: (B, L) bool, False for padding.
        visuals: the images and videos of each sample.
        layers: how many the decoder has.
    """
    found = []
    for of_sample, length in zip(visuals, real.sum(dim=1).tolist(), strict=True):
        every = [torch.arange(len(visual.layout.view)) for visual in of_sample]
        images = tuple(
            _image_stats(visual.layout, kept) for visual, kept in zip(of_sample, every, strict=True)
        )
        shown = sum(len(visual.columns) for visual in of_sample)
        newlines = sum(image.num_newlines for image in images)
        found.append(PruneStats(images, newlines, (), (length,) * layers, (shown,) * layers))
    return tuple(found)


def _image_stats(layout: Layout, kept: Tensor) -> ImageStats:
    patches = layout.view * layout.side**2 + layout.row * layout.side + layout.column
    return ImageStats(patches, layout.side, kept, int(layout.is_newline.sum()))


def left_padded(
    prompts: Sequence[Prompt], ids: Tensor, pad_id: int
) -> tuple[dict[str, Tensor], Spans]:
    """Return arguments of ``generate`` for the pruned batch, and what its positions hold.

    Args:
        prompts: B of them.
        ids: (B, L) of the whole prompts.
        pad_id: id of what fills the shorter ones up.
    """
    kept = [row[prompt.columns] for row, prompt in zip(ids, prompts, strict=True)]
    embeds = _padded([prompt.embeds for prompt in prompts], 0.0)
    spans = Spans(
        _padded([prompt.kinds for prompt in prompts], TokenType.PADDING).to(embeds.device),
        _padded([prompt.row_id for prompt in prompts], -1).to(embeds.device),
        tuple(tuple(len(image.keep_idx) for image in prompt.images) for prompt in prompts),
    )
    arguments = {
        "input_ids": _padded(kept, pad_id),
        "inputs_embeds": embeds,
        "attention_mask": spans.valid.long().to(ids.device),
    }
    return arguments, spans


def kept_positions(position_ids: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Return (4, B, M): plain positions, then those in time, height and width of the kept tokens.

    Args:
        position_ids: (3 or 4, B, L) of the whole prompts.
        prompts: B of them.
    """
    spatial = position_ids[-3:]
    kept = [spatial[:, row, prompt.columns].T for row, prompt in enumerate(prompts)]
    plain = [torch.arange(len(rows), device=rows.device) for rows in kept]
    return torch.cat([_padded(plain, 0)[None], _padded(kept, 0).permute(2, 0, 1)])


def kept_deep_features(captured: DecoderInputs, prompts: Sequence[Prompt]) -> list[Tensor]:
    """Return what is added behind the first decoder layers, for the kept tokens of all samples."""
    assert captured.deepstack is not None and captured.deepstack_at is not None
    stays = torch.zeros_like(captured.deepstack_at)
    for row, prompt in zip(stays, prompts, strict=True):
        row[prompt.columns] = True
    kept = stays[captured.deepstack_at]
    return [features[kept.to(features.device)] for features in captured.deepstack]


def _padded(rows: list[Tensor], value: float) -> Tensor:
    """Return rows of different lengths as one tensor, filled up on the left."""
    return pad_sequence(rows, True, value, padding_side="left")
