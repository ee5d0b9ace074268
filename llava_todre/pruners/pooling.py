"""Control: average pooling of the tokens on an even grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import one_hot

from llava_todre.pruners.base import About, Keep, Pruner
from llava_todre.pruners.grid import cut
from llava_todre.selection import check_finite
from llava_todre.spans import VisualTokens


@dataclass(frozen=True, kw_only=True)
class Pooling(Pruner):
    """Cut each view, or frame, into as many rectangles as it may keep tokens; keep their means.

    Features are averaged after the projector. A mean stands where ``uniform`` keeps a token, so the
    two controls differ only in what stands there.
    """

    about: ClassVar[About] = About(
        paper="control",
        budget_note="k tokens of the image, shared among its views in proportion to their size",
    )

    def select(self, tokens: VisualTokens, num_keep: int) -> Keep:
        """Put the mean of each cell in its middle."""
        check_finite(tokens.features)
        places, means = [], []
        for group, cell, middle in cut(tokens, num_keep):
            member = one_hot(cell, len(middle)).T.float()  # (k, n)
            sums = member @ tokens.features[group].float()
            places.append(middle)
            means.append(sums / member.sum(dim=1, keepdim=True))
        return Keep(torch.cat(places), torch.cat(means).to(tokens.features.dtype))
