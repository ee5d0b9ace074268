"""Where each token comes from: visual tokens in their image, and every position in its prompt.

Symbols: B batch, L prompt length, N patch tokens of one image or video, D width of the decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from torch import Tensor


@dataclass(frozen=True)
class VisualTokens:
    """The patch tokens of one image or video, in the order in which the decoder would read them.

    ``image_newline`` tokens are not among them: they carry no content and follow the patch tokens
    of their row.
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
    cls_attention: Tensor | None = None
    """(N,) attention of the [CLS] token to each patch, softmax within a view, mean over heads; when
    needed."""
    text_embeds: Tensor | None = None
    """(T, D) embeddings of the text that follows the image; when needed."""

    def __len__(self) -> int:
        return len(self.features)


class Kind(IntEnum):
    """What a position of a prompt holds."""

    PADDING = -1
    SYSTEM = 0
    """Text before the first visual token."""
    VISUAL = 1
    """Patch and newline tokens."""
    TEXT = 2
    """Text after the first visual token: the set T of ToDRE Eq. 7."""


@dataclass(frozen=True)
class Spans:
    """The kind of every position of a batch of prompts, built where the tokens are spliced."""

    kinds: Tensor
    """(B, L) int8 of :class:`Kind`."""

    @property
    def valid(self) -> Tensor:
        """(B, L) bool: not padding."""
        return self.kinds != Kind.PADDING
