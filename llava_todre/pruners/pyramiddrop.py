"""PyramidDrop (arXiv 2410.17247): fewer and fewer visual tokens from stage to stage."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llava_todre.pruners.base import About, LayerView, option, top
from llava_todre.pruners.staged import StagedPruner


@dataclass(frozen=True, kw_only=True)
class PyramidDrop(StagedPruner):
    """Drop the same factor at every stage, by what the layer to come would attend to.

    The score is the attention of the last prompt token in the next layer, computed before that
    layer runs.
    """

    about: ClassVar[About] = About(
        paper="PyramidDrop, CVPR 2025, arXiv 2410.17247",
        budget_note="share of the patch tokens after the last stage, reached in equal factors; "
        "the default is the authors' 50, 25 and 12.5 %, a mean of 46.9 % over 32 layers",
        deviations=(
            "Tokens keep their positions; the released code renumbers them after each stage.",
            "The released code rounds counts down, and cuts a prompt at 2,048 tokens after each "
            "stage.",
        ),
    )

    retain_ratio: float = 0.125
    prune_depths: tuple[float, ...] = option(
        (1 / 4, 2 / 4, 3 / 4),
        "The layers floor(depth * layers) are the first to work on fewer tokens.",
        above=0,
        high=1,
    )

    def stages(self, ratio: float, num_layers: int) -> dict[int, float]:
        """Return the shares ``ratio ** (i / stages)``, i = 1, 2, ..."""
        depths = sorted(self.prune_depths)
        return {
            max(0, math.floor(depth * num_layers) - 1): ratio ** (stage / len(depths))
            for stage, depth in enumerate(depths, start=1)
        }

    def choose(self, view: LayerView, count: int) -> Tensor:
        """Return the patch tokens with the highest attention ahead, mean over heads."""
        scores = view.decoder.next_layer_attention(view.last_row).mean(dim=0)[0, view.patches]
        return view.patches[top(scores, count)]
