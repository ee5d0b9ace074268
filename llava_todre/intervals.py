"""How far an accuracy may be off by the luck of the pictures: paired bootstrap intervals.

Pictures are drawn with replacement, all questions of a picture together, and every method is scored
on the same draw; so what makes a picture hard for all methods cancels in their ratio. The draws of
a random method are drawn with replacement too, which errs towards a wide interval where each
picture has a draw of its own. An interval holds the middle 95 % of the scores so found (percentile
interval). It speaks of pictures of the same kind and of this model only.

Symbols: R resamples, D draws of a method, T tasks, N pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from llava_todre.errors import TodreError

RESAMPLES = 2_000
SEED = 0
LEVEL = 0.95

Hits = Mapping[str, Sequence[int]]
"""Per task, 1 or 0 for each picture; the same pictures in the same order everywhere."""
Interval = tuple[float, float]
_Array = NDArray[np.float64]


def intervals(draws: Sequence[Hits], unpruned: Hits) -> dict[str, Interval]:
    """Return the 95 % intervals of a method's mean accuracy and of its relative average.

    Args:
        draws: what the method got right, once per draw of a random method.
        unpruned: what the unpruned model got right.
    """
    return {name: _middle(score) for name, score in _scores(draws, unpruned).items()}


def difference(
    draws: Sequence[Hits], others: Sequence[Hits], unpruned: Hits
) -> dict[str, Interval]:
    """Return the 95 % intervals of the lead of one method over another, on the same resamples.

    Where 0 lies inside, these pictures do not tell the two apart. Two overlapping intervals of
    :func:`intervals` do not say that.
    """
    left, right = _scores(draws, unpruned), _scores(others, unpruned)
    return {name: _middle(left[name] - right[name]) for name in left}


def relative_average(accuracy: _Array, unpruned: _Array) -> _Array:
    """Return the mean over tasks of accuracy / unpruned accuracy.

    Tasks at which the unpruned model gets nothing right are left out; 0 if that is all of them.

    Args:
        accuracy: (..., T).
        unpruned: (..., T).

    Returns:
        (...).
    """
    known = unpruned > 0
    ratio = np.where(known, accuracy / np.where(known, unpruned, 1), 0)
    mean: _Array = ratio.sum(-1) / np.maximum(known.sum(-1), 1)
    return mean


def _scores(draws: Sequence[Hits], unpruned: Hits) -> dict[str, _Array]:
    """Return the (R,) mean accuracy and the (R,) relative average of a method."""
    every = _table([unpruned, *draws], tasks=list(unpruned))
    pictures, repeats = _resample(every.shape[-1], len(draws))
    full = pictures @ every[0].T / every.shape[-1]
    right = np.einsum("rd,dtn,rn->rt", repeats, every[1:], pictures, optimize=True)
    accuracy = right / (len(draws) * every.shape[-1])  # of whole numbers, so equal is equal
    return {"average": accuracy.mean(-1), "relative": relative_average(accuracy, full)}


def _table(draws: Sequence[Hits], tasks: list[str]) -> _Array:
    """Return (D, T, N) hits."""
    sizes = {len(hits.get(task, ())) for hits in draws for task in tasks}
    if len(draws) < 2 or len(sizes) != 1 or sizes == {0}:
        raise TodreError(
            f"hits of {len(draws) - 1} draws have {sorted(sizes)} pictures per task; "
            "allowed: one draw or more, all of the same pictures."
        )
    return np.array([[hits[task] for task in tasks] for hits in draws], dtype=np.float64)


def _resample(num_images: int, num_draws: int) -> tuple[_Array, _Array]:
    """Return how often each resample holds each picture (R, N) and each draw (R, D).

    The stream of ``RandomState`` is frozen: the same counts come out of every numpy version, and
    those of the pictures depend on their number only.
    """
    stream = np.random.RandomState(SEED)
    pictures = stream.multinomial(num_images, np.full(num_images, 1 / num_images), RESAMPLES)
    repeats = stream.multinomial(num_draws, np.full(num_draws, 1 / num_draws), RESAMPLES)
    return pictures.astype(np.float64), repeats.astype(np.float64)


def _middle(scores: _Array) -> Interval:
    low, high = np.quantile(scores, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
