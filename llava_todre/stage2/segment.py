"""What decoder layers are called with, and which tokens of the prompt they hold.

Symbols: B batch, M prompt length in a layer, Q query length of one forward call, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerInputs:
    """What a decoder layer is called with."""

    hidden_states: Tensor
    """(B, Q, D)."""
    attention_mask: Tensor | None
    """None, (B, keys) for FlashAttention, or (B or 1, 1, Q, keys) bool or additive."""
    position_embeddings: tuple[Tensor, Tensor]
    """Cosines and sines of RoPE, (B or 1, Q, head width) each."""
    position_ids: Tensor | None
    """(B or 1, Q)."""


@dataclass
class Segment:
    """The prompt as the layers from ``start`` on hold it, until the next segment starts."""

    start: int
    columns: Tensor
    """(B, M) int64 position of each token in layer 0's prompt, ascending and right-aligned."""
    valid: Tensor
    """(B, M) bool; False marks padding and filler."""
    kinds: Tensor
    """(B, M) int8 of :class:`~llava_todre.spans.TokenType`."""
    step: Tensor | None = None
    """(B, M) how this segment is gathered from the one before."""
    merged: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """By sample: (N,) columns of the segment before and the (N, D) hidden states put there first.
    """
    prompt_context: tuple[Tensor | None, tuple[Tensor, Tensor], Tensor | None] | None = None
    """Mask, RoPE tables and position ids of the prompt, as in :class:`LayerInputs`."""
    decode_mask: Tensor | None = None

    def __post_init__(self) -> None:
        """LayerProbe at the validity once: every later look would synchronise with the device."""
        self.ragged = not bool(self.valid.all())

    def present(self, sample: int) -> Tensor:
        """Return (N,) the columns of one sample that hold a token."""
        if not self.ragged:
            return torch.arange(self.valid.shape[1], device=self.valid.device)
        return self.valid[sample].nonzero()[:, 0]
