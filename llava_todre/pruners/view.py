"""What a method sees of one sample between two decoder layers.

Symbols: N tokens now present, L tokens of the whole prompt, D width, H query heads, G key heads, E
    head width, R rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from llava_todre.relevance import attention_mass, attention_rows
from llava_todre.spans import TokenType, is_visual


@dataclass
class Tally:
    """FLOPs of matrix products, added up as they are made."""

    flops: int = 0

    def product(self, *sizes: int) -> None:
        """Add a product: of (a, b) and (b, c) matrices, ``product(a, b, c)``."""
        self.flops += 2 * math.prod(sizes)


@dataclass(frozen=True)
class PromptView:
    """The prompt of the sample as layer 0 read it."""

    kinds: Tensor
    """(L,) int8 of :class:`~llava_todre.spans.TokenType`."""
    positions: Tensor
    """(N,) int64 where each token that is now present stood."""
    embeds: Callable[[], Tensor]
    """() -> (L, D) what layer 0 read."""


@dataclass(frozen=True)
class DecoderView:
    """What a method may use of the decoder itself."""

    next_layer_attention: Callable[[Tensor], Tensor]
    """(R,) positions -> (H, R, N) attention of these rows in the next layer, before it has run."""
    rope_frequencies: Tensor
    """(E / 2,) radians per position of each pair of the rotary embedding."""
    final_norm: Callable[[Tensor], Tensor]
    """(R, D) -> (R, D) the norm after the last layer."""


@dataclass(frozen=True)
class LayerView:
    """One sample between decoder layers ``layer`` and ``layer + 1`` of a prefill, unpadded."""

    layer: int
    """The layer that has just run, 0-based."""
    num_layers: int
    kinds: Tensor
    """(N,) int8 of :class:`~llava_todre.spans.TokenType`, one per token still present."""
    hidden_states: Callable[[], Tensor]
    """() -> (N, D) output of ``layer``."""
    queries: Callable[[Tensor], Tensor]
    """(R,) positions -> (H, R, E) rotated queries of ``layer``."""
    keys: Callable[[], Tensor]
    """() -> (G, N, E) rotated keys of ``layer``."""
    scaling: float
    visual_counts: tuple[int, ...]
    """Patch tokens of each image or video that layer 0 read."""
    prompt: PromptView
    decoder: DecoderView
    measured: dict[str, float] = field(default_factory=dict)
    """Numbers worth reporting; ``attention_ratios`` leaves its two here."""

    @cached_property
    def tally(self) -> Tally:
        """Work done for the method: attention counts itself, a method its own products."""
        return Tally()

    @cached_property
    def visual(self) -> Tensor:
        """(N,) bool, patch and newline tokens."""
        return is_visual(self.kinds)

    @property
    def patches(self) -> Tensor:
        """Positions of the patch tokens, ascending."""
        return (self.kinds == TokenType.VISUAL).nonzero()[:, 0]

    @property
    def last_row(self) -> Tensor:
        """(1,) the position of the last token."""
        return torch.tensor([len(self.kinds) - 1], device=self.kinds.device)

    def attention(self, rows: Tensor | None = None) -> Tensor:
        """Return the attention of ``rows`` (R,) in ``layer``: (H, R, N) float32.

        Without ``rows`` it is that of the last token.
        """
        rows = self.last_row if rows is None else rows
        return attention_rows(*self._to_multiply(rows), rows, self.scaling)

    def _to_multiply(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the queries of ``rows`` and all keys; their product is counted."""
        queries, keys = self.queries(rows), self.keys()
        self.tally.product(*queries.shape, keys.shape[1])
        return queries, keys

    def attention_ratios(self, text: Tensor) -> tuple[float, float]:
        """Return (text to visual, visual to text) attention shares of ``layer``, ToDRE Eq. 8.

        The second is exactly 0 unless some text of the set precedes some visual token, because
        attention is causal.

        Args:
            text: (N,) bool, the set T.
        """
        visual = self.visual
        # Positions are compared on the host: one wait for the device, not four.
        sets = torch.stack([text, visual]).cpu()
        text_rows, visual_rows = (each.nonzero()[:, 0] for each in sets)

        def share(rows: Tensor, columns: Tensor) -> float:
            rows = rows.to(columns.device)
            return attention_mass(*self._to_multiply(rows), rows, columns, self.scaling)

        to_visual, to_text = share(text_rows, visual), 0.0
        if len(text_rows) and len(visual_rows) and int(text_rows[0]) < int(visual_rows[-1]):
            to_text = share(visual_rows, text)
        self.measured.update(text_to_visual=to_visual, visual_to_text=to_text)
        return to_visual, to_text
