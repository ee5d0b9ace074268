"""What decoder layers are called with, and which tokens of the prompt they hold.

Symbols: B batch, M prompt length in a layer, N tokens of one sample in it, Q query length of one
forward call, D width, G key heads, E head width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

Context = tuple[Tensor | None, tuple[Tensor, Tensor], Tensor | None]
"""Mask, RoPE tables and position ids, as in :class:`LayerInputs`."""


class KeyStore(Protocol):
    """What Stage 2 reads and changes in a KV cache: the part of ``PrunedCache`` it needs."""

    @property
    def num_seen(self) -> int:
        """Tokens that layer 0 holds."""

    def keys(self, layer: int, sample: int) -> Tensor:
        """Return the (G, M, E) keys that a layer holds of one sample."""

    def keep(self, layer: int, index: Tensor) -> None:
        """Keep the keys and values of one layer at ``index`` (B, N), in that order."""


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
    positions: Tensor
    """(B, M) int64 position of each token in layer 0's prompt, ascending and right-aligned."""
    valid: Tensor
    """(B, M) bool; False marks padding and filler."""
    kinds: Tensor
    """(B, M) int8 of :class:`~llava_todre.spans.TokenType`."""
    gather_idx: Tensor | None = None
    """(B, M) where each token stands in the segment before."""
    merged_hidden: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Sample -> (N,) indices into the segment before, and the (N, D) hidden states put there first.
    """
    prompt_context: Context | None = None
    """Of the prompt."""
    decode_mask: Tensor | None = None

    def __post_init__(self) -> None:
        """Read the validity once: every later read would synchronise with the device."""
        self.ragged = not bool(self.valid.all())

    def present(self, sample: int) -> Tensor:
        """Return (N,) which of its M places hold a token of one sample."""
        if not self.ragged:
            return torch.arange(self.valid.shape[1], device=self.valid.device)
        return self.valid[sample].nonzero()[:, 0]
