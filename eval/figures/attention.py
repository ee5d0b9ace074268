"""Attention of a decoder, layer by layer: what :class:`~llava_todre.pruners.Observed` looks at.

Symbols: H heads, R rows, N tokens, L layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava_todre.pruners import LayerView
from llava_todre.spans import TokenType


def ratios(view: LayerView) -> dict[str, tuple[float, float]]:
    """Return (text to visual, visual to text) of ToDRE Eq. 8, for both readings of its set T.

    ``after_image`` is the text after the first visual token, ``all`` every token that is not
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
