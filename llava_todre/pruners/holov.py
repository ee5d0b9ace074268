"""HoloV (arXiv 2510.02912): share the budget among runs of tokens, keep the most attended of each.

Symbols: N tokens of the image or video, m tokens of one run, D feature width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava_todre.pruners.base import About, Pruner, option, top
from llava_todre.selection import unit_rows
from llava_todre.spans import VisualTokens

VARIANCE_WEIGHT = 0.09
EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class HoloV(Pruner):
    """Cut the whole sequence into runs, weigh them, and keep the most attended tokens of each.

    The sequence is that of reading: thumbnail, then crops row by row, or all frames of a video. In
    the released code a run weighs the mean of its [CLS] attention plus 0.09 times the variance of
    its cosines, and that variance is first scaled to the mean attention of the same run. The
    scaling cancels the variance: every run gains 9 %, except for one whose tokens are all
    orthogonal. So the weights follow attention almost alone; we keep the rule as it is.
    """

    about: ClassVar[About] = About(
        paper="HoloV, NeurIPS 2025, arXiv 2510.02912",
        budget_note="k tokens of the image or video, in one pool",
        deviations=(
            "What a full run cannot take goes to the other runs; the released code pads its output "
            "with zero vectors instead.",
            "Tokens keep their position; the released code reorders them inside each run.",
            "Runs of a single token are weighed like the others; the released code gives them a "
            "thousandth.",
            "Videos, which its LLaVA version does not treat, are cut like one long image.",
        ),
    )
    reads = ("cls_attention",)

    num_runs: int = option(
        16,
        "Runs of equal length into which the sequence is cut; the first are one token longer "
        "where it does not divide evenly.",
        low=1,
    )
    cls_layer: int = option(
        -2, "Vision layer of the [CLS] attention: -2 is the one LLaVA reads its features from."
    )

    def select(self, tokens: VisualTokens, num_keep: int) -> Tensor:
        """Weigh the runs, share the budget, and keep the most attended tokens of each."""
        num_runs = min(self.num_runs, len(tokens))
        attention = tokens["cls_attention", self.cls_layer].tensor_split(num_runs)
        features = unit_rows(tokens.features).tensor_split(num_runs)
        gains = [1 + VARIANCE_WEIGHT * _variance_share(rows) for rows in features]
        means = [scores.mean() for scores in attention]
        weights = (torch.stack(means) * torch.stack(gains)).tolist()
        shares = _share(num_keep, weights, [len(scores) for scores in attention])
        kept, start = [], 0
        for scores, share in zip(attention, shares, strict=True):
            kept.append(start + top(scores, share))
            start += len(scores)
        return torch.cat(kept)


def _variance_share(rows: Tensor) -> Tensor:
    """Return v / (v + epsilon), v the mean variance of the cosines of ``rows`` (m, D).

    A token's cosine with itself counts as zero, and so takes part in its variance.
    """
    others = max(1, len(rows) - 1)
    cosines = (rows @ rows.T).fill_diagonal_(0)  # (m, m)
    deviations = cosines - cosines.sum(dim=1, keepdim=True) / others
    variance = (deviations.square().sum(dim=1) / others).mean()
    return variance / (variance + EPSILON)


def _share(total: int, weights: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """Share ``total`` in proportion to ``weights``; nothing gets more than its size.

    Parts of a token are cut off and the tokens left over go to the largest weights, one each (not,
    as in ``per_view.apportion``, to the largest remainders). What finds no room is shared again.
    """
    shares = [0] * len(sizes)
    while (rest := total - sum(shares)) > 0:
        open_ = [i for i, size in enumerate(sizes) if shares[i] < size]
        open_.sort(key=lambda i: -weights[i])
        scale = sum(weights[i] for i in open_)
        whole = [math.floor(rest * weights[i] / scale) if scale else 0 for i in open_]
        left_over = rest - sum(whole)
        for place, i in enumerate(open_):
            shares[i] = min(sizes[i], shares[i] + whole[place] + (place < left_over))
    return shares
