"""Control: keep an even grid of tokens, whatever they show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava_todre.pruners.base import About, Pruner
from llava_todre.pruners.grid import cut
from llava_todre.spans import VisualTokens


@dataclass(frozen=True, kw_only=True)
class Uniform(Pruner):
    """Cut each view, or frame, into as many rectangles as it may keep tokens; keep the middle ones.

    Where a rectangle has no middle token, the upper left one of those around its centre stays.
    """

    about: ClassVar[About] = About(
        paper="control",
        budget_note="k tokens of the image, shared among its views in proportion to their size",
    )

    def select(self, tokens: VisualTokens, num_keep: int) -> Tensor:
        """Keep the token nearest to the centre of each cell."""
        kept = [middle for _, _, middle in cut(tokens, num_keep)]
        return torch.cat(kept)
