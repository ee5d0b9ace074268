"""DivPrune (arXiv 2503.02175): a subset whose two closest tokens are as far apart as possible.

Symbols: N tokens of all views or frames, D width of the decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava_todre.pruners.base import About, Pruner
from llava_todre.selection import greedy_diverse, unit_rows
from llava_todre.spans import VisualTokens

# 1024 rows of similarities to the 36,864 tokens of 64 frames take 144 MiB in float32.
ROWS_AT_A_TIME = 1024


@dataclass(frozen=True, kw_only=True)
class DivPrune(Pruner):
    """Greedy answer to the max-min diversity problem, by cosine in the space of the decoder.

    The first token is the one whose nearest other token is farthest; each next one is farthest from
    its nearest kept token, as in version 1 of ToDRE. Thumbnail and crops, or all frames of a video,
    are one pool.
    """

    about: ClassVar[About] = About(
        paper="DivPrune, CVPR 2025, arXiv 2503.02175",
        budget_note="k = share of the patch tokens of an image, thumbnail and crops together; "
        "the authors' script takes 9.8 %",
        deviations=(
            "The released code counts newline tokens as candidates, of which at most one survives, "
            "and takes k from the length of the whole image span.",
            "Distances are float32, not the precision of the model, and a kept token is never "
            "chosen again.",
            "Written from a description; the released code is CC BY-NC and none of it is used.",
        ),
    )

    def select(self, tokens: VisualTokens, num_keep: int) -> Tensor:
        """Grow a diverse set from the most isolated token."""
        first = int(nearest_similarity(tokens.features).argmin())
        return greedy_diverse(tokens.features, num_keep, first, "max_min")


def nearest_similarity(features: Tensor) -> Tensor:
    """Return (N,) the cosine of each row of ``features`` (N, D) with its nearest other row."""
    rows = unit_rows(features)
    nearest = []
    for start in range(0, len(rows), ROWS_AT_A_TIME):
        similarity = rows[start : start + ROWS_AT_A_TIME] @ rows.T
        similarity.diagonal(start).fill_(-torch.inf)  # a token is not its own neighbour
        nearest.append(similarity.amax(dim=1))
    return torch.cat(nearest)
