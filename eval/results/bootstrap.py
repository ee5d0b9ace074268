"""Bootstrap intervals: how far a score may be off by the luck of the images.

Images are drawn with replacement, all items of an image together, and every run is scored on the
same draw (paired): what makes an image hard for all methods cancels in their difference and ratio.
An interval holds the middle 95 % of the resampled scores (percentile interval). It speaks of images
of the same kind and of this model only.

Of the demo (:func:`intervals`, :func:`difference`) all tasks ask about the same images, and the
draws of a random method are drawn too, which errs towards a wide interval where each image has a
draw of its own. Of runs (:func:`relative_interval` and others) benchmarks with the same items
share a draw, others are drawn apart.

Symbols: R resamples, D draws of a method, T tasks or benchmarks, N images or items, G images or
single items, C columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llava_todre.errors import TodreError

RESAMPLES = 2_000
SEED = 0
LEVEL = 0.95

Hits = Mapping[str, Sequence[int]]
"""Per task, 1 or 0 for each image; the same images in the same order everywhere."""
Interval = tuple[float, float]
Items = Sequence[tuple[int, float]]
"""(doc_id, score) of every item, ascending doc_id; scores as fractions 0..1."""
Pair = tuple[Items, Items]
"""The same benchmark in two runs."""
Groups = Mapping[int, int]
"""doc_id -> number of its image."""
_Array = NDArray[np.float64]
_CELLS = 4_000_000
"""Draws held in memory at once."""
_SHOWN_IDS = 3


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

    Where 0 lies inside, these images do not tell the two apart. Two overlapping intervals of
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
    images, repeats = _resample(every.shape[-1], len(draws))
    full = images @ every[0].T / every.shape[-1]
    right = np.einsum("rd,dtn,rn->rt", repeats, every[1:], images, optimize=True)
    accuracy = right / (len(draws) * every.shape[-1])  # of whole numbers, so equal is equal
    return {"average": accuracy.mean(-1), "relative": relative_average(accuracy, full)}


def _table(draws: Sequence[Hits], tasks: list[str]) -> _Array:
    """Return (D, T, N) hits."""
    sizes = {len(hits.get(task, ())) for hits in draws for task in tasks}
    if len(draws) < 2 or len(sizes) != 1 or sizes == {0}:
        raise TodreError(
            f"hits of {len(draws) - 1} draws have {sorted(sizes)} images per task; "
            "allowed: one draw or more, all of the same images."
        )
    return np.array([[hits[task] for task in tasks] for hits in draws], dtype=np.float64)


def _resample(num_images: int, num_draws: int) -> tuple[_Array, _Array]:
    """Return how often each resample holds each image (R, N) and each draw (R, D).

    The stream of ``RandomState`` is frozen: the same counts come out of every numpy version, and
    those of the images depend on their number only.
    """
    stream = np.random.RandomState(SEED)
    images = stream.multinomial(num_images, np.full(num_images, 1 / num_images), RESAMPLES)
    repeats = stream.multinomial(num_draws, np.full(num_draws, 1 / num_draws), RESAMPLES)
    return images.astype(np.float64), repeats.astype(np.float64)


def _middle(scores: _Array) -> Interval:
    low, high = np.quantile(scores, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def groups_of(*stored: Mapping[str, Any]) -> Groups | None:
    """Return which items of a benchmark ask about the same image; None where none do.

    Args:
        stored: parts of runs with the same items; the first that knows of images is believed.
    """
    for each in stored:
        if each.get("groups"):
            groups = dict(zip((doc_id for doc_id, _ in each["items"]), each["groups"], strict=True))
            return groups if len({*groups.values()}) < len(groups) else None
    return None


def mean_interval(items: Items, groups: Groups | None = None) -> Interval:
    """Return the 95 % interval of the mean score, in percent."""
    ordered = sorted(items)
    scores = np.array([[score] for _, score in ordered], dtype=np.float64)
    means = _resampled_means(scores, _numbers(ordered, groups), np.random.RandomState(SEED))
    return _middle(100 * means)


def difference_interval(
    pairs: Sequence[Pair], groups: Sequence[Groups | None] | None = None
) -> Interval:
    """Return the 95 % interval of first - second, mean over benchmarks, in percent."""
    means = paired_means(pairs, groups)
    return _middle(100 * (means[..., 0] - means[..., 1]).mean(-1))


def relative_interval(
    pairs: Sequence[Pair], groups: Sequence[Groups | None] | None = None
) -> Interval:
    """Return the 95 % interval of the relative average, in percent.

    Args:
        pairs: per benchmark the items of a run, and those of the unpruned run.
        groups: per benchmark the images of its items.
    """
    means = paired_means(pairs, groups)
    return _middle(100 * relative_average(means[..., 0], means[..., 1]))


def paired_means(pairs: Sequence[Pair], groups: Sequence[Groups | None] | None = None) -> _Array:
    """Return the (R, T, 2) mean scores of both runs on every resample.

    Raises:
        TodreError: the runs of a pair did not score the same items.
    """
    shared: dict[tuple[Any, ...], list[int]] = {}
    images = groups or [None] * len(pairs)
    for index, (first, second) in enumerate(pairs):
        require_same_items(first, second)
        ids = tuple(sorted(doc_id for doc_id, _ in first))
        of_image = images[index]
        key = (ids, None if of_image is None else tuple(of_image[doc_id] for doc_id in ids))
        shared.setdefault(key, []).append(index)
    stream = np.random.RandomState(SEED)
    means = np.empty((RESAMPLES, len(pairs), 2))
    for members in shared.values():
        both = [sorted(items) for index in members for items in pairs[index]]
        columns = np.array([[score for _, score in items] for items in both], dtype=np.float64)
        drawn = _resampled_means(columns.T, _numbers(both[0], images[members[0]]), stream)
        means[:, members] = drawn.reshape(RESAMPLES, len(members), 2)
    return means


def _numbers(ordered: Items, groups: Groups | None) -> list[int] | None:
    """Return the image of every item, in order."""
    return None if groups is None else [groups[doc_id] for doc_id, _ in ordered]


def require_same_items(first: Items, second: Items, benchmark: str = "") -> None:
    """Raise a TodreError unless both runs scored the same items, one or more."""
    ids, others = ({doc_id for doc_id, _ in items} for items in (first, second))
    if ids == others and len(first) == len(second) == len(ids) > 0:
        return
    odd = sorted(ids ^ others)
    shown = ", ".join(map(str, odd[:_SHOWN_IDS])) + (", ..." if len(odd) > _SHOWN_IDS else "")
    apart = f", {len(odd)} of them in one run only (doc_id {shown})" if odd else ""
    raise TodreError(
        f"items {benchmark and f'of {benchmark!r} '}differ: {len(first)} against {len(second)}"
        f"{apart}; allowed: two runs on the same items, each once."
    )


def _resampled_means(
    scores: _Array, images: Sequence[int] | None, stream: np.random.RandomState
) -> _Array:
    """Return the means (R, C) of the columns of ``scores`` (N, C), rows drawn with replacement.

    Rows with equal scores are drawn together: how often each distinct row turns up is multinomial,
    and there are few of them (four for the hits of two runs). Of images, the sums of their items
    are drawn, with how many they are.
    """
    sums = np.column_stack([scores, np.ones(len(scores))])  # (N, C + 1)
    if images is not None:
        _, place = np.unique(images, return_inverse=True)
        of_items, sums = sums, np.zeros((place.max() + 1, sums.shape[1]))  # (G, C + 1)
        np.add.at(sums, place, of_items)
    rows, counts = np.unique(sums, axis=0, return_counts=True)
    at_once = max(1, _CELLS // len(counts))
    parts = []
    for start in range(0, RESAMPLES, at_once):
        size = min(at_once, RESAMPLES - start)
        drawn = stream.multinomial(len(sums), counts / len(sums), size)
        parts.append(drawn @ rows[:, :-1] / (drawn @ rows[:, -1:]))
    return np.concatenate(parts)
