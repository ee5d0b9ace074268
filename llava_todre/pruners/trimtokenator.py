"""TrimTokenator (arXiv 2509.00320): tokens close to the text, then diverse ones among them.

Symbols: N tokens of all views or frames, M tokens of text, D width of the decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava_todre.pruners.base import About, Pruner, option, round_half_up, top
from llava_todre.selection import check_finite, greedy_diverse, unit_rows
from llava_todre.spans import VisualTokens


@dataclass(frozen=True, kw_only=True)
class TrimTokenator(Pruner):
    """Drop the tokens farthest from the text, then keep a diverse subset of the others.

    Stage 1 ranks tokens by ``alpha_i``, minus the mean squared distance to the embeddings of the
    text after the image, the paper's stand-in for mutual information. Stage 2 starts from the
    survivor least similar to all survivors on average and grows by the max-sum rule, as version 2
    of ToDRE does. Thumbnail and crops, or all frames of a video, are one pool. Without text after
    the image there is nothing to align to, and Stage 1 keeps all tokens.

    Mind that ``alpha_i = 2 v_i . mean(t) - ||v_i||^2`` up to a constant: where visual tokens are
    much longer than text embeddings, as projected ones usually are, Stage 1 mostly keeps short
    tokens, whatever the text says.
    """

    about: ClassVar[About] = About(
        paper="TrimTokenator, arXiv 2509.00320",
        budget_note="k = share of the patch tokens of an image, thumbnail and crops together; "
        "published: 192, 128 and 64 of 576",
        deviations=(
            "No official code is public; the 80 % of Stage 1 and the first token of Stage 2 come "
            "from a third party's implementation, which rounds them down (460 of 576); here half "
            "rounds up (461).",
            "The text is what follows the image; the system prompt takes no part.",
            "Where the budget is more than those 80 %, Stage 1 keeps as many as the budget.",
        ),
    )

    reads = ("text_embeds",)

    align_ratio: float = option(
        0.8,
        "Share of all tokens that Stage 1 keeps; at 0 the alignment alone decides, at 1 the "
        "diversity alone.",
        low=0,
        high=1,
    )

    def select(self, tokens: VisualTokens, num_keep: int) -> Tensor:
        """Keep the aligned tokens, then the diverse ones of these."""
        features, text = tokens.features, tokens["text_embeds"]
        check_finite(features)
        aligned = torch.arange(len(features), device=features.device)
        if len(text):
            count = max(num_keep, round_half_up(self.align_ratio * len(features)))
            aligned = top(alignment(features, text), count).sort().values
        rows = unit_rows(features[aligned])
        first = int((rows @ rows.mean(dim=0)).argmin())
        picked = greedy_diverse(features[aligned], num_keep, first, "max_sum")
        return aligned[picked]


def alignment(features: Tensor, text: Tensor) -> Tensor:
    """Return (N,) ``-(1/M) sum_j ||v_i - t_j||^2`` plus a constant, without N x M x D differences.

    The mean squared distance to a set is the squared distance to its mean plus the spread of the
    set, which is the same for all tokens.

    Args:
        features: (N, D) visual tokens ``v``.
        text: (M, D) text embeddings ``t``, at least one.
    """
    return -(features.float() - text.float().mean(dim=0)).square().sum(dim=1)
