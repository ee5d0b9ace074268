"""FastV (arXiv 2403.06764): early in the decoder, drop what the last token hardly attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llava_todre.pruners.base import About, LayerView, top
from llava_todre.pruners.staged import OneStagePruner


@dataclass(frozen=True, kw_only=True)
class FastV(OneStagePruner):
    """Prune once, by the attention that the last prompt token pays in the layer before."""

    about: ClassVar[About] = About(
        paper="FastV, ECCV 2024, arXiv 2403.06764",
        budget_note="share of the patch tokens that layer K and all later ones work on (1 - R of "
        "the paper)",
        deviations=(
            "Scores come from the last prompt token, as in the released code; the paper's text "
            "speaks of the attention received on average.",
            "Tokens are chosen once per prompt. Without a KV cache the released code chooses "
            "again for every generated token, and the paper's numbers were made that way.",
            "The released code expects one image of 576 tokens at a fixed place.",
        ),
    )

    def choose(self, view: LayerView, count: int) -> Tensor:
        """Return the patch tokens with the highest attention, mean over heads."""
        scores = view.attention().mean(dim=0)[0, view.patches]
        return view.patches[top(scores, count)]
