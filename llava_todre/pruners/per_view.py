"""Sharing a budget among the views of an image, or the frames of a video.

Released code gives every view the same number of tokens. Unpadding leaves views of different sizes,
and a budget need not divide evenly, so here it is shared in proportion and always spent to the last
token.

Symbols: N tokens, V views that hold any.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from llava_todre.spans import VisualTokens


def apportion(total: int, weights: Sequence[float], limits: Sequence[int]) -> list[int]:
    """Share ``total`` in proportion to ``weights`` by the largest remainder (Hamilton's method).

    No share exceeds its limit; what one cannot take goes to the others. Ties go to the first.

    Args:
        total: at most the sum of ``limits``.
        weights: not negative; if all are zero, ``limits`` take their place.
        limits: how much each can take.
    """
    assert 0 <= total <= sum(limits)
    shares = [0] * len(limits)
    while (rest := total - sum(shares)) > 0:
        open_ = [i for i, limit in enumerate(limits) if shares[i] < limit]
        scale = [weights[i] for i in open_]
        if not sum(scale) > 0:
            scale = [float(limits[i] - shares[i]) for i in open_]
        wanted = [rest * weight / sum(scale) for weight in scale]
        whole = [math.floor(value) for value in wanted]
        order = sorted(range(len(open_)), key=lambda j: (whole[j] - wanted[j], j))
        for j in order[: rest - sum(whole)]:
            whole[j] += 1
        for j, i in enumerate(open_):
            shares[i] = min(limits[i], shares[i] + whole[j])
    return shares


def by_view(tokens: VisualTokens, budget: int) -> Iterator[tuple[Tensor, int]]:
    """Yield (indices of a view's tokens, ascending; its share of ``budget``), views in order.

    Views whose share is zero are left out.
    """
    groups = view_groups(tokens)
    sizes = [len(group) for group in groups]
    for group, share in zip(groups, apportion(budget, sizes, sizes), strict=True):
        if share:
            yield group, share


def view_groups(tokens: VisualTokens) -> list[Tensor]:
    """Return the ascending token indices of each view that has any, in the order of views."""
    return [(tokens.view == view).nonzero()[:, 0] for view in sorted(set(tokens.view.tolist()))]
