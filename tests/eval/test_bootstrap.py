"""Bootstrap intervals against plain loops, and against what they promise."""

from __future__ import annotations

import random

import numpy as np
import pytest

from eval.results import bootstrap
from eval.results.bootstrap import difference, intervals, relative_average
from llava_todre import TodreError

Hits = dict[str, list[int]]


def drawn(rng: np.random.Generator, num_images: int, chances: dict[str, float]) -> Hits:
    return {task: rng.binomial(1, p, num_images).tolist() for task, p in chances.items()}


CHANCES = {"a": 0.9, "b": 0.6, "c": 0.3}


def slow_scores(draws: list[Hits], unpruned: Hits) -> tuple[list[float], list[float]]:
    """Return mean and relative average of every resample, question by question."""
    num_images = len(unpruned["a"])
    images, repeats = bootstrap._resample(num_images, len(draws))
    averages, relatives = [], []
    for r in range(bootstrap.RESAMPLES):
        seen = [i for i in range(num_images) for _ in range(int(images[r, i]))]
        used = [d for d in range(len(draws)) for _ in range(int(repeats[r, d]))]
        assert len(seen) == num_images and len(used) == len(draws)
        accuracies, ratios = [], []
        for task in unpruned:
            right = sum(draws[d][task][i] for d in used for i in seen)
            accuracies.append(right / len(used) / len(seen))
            full = sum(unpruned[task][i] for i in seen) / len(seen)
            if full > 0:
                ratios.append(accuracies[-1] / full)
        averages.append(sum(accuracies) / len(accuracies))
        relatives.append(sum(ratios) / len(ratios) if ratios else 0.0)
    return averages, relatives


def slow_middle(scores: list[float]) -> tuple[float, float]:
    """The 2.5 % and 97.5 % points of 2,000 values, between the two nearest."""
    ordered = sorted(scores)

    def point(share: float) -> float:
        place = share * (len(ordered) - 1)
        below = ordered[int(place)]
        return below + (place - int(place)) * (ordered[int(place) + 1] - below)

    return point(0.025), point(0.975)


@pytest.mark.parametrize("num_draws", [1, 3])
@pytest.mark.parametrize("rare", [0.3, 0.1])
def test_intervals_are_those_of_a_plain_loop(num_draws: int, rare: float) -> None:
    rng = np.random.default_rng(1)
    unpruned = drawn(rng, 12, CHANCES | {"c": rare})  # rare: some resamples have no hit of c
    draws = [drawn(rng, 12, CHANCES) for _ in range(num_draws)]
    averages, relatives = slow_scores(draws, unpruned)
    found = intervals(draws, unpruned)
    assert found["average"] == pytest.approx(slow_middle(averages))
    assert found["relative"] == pytest.approx(slow_middle(relatives))

    others = [drawn(rng, 12, CHANCES)]
    other_averages, other_relatives = slow_scores(others, unpruned)
    found = difference(draws, others, unpruned)
    leads = [a - b for a, b in zip(averages, other_averages, strict=True)]
    assert found["average"] == pytest.approx(slow_middle(leads))
    leads = [a - b for a, b in zip(relatives, other_relatives, strict=True)]
    assert found["relative"] == pytest.approx(slow_middle(leads))


def test_images_are_drawn_with_replacement_and_equally_often() -> None:
    images, repeats = bootstrap._resample(50, 3)
    assert images.shape == (2_000, 50) and repeats.shape == (2_000, 3)
    assert (images.sum(1) == 50).all() and (repeats.sum(1) == 3).all()
    assert images.mean(0) == pytest.approx(1, abs=0.1)
    assert (images == 0).mean() == pytest.approx(0.98**50, abs=0.01)
    assert (repeats == 0).mean() == pytest.approx((2 / 3) ** 3, abs=0.03)
    again, _ = bootstrap._resample(50, 1)
    assert (again == images).all(), "methods with other numbers of draws see the same images"


def test_a_method_that_answers_like_the_unpruned_model_has_no_spread() -> None:
    unpruned = drawn(np.random.default_rng(2), 96, CHANCES)
    assert intervals([unpruned], unpruned)["relative"] == (1.0, 1.0)
    assert intervals([unpruned] * 3, unpruned)["relative"] == (1.0, 1.0)
    low, high = intervals([unpruned], unpruned)["average"]
    assert low < 0.6 < high
    assert difference([unpruned], [unpruned], unpruned) == {
        "average": (0.0, 0.0),
        "relative": (0.0, 0.0),
    }


def test_the_same_hits_give_the_same_interval_in_every_order() -> None:
    rng = np.random.default_rng(3)
    unpruned, method = drawn(rng, 40, CHANCES), drawn(rng, 40, CHANCES)
    first = intervals([method], unpruned)
    random.seed(99)
    np.random.seed(99)
    assert intervals([method], unpruned) == first
    swapped = {task: method[task] for task in reversed(method)}
    assert intervals([swapped], unpruned) == first


@pytest.mark.parametrize("num_draws", [1, 3])
def test_95_percent_intervals_hold_the_truth_about_95_times_in_100(num_draws: int) -> None:
    rng = np.random.default_rng(6)
    full = {"a": 0.95, "b": 0.9, "c": 0.85}
    inside = 0
    for _ in range(120):
        unpruned = drawn(rng, 96, full)
        pruned = [
            {task: [h and int(rng.random() < 0.8) for h in unpruned[task]] for task in full}
            for _ in range(num_draws)
        ]
        low, high = intervals(pruned, unpruned)["relative"]
        inside += low <= 0.8 <= high
    assert inside >= 108 and (num_draws > 1 or inside <= 119)


def test_tasks_the_unpruned_model_never_gets_right_are_left_out() -> None:
    found = relative_average(np.array([0.5, 0.3, 0.2]), np.array([1.0, 0.0, 0.4]))
    assert found == pytest.approx(0.5)
    assert relative_average(np.array([0.5]), np.array([0.0])) == 0
    unpruned = {"a": [1, 1, 1, 0], "b": [0, 0, 0, 0]}
    method = {"a": [1, 1, 1, 0], "b": [1, 1, 1, 1]}
    # (0.25 ** 4 of the resamples hold the last image only and have no task left)
    assert intervals([method], unpruned)["relative"] == (1.0, 1.0)


@pytest.mark.parametrize("draws", [[], [{"a": [1]}], [{"a": [1, 0]}, {"a": [1]}], [{"b": [1, 0]}]])
def test_hits_of_other_images_are_refused(draws: list[Hits]) -> None:
    with pytest.raises(TodreError, match="images per task"):
        intervals(draws, {"a": [1, 0]})
    with pytest.raises(TodreError, match="images per task"):
        intervals([{"a": []}], {"a": []})
