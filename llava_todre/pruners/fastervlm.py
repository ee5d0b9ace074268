"""FasterVLM (arXiv 2412.01818v1): keep the patches to which [CLS] attends most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava_todre.pruners.base import About, Pruner, option, top
from llava_todre.pruners.per_view import by_view
from llava_todre.spans import VisualTokens


@dataclass(frozen=True, kw_only=True)
class FasterVLM(Pruner):
    """Rank the tokens of each view, or of each frame of a video, by their [CLS] attention.

    The paper speaks of the last vision layer; the released code reads the one whose output LLaVA
    uses, and so do we.
    """

    about: ClassVar[About] = About(
        paper="FasterVLM, arXiv 2412.01818v1",
        budget_note="k tokens of the image, shared among its views in proportion to their size; "
        "published: 25, 10 and 5 %",
        deviations=(
            "The released code never unpads and gives every view the same number.",
            "Videos, which the authors do not treat, are pruned frame by frame.",
        ),
    )
    reads = ("cls_attention",)

    cls_layer: int = option(
        -2,
        "Vision layer of the [CLS] attention: -2 is the one LLaVA reads its features from "
        "(released code), -1 the last (paper).",
    )

    def select(self, tokens: VisualTokens, num_keep: int) -> Tensor:
        """Keep the most attended tokens of each view."""
        attention = tokens["cls_attention", self.cls_layer]
        kept = [group[top(attention[group], share)] for group, share in by_view(tokens, num_keep)]
        return torch.cat(kept)
