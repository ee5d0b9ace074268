"""DART (arXiv 2502.11494): keep a few pivot tokens and what is least like them.

Symbols: N tokens now present, P of them patch tokens, V pivots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava_todre.pruners.base import About, LayerView, option, top
from llava_todre.pruners.staged import OneStagePruner
from llava_todre.selection import unit_rows
from llava_todre.spans import TokenType


@dataclass(frozen=True, kw_only=True)
class DART(OneStagePruner):
    """Prune once, by duplication instead of importance; no attention is computed.

    Pivots are the image and the text tokens whose keys have the largest L1 norm. Each pivot in
    turn takes the patch tokens least similar to it, by the cosine of the normed hidden states.
    """

    about: ClassVar[About] = About(
        paper="DART, EMNLP 2025, arXiv 2502.11494",
        budget_note="share of the patch tokens from layer K on, pivots included",
        deviations=(
            "The count is exact: the budget less the image pivots is dealt out to all pivots, the "
            "first ones taking one more where it does not divide. The released code keeps "
            "4 + 8 * floor(budget / 8), that is 132 for 128: say retain_tokens=132.",
            "Pivots take their turn by position, those of the image first. The released code "
            "follows the order of a Python set; of 132 tokens kept, about 120 are the same.",
            "A budget below the number of image pivots keeps the strongest of them.",
        ),
    )

    image_pivots: int = option(4, "Pivots among the patch tokens; they always stay.", low=1)
    text_pivots: int = option(4, "Pivots among the text tokens after the image.", low=0)

    def choose(self, view: LayerView, count: int) -> Tensor:
        """Return the image pivots and what the pivots take."""
        patches, text = view.patches, (view.kinds == TokenType.TEXT).nonzero()[:, 0]
        strength = view.keys().float().abs().sum(dim=(0, 2))  # (N,) all heads concatenated
        of_image, of_text = (
            group[top(strength[group], most)].sort().values
            for group, most in ((patches, min(self.image_pivots, count)), (text, self.text_pivots))
        )
        pivots = torch.cat([of_image, of_text])
        each, more = divmod(count - len(of_image), len(pivots))

        rows = unit_rows(view.decoder.final_norm(view.hidden_states()))
        view.tally.product(len(pivots), rows.shape[1], len(patches))
        taken = torch.isin(patches, of_image)
        for turn, similarity in enumerate(rows[pivots] @ rows[patches].T):  # (V, P)
            difference = -similarity.masked_fill(taken, torch.inf)
            taken[top(difference, each + (turn < more))] = True
        return patches[taken]
