"""Attention of a decoder, layer by layer, seen by a method that looks and drops nothing.

Symbols: H heads, R rows, N tokens, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llava_todre.pruners import LayerView
from llava_todre.pruners.base import Pruner
from llava_todre.spans import TokenType


@dataclass(frozen=True, kw_only=True)
class Observer(Pruner):
    """Shows every layer of a prefill to a function."""

    retain_ratio: float = 1.0
    look: Callable[[LayerView], None] = field(compare=False)

    def probe_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return all layers."""
        return tuple(range(num_layers))

    def at_layer(self, view: LayerView) -> None:
        """Look, and keep everything."""
        self.look(view)


def ratios(view: LayerView) -> dict[str, tuple[float, float]]:
    """Return (text to visual, visual to text) of ToDRE Eq. 8, for both readings of its set T.

    ``after_image`` is the text behind the first visual token, ``all`` every token that is not
    visual, the system prompt included.
    """
    return {
        "after_image": view.attention_ratios(view.kinds == TokenType.TEXT),
        "all": view.attention_ratios(~view.visual),
    }


def received(view: LayerView, num_generated: int) -> dict[str, float]:
    """Return how the attention of the last ``num_generated`` tokens is shared out by kind.

    Returns:
        Shares of the system prompt, the visual tokens, the question and the generated tokens
        (itself included); mean over heads and rows; they sum to one.
    """
    total = len(view.kinds)
    rows = torch.arange(total - num_generated, total, device=view.kinds.device)
    mass = view.attention(rows).mean(dim=(0, 1))  # (N,)
    is_generated = torch.zeros(total, dtype=torch.bool, device=view.kinds.device)
    is_generated[rows] = True
    kinds: dict[str, Tensor] = {
        "system": view.kinds == TokenType.SYSTEM,
        "visual": view.visual,
        "question": (view.kinds == TokenType.TEXT) & ~is_generated,
        "generated": is_generated,
    }
    return {name: float(mass[chosen].sum()) for name, chosen in kinds.items()}
