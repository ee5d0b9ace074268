"""The contract of a pruning method: a frozen dataclass with at most two hooks.

Symbols: N tokens now present, D width, H query heads, G key heads, E head width, R rows.

``select`` sees the visual tokens of one image before the decoder; ``at_layer`` sees one sample
between two decoder layers during prefill. A method overrides the hooks it uses and declares what it
``needs``; nothing else is computed for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llava_todre.errors import TodreError
from llava_todre.relevance import attention_mass, attention_rows
from llava_todre.spans import Kind, VisualTokens

NEEDS = frozenset({"cls_attention", "text_embeds"})
"""What the model can compute for :meth:`Pruner.select` on request."""


@dataclass(frozen=True)
class Selection:
    """What Stage 1 keeps of one image or video."""

    keep_idx: Tensor
    """(K,) int64, ascending, into the visual tokens."""
    features: Tensor | None = None
    """(K, D) features to use instead of the kept tokens' own, for methods that merge; None keeps
    them as they are."""


@dataclass(frozen=True)
class LayerView:
    """One sample between decoder layers ``layer`` and ``layer + 1`` of a prefill, unpadded."""

    layer: int
    """The layer that has just run, 0-based."""
    num_layers: int
    kinds: Tensor
    """(N,) int8 of :class:`~llava_todre.spans.Kind`, one per token still present."""
    hidden_states: Callable[[], Tensor]
    """() -> (N, D) output of ``layer``."""
    queries: Callable[[Tensor], Tensor]
    """(R,) positions -> (H, R, E) rotated queries of ``layer``."""
    keys: Callable[[], Tensor]
    """() -> (G, N, E) rotated keys of ``layer``."""
    scaling: float
    measured: dict[str, float] = field(default_factory=dict)
    """Numbers worth reporting; ``attention_ratios`` leaves its two here."""

    def attention(self, rows: Tensor) -> Tensor:
        """Return the attention of ``rows`` (R,) in ``layer``: (H, R, N) float32."""
        return attention_rows(self.queries(rows), self.keys(), rows, self.scaling)

    def attention_ratios(self, text: Tensor) -> tuple[float, float]:
        """Return (text to visual, visual to text) attention shares of ``layer``, ToDRE Eq. 7.

        The second is exactly 0 unless some text of the set precedes some visual token, because
        attention is causal.

        Args:
            text: (N,) bool, the set T.
        """
        visual = self.kinds == Kind.VISUAL
        text_rows, visual_rows = text.nonzero()[:, 0], visual.nonzero()[:, 0]
        to_visual = attention_mass(
            self.queries(text_rows), self.keys(), text_rows, visual, self.scaling
        )
        to_text = 0.0
        if len(text_rows) and len(visual_rows) and int(text_rows[0]) < int(visual_rows[-1]):
            to_text = attention_mass(
                self.queries(visual_rows), self.keys(), visual_rows, text, self.scaling
            )
        self.measured.update(text_to_visual=to_visual, visual_to_text=to_text)
        return to_visual, to_text


@dataclass(frozen=True, kw_only=True)
class Pruner:
    """Base of all methods; its fields are the budget, which every method shares."""

    retain_ratio: float = 0.10
    """Share of the patch tokens kept per image or video, in (0, 1]; newline tokens are not counted.
    """
    retain_tokens: int | None = None
    """Number of patch tokens kept per image or video, at least 1; replaces ``retain_ratio`` when
    given."""

    needs = frozenset[str]()
    cls_layer = -1
    """Vision layer whose [CLS] attention is meant by ``needs = {"cls_attention"}``; -1 is the last.
    """

    def __post_init__(self) -> None:
        """Check the ranges of the knobs."""
        require("retain_ratio", self.retain_ratio, 0.0, 1.0, low_included=False)
        tokens = self.retain_tokens
        if tokens is not None and (type(tokens) is not int or tokens < 1):
            raise TodreError(f"retain_tokens {tokens!r} is out of range; allowed: 1, 2, ...")

    def budget(self, num_tokens: int) -> int:
        """Return how many of ``num_tokens`` patch tokens to keep; half rounds up, at least one."""
        wanted = self.retain_tokens or math.floor(self.retain_ratio * num_tokens + 0.5)
        return min(num_tokens, max(1, wanted))

    def select(self, tokens: VisualTokens, budget: int) -> Selection:
        """Choose ``budget`` of the tokens of one image or video; asked only to drop some."""
        raise NotImplementedError(
            f"{type(self).__name__} does not select tokens before the decoder."
        )

    def probe_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return the decoder layers after which :meth:`at_layer` is asked; () means never."""
        del num_layers
        return ()

    def at_layer(self, view: LayerView) -> Tensor | None:
        """Return (N,) bool, which tokens the next layers keep, or None to keep all."""
        del view
        return None


def require(key: str, value: Any, low: float, high: float, low_included: bool = True) -> None:
    """Raise a TodreError unless ``value`` is a number from ``low`` to ``high``."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number and (low < value <= high or (low_included and value == low))):
        sign = "<=" if low_included else "<"
        raise TodreError(
            f"{key} {value!r} is out of range; allowed: a number, {low:g} {sign} {key} <= {high:g}."
        )


def require_int(key: str, value: Any) -> None:
    """Raise a TodreError unless ``value`` is a whole number."""
    if type(value) is not int:
        raise TodreError(f"{key} {value!r} is not a whole number; allowed: e.g. 0.")


def layers_at(depths: tuple[float, ...], num_layers: int) -> tuple[int, ...]:
    """Return the 0-based layers ``floor(depth * num_layers)``, the last one at most."""
    return tuple(sorted({min(num_layers - 1, math.floor(depth * num_layers)) for depth in depths}))


def random_generator(seed: int, device: torch.device) -> torch.Generator:
    """Return a generator seeded with ``seed``."""
    return torch.Generator(device=device).manual_seed(seed)
