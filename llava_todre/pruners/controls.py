"""Controls: no pruning, and the random choice that every selection rule has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava_todre.errors import TodreError
from llava_todre.pruners.base import About, Pruner, option
from llava_todre.spans import VisualTokens


@dataclass(frozen=True, kw_only=True)
class Vanilla(Pruner):
    """Keep every visual token in every layer: the row every other method is compared with."""

    about: ClassVar[About] = About(paper="no pruning", budget_note="none: every token stays")

    retain_ratio: float = option(1.0, "Fixed: every token stays.", low=1, high=1)

    def __post_init__(self) -> None:
        """Refuse a budget, which would silently be ignored."""
        if self.retain_ratio != 1.0 or self.retain_tokens is not None:
            given = self.retain_ratio if self.retain_tokens is None else self.retain_tokens
            raise TodreError(f"vanilla keeps every token: expected no budget, got {given!r}.")
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class Random(Pruner):
    """Keep a uniformly random subset, the same for equal ``seed`` and equal number of tokens."""

    about: ClassVar[About] = About(
        paper="control", budget_note="k = share of the patch tokens of an image"
    )

    seed: int = option(0, "Vary it to draw again; report several draws.")

    def select(self, tokens: VisualTokens, num_keep: int) -> Tensor:
        """Draw ``num_keep`` tokens without replacement, on the CPU: equal on every device."""
        draw = torch.Generator().manual_seed(self.seed)
        return torch.randperm(len(tokens), generator=draw)[:num_keep]
