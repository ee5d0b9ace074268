"""Where each token comes from: visual tokens in their image, and every position in its prompt.

Symbols: B batch, L prompt length, V views of one image, N patch tokens of one image or video, D
    width of the decoder, W width of the vision tower.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Literal

import torch
from torch import Tensor

from llava_todre.errors import TodreError

NewlineRule = Literal["row", "all", "none"]
"""Which newline tokens stay once patch tokens are dropped; see :func:`with_newlines`."""


@dataclass(frozen=True)
class VisualTokens:
    """The patch tokens of one image or video, in the order in which the decoder would read them.

    ``image_newline`` tokens are not among them: they carry no content and follow the patch tokens
    of their row. What a method must name in ``Pruner.needs`` is None or absent otherwise; a method
    reads it as ``tokens["text_embeds"]`` or ``tokens["cls_attention", -2]``.
    """

    features: Tensor
    """(N, D) after the projector, in the embedding space of the decoder."""
    view: Tensor
    """(N,) int64: 0 is the thumbnail (or the only view), 1... the crops in raster order; for a
    video, the frame."""
    row: Tensor
    """(N,) int64 row of the patch in its view."""
    column: Tensor
    """(N,) int64 column of the patch in its view."""
    is_video: bool = False
    grid: tuple[int, int] | None = None
    """(columns, rows) of the crops of an AnyRes image; None without crops."""
    vision: Mapping[tuple[str, int | float], Tensor] = field(default_factory=dict)
    """(N, ...) what a layer of the vision tower computed, by (quantity, layer); the quantities are
    those of :data:`llava_todre.pruners.base.VISION_NEEDS`."""
    vision_features: Tensor | None = None
    """(N, W) before the projector; needs ``"vision_features"``."""
    cls_features: Tensor | None = None
    """(V, W) the [CLS] token of each view before the projector; needs ``"vision_features"``."""
    project: Callable[[Tensor], Tensor] | None = None
    """(K, W) -> (K, D) the projector; needs ``"vision_features"``."""
    resized: Callable[[int, int], Tensor] | None = None
    """(rows, columns) -> (V, rows * columns, D) features of all views after shrinking their pixels
    to that many patches; needs ``"resized"``."""
    text_embeds: Tensor | None = None
    """(T, D) embeddings of the text that follows the image; needs ``"text_embeds"``."""
    clip_similarity: Tensor | None = None
    """(N, M) cosine of each patch with each chunk of the question in CLIP's own space; needs
    ``"clip_similarity"``."""

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, need: str | tuple[str, int | float]) -> Any:
        """Return what a method needs.

        Raises:
            TodreError: the method does not have it among its ``needs``.
        """
        found = self.vision.get(need) if isinstance(need, tuple) else getattr(self, need, None)
        if found is None:
            given_with = {"cls_features": "vision_features", "project": "vision_features"}
            name = given_with.get(need, need) if isinstance(need, str) else need
            raise TodreError(f"{need!r} was not computed; add {name!r} to the needs of the method.")
        return found


class TokenType(IntEnum):
    """What a position of a prompt holds."""

    PADDING = -1
    SYSTEM = 0
    """Text before the first visual token."""
    VISUAL = 1
    """Patch tokens."""
    TEXT = 2
    """Text after the first visual token: the set T of ToDRE Eq. 8."""
    NEWLINE = 3
    """``image_newline`` tokens: visual, but without content."""


def is_visual(kinds: Tensor) -> Tensor:
    """Return where ``kinds`` is a patch or a newline token."""
    return (kinds == TokenType.VISUAL) | (kinds == TokenType.NEWLINE)


def with_newlines(
    keep: Tensor, is_patch: Tensor, is_newline: Tensor, row_id: Tensor, rule: NewlineRule
) -> Tensor:
    """Return (N,) bool: a decision about patch tokens, with newline tokens following it.

    While no patch token is dropped, every newline stays, even of rows that unpadding left empty.
    After that: ``row``: a newline stays while its row keeps a patch token; ``all``: every newline
    stays while any patch token does; ``none``: no newline stays.

    Args:
        keep: (N,) bool, the decision; not read at newline tokens.
        is_patch: (N,) bool.
        is_newline: (N,) bool.
        row_id: (N,) int64, equal for a newline and the patch tokens of its row.
        rule: which newlines stay.
    """
    kept = keep & is_patch
    stays = (kept == is_patch).all()
    if rule == "row":
        stays = stays | torch.isin(row_id, row_id[kept])
    elif rule == "all":
        stays = stays | kept.any()
    return torch.where(is_newline, stays, keep)


@dataclass(frozen=True)
class Spans:
    """What every position of a batch of prompts holds, built where the tokens are spliced."""

    kinds: Tensor
    """(B, L) int8 of :class:`TokenType`."""
    row_id: Tensor
    """(B, L) int64: a newline token and the patch tokens of its row share a number; -1 elsewhere.
    """
    patches: tuple[tuple[int, ...], ...]
    """Patch tokens of each image or video of each sample."""

    @classmethod
    def without_newlines(cls, kinds: Tensor) -> Spans:
        """Return the spans of prompts with one image each and no newline tokens."""
        counts = (kinds == TokenType.VISUAL).sum(dim=1).tolist()
        return cls(
            kinds, torch.full_like(kinds, -1, dtype=torch.int64), tuple((n,) for n in counts)
        )

    @property
    def valid(self) -> Tensor:
        """(B, L) bool: not padding."""
        return self.kinds != TokenType.PADDING
