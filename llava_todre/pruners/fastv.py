"""FastV (arXiv 2403.06764): early in the decoder, drop what the last token hardly looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llava_todre.pruners.base import About, LayerView, option, require_layer, top
from llava_todre.pruners.staged import StagedPruner


@dataclass(frozen=True, kw_only=True)
class FastV(StagedPruner):
    """Prune once, by the attention that the last prompt token pays in the layer before."""

    about: ClassVar[About] = About(
        paper="FastV, ECCV 2024, arXiv 2403.06764",
        reads_text=True,
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

    layer: int = option(2, "K: the first layer, counted from 0, that works on fewer tokens.", low=1)

    def stages(self, ratio: float, num_layers: int) -> dict[int, float]:
        """Return the one stage, after layer K - 1."""
        require_layer(self.layer, num_layers)
        return {self.layer - 1: ratio}

    def choose(self, view: LayerView, count: int) -> Tensor:
        """Return the patch tokens with the highest attention, mean over heads."""
        scores = view.attention().mean(dim=0)[0, view.patches]
        return view.patches[top(scores, count)]
