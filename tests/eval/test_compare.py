"""Two runs on the same items, against brute force."""

from __future__ import annotations

import argparse
import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval.results import bootstrap as module
from eval.results.bootstrap import (
    RESAMPLES,
    difference_interval,
    groups_of,
    mean_interval,
    paired_means,
    relative_interval,
)
from eval.results.compare import (
    UNKNOWN,
    add_parser,
    compare,
    drawn_over,
    is_mean,
    mcnemar,
    render,
    run,
)
from llava_todre import TodreError

Items = list[tuple[int, float]]


def drawn(seed: int, num_items: int, chance: float, start: int = 0) -> Items:
    stream = random.Random(seed)
    return [(start + i, float(stream.random() < chance)) for i in range(num_items)]


def result(name: str, benchmarks: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return a run; a benchmark is given as its items."""
    stored = {
        key: items
        if isinstance(items, dict)
        else {
            "score": 100 * sum(score for _, score in items) / len(items),
            "scale": "percent",
            "num_samples": len(items),
            "status": "complete",
            "items": [list(item) for item in items],
        }
        for key, items in benchmarks.items()
    }
    return {
        "format": 1,
        "name": name,
        "status": "complete",
        "error": None,
        "config": {"model": {}, "method": "todre", "options": {}, "suite": "image"},
        "benchmarks": stored,
    } | changes


# ---------------------------------------------------------------------------------- McNemar


@pytest.mark.parametrize("tosses", range(9))
def test_mcnemar_equals_counting_all_ways_the_coins_can_fall(tosses: int) -> None:
    for heads in range(tosses + 1):
        far = abs(2 * heads - tosses)
        ways = [abs(2 * sum(coins) - tosses) for coins in itertools.product((0, 1), repeat=tosses)]
        exact = sum(way >= far for way in ways) / len(ways)
        assert mcnemar(heads, tosses - heads) == pytest.approx(exact, abs=1e-12)


def test_mcnemar_knows_the_textbook_value_and_large_counts() -> None:
    assert mcnemar(6, 21) == pytest.approx(0.005925, abs=1e-6)
    assert mcnemar(0, 0) == 1.0
    assert 0 <= mcnemar(9_000, 10_000) < 1e-11
    assert mcnemar(9_950, 10_000) == pytest.approx(0.7287, abs=2e-3)


# -------------------------------------------------------------------------------- bootstrap


def slow_means(pairs: list[tuple[Items, Items]], resamples: int) -> list[list[tuple[float, float]]]:
    """Return the means of both runs per benchmark, item by item with a plain loop.

    Benchmarks with the same doc_ids are resampled together.
    """
    stream = random.Random(5)
    found = []
    for _ in range(resamples):
        draws: dict[tuple[int, ...], list[int]] = {}
        means = []
        for first, second in pairs:
            ids = tuple(doc_id for doc_id, _ in first)
            if ids not in draws:
                draws[ids] = stream.choices(range(len(ids)), k=len(ids))
            picked = draws[ids]
            means.append(
                (
                    sum(first[i][1] for i in picked) / len(picked),
                    sum(second[i][1] for i in picked) / len(picked),
                )
            )
        found.append(means)
    return found


def middle(values: list[float]) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def paired(seed: int, num_items: int, start: int = 0) -> tuple[Items, Items]:
    """Return two runs that mostly agree."""
    first = drawn(seed, num_items, 0.7, start)
    flips = random.Random(seed + 100)
    second = [(i, 1 - hit if flips.random() < 0.2 else hit) for i, hit in first]
    return first, second


def test_intervals_equal_a_plain_loop_over_items() -> None:
    shared = [paired(seed, 60) for seed in (1, 2)]
    pairs = [*shared, paired(3, 90, start=5)]
    slow = slow_means(pairs, 6_000)
    lead = middle([100 * sum(a - b for a, b in means) / 3 for means in slow])
    assert difference_interval(pairs) == pytest.approx(lead, abs=0.7)
    share = middle([100 * sum(a / b for a, b in means) / 3 for means in slow])
    assert relative_interval(pairs) == pytest.approx(share, abs=1.0)
    single = middle([100 * means[0][0] for means in slow])
    assert mean_interval(pairs[0][0]) == pytest.approx(single, abs=1.7)


def clustered(seed: int, num_images: int) -> tuple[Items, Items, dict[int, int]]:
    """Return two runs on images with one to six questions each, hard images hard throughout."""
    stream = random.Random(seed)
    first: Items = []
    second: Items = []
    images = {}
    for image in range(num_images):
        chance = stream.choice((0.1, 0.95))
        for _ in range(stream.randint(1, 6)):
            images[len(first)] = image
            first.append((len(first), float(stream.random() < chance)))
            second.append((len(second), float(stream.random() < chance)))
    return first, second, images


def test_images_are_drawn_with_all_of_their_items() -> None:
    first, second, images = clustered(1, 80)
    stream = random.Random(5)
    items_of: dict[int, list[int]] = {}
    for doc_id, image in images.items():
        items_of.setdefault(image, []).append(doc_id)
    leads, means = [], []
    for _ in range(6_000):
        drawn_images = stream.choices(list(items_of), k=len(items_of))
        picked = [doc_id for image in drawn_images for doc_id in items_of[image]]
        means.append(100 * sum(first[i][1] for i in picked) / len(picked))
        leads.append(means[-1] - 100 * sum(second[i][1] for i in picked) / len(picked))
    assert mean_interval(first, images) == pytest.approx(middle(means), abs=1.2)
    assert difference_interval([(first, second)], [images]) == pytest.approx(middle(leads), abs=1.2)
    assert width(mean_interval(first, images)) > 1.3 * width(mean_interval(first))


def test_eighteen_answers_that_are_one_are_worth_one() -> None:
    """As in POPE, if an image decides: 50 images are 50 draws, not 900."""
    hits = drawn(3, 50, 0.6)
    repeated = [(18 * i + n, score) for i, score in hits for n in range(18)]
    images = {doc_id: doc_id // 18 for doc_id, _ in repeated}
    assert mean_interval(repeated, images) == mean_interval(hits)
    assert width(mean_interval(repeated)) == pytest.approx(
        width(mean_interval(hits)) / 18**0.5, 0.1
    )


def test_a_benchmark_says_what_is_drawn() -> None:
    stored = {"items": [[0, 1.0], [1, 0.0], [2, 1.0]], "score": 66.7, "scale": "percent"}
    assert (groups_of(stored), drawn_over(stored)) == (None, UNKNOWN)
    alone = stored | {"groups": [0, 1, 2]}
    assert (groups_of(alone), drawn_over(alone)) == (None, "items")
    shared = stored | {"groups": [0, 1, 1]}
    assert (groups_of(shared), drawn_over(shared)) == ({0: 0, 1: 1, 2: 1}, "images")
    assert groups_of(stored, shared) == groups_of(shared), "one of two runs knows"


def test_a_comparison_tells_what_was_drawn() -> None:
    first, second, images = clustered(2, 30)

    def run(name: str, items: Items, **more: Any) -> dict[str, Any]:
        found = result(name, {"pope": items, "gqa": items})
        found["benchmarks"]["pope"] |= more
        return found

    with_images = {"groups": [images[i] for i, _ in first]}
    pair = run("a", first, **with_images), run("b", second)
    rows = {row.benchmark: row for row in compare(*pair)}
    assert rows["pope"].interval == difference_interval([(first, second)], [images])
    assert rows["gqa"].interval == difference_interval([(first, second)])
    text = render(*pair)
    assert "over images: pope; over items (whether they share images is not on record): gqa" in text
    assert "takes items about one image for independent" in text


def width(interval: tuple[float, float]) -> float:
    return interval[1] - interval[0]


def test_benchmarks_on_the_same_items_share_their_draws_and_others_do_not() -> None:
    items = drawn(1, 50, 0.5)
    elsewhere = [(doc_id + 1, score) for doc_id, score in items]
    means = paired_means([(items, items), (items, items), (elsewhere, elsewhere)])
    assert means.shape == (RESAMPLES, 3, 2)
    assert (means[:, 0] == means[:, 1]).all()
    assert abs(np.corrcoef(means[:, 0, 0], means[:, 2, 0])[0, 1]) < 0.1


def test_items_may_have_fractions_for_scores_and_stand_in_any_order() -> None:
    first = [(i, (0.0, 0.3, 0.6, 1.0)[i % 4]) for i in range(40)]
    second = [(i, score / 2) for i, score in first]
    low, high = difference_interval([(first, second)])
    assert low < 100 * 0.475 / 2 < high and width((low, high)) < 15
    assert difference_interval([(first, second[::-1])]) == (low, high)


def test_the_same_run_twice_differs_by_nothing() -> None:
    items = drawn(1, 70, 0.6)
    assert difference_interval([(items, items)]) == (0.0, 0.0)
    assert relative_interval([(items, items)]) == (100.0, 100.0)


def test_many_distinct_scores_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    items = [(i, i / 50) for i in range(50)]
    whole = mean_interval(items)
    monkeypatch.setattr(module, "_CELLS", 50 * 7)
    assert mean_interval(items) == whole
    assert whole[0] < 49 < whole[1]


# -------------------------------------------------------------------------------- comparing


def test_a_comparison_counts_and_averages_what_both_runs_have() -> None:
    first, second = paired(1, 60)
    other_first, other_second = paired(2, 80)
    found = compare(
        result("a", {"gqa": first, "pope": other_first, "mme": drawn(1, 5, 0.5)}),
        result("b", {"pope": other_second, "gqa": second}),
    )
    assert [(row.benchmark, row.num_items) for row in found] == [
        ("gqa", 60),
        ("pope", 80),
        ("mean", 140),
    ]
    gqa, pope, mean = found
    assert gqa.first == pytest.approx(100 * sum(s for _, s in first) / 60)
    only_first = sum(a > b for (_, a), (_, b) in zip(first, second, strict=True))
    only_second = sum(a < b for (_, a), (_, b) in zip(first, second, strict=True))
    assert (gqa.only_first, gqa.only_second) == (only_first, only_second)
    assert gqa.p_value == mcnemar(only_first, only_second)
    assert gqa.interval == difference_interval([(first, second)])
    assert mean.second == pytest.approx((gqa.second + pope.second) / 2)
    assert mean.p_value is None


def test_scores_that_are_not_just_hits_have_no_p_value() -> None:
    first = [(0, 0.3), (1, 1.0)]
    assert compare(result("a", {"vqa": first}), result("b", {"vqa": first}))[0].p_value is None


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (drawn(1, 9, 0.5), r"'gqa' differ: 10 against 9, 1 of them in one run only \(doc_id 9\)"),
        (drawn(1, 10, 0.5, start=5), r"10 of them .*\(doc_id 0, 1, 2, \.\.\.\)"),
        (drawn(1, 9, 0.5) + [(3, 1.0)], "10 against 10"),
        (drawn(1, 10, 0.5) + [(3, 1.0)], "10 against 11; allowed"),
    ],
    ids=["fewer", "others", "one twice, one missing", "one twice"],
)
def test_different_items_are_an_error_that_names_them(other: Items, message: str) -> None:
    with pytest.raises(TodreError, match=message):
        compare(result("a", {"gqa": drawn(1, 10, 0.5)}), result("b", {"gqa": other}))


def test_items_that_stand_there_twice_in_both_runs_are_an_error_too() -> None:
    twice = [*drawn(1, 10, 0.5), (3, 1.0)]
    with pytest.raises(TodreError, match="each once"):
        compare(result("a", {"gqa": twice}), result("b", {"gqa": twice}))


def test_runs_without_common_items_and_failed_runs_are_errors() -> None:
    items = drawn(1, 5, 0.5)
    with pytest.raises(TodreError, match="'a' and 'b' have no benchmark in common"):
        compare(result("a", {"gqa": items}), result("b", {"pope": items}))
    no_items = {"score": 50.0, "scale": "percent", "status": "complete", "items": None}
    with pytest.raises(TodreError, match="no benchmark in common"):
        compare(result("a", {"gqa": items}), result("b", {"gqa": no_items}))
    failed = result("b", {"gqa": items}, status="failed", error="out of memory")
    with pytest.raises(TodreError, match=r"run 'b' failed \(out of memory\)"):
        compare(result("a", {"gqa": items}), failed)


def test_the_text_says_what_was_left_out_and_where_the_metric_is_another() -> None:
    items = drawn(1, 40, 0.5)
    score = {"score": 1500.0, "scale": "points", "status": "complete", "items": items}
    text = render(
        result("a", {"gqa": items, "mme": score, "mlvu": items}),
        result("b", {"gqa": items, "mme": score}),
    )
    assert "A = a, B = b" in text
    assert "+0.0 [+0.0, +0.0]" in text
    assert "lack" in text and "mlvu." in text
    assert "The metric is not the mean of the items: mme." in text


def test_a_score_is_a_mean_only_if_it_is_the_mean() -> None:
    items = [(0, 1.0), (1, 0.0), (2, 1.0)]
    stored = {"score": 66.67, "scale": "percent", "items": items}
    assert is_mean(stored)
    assert not is_mean(stored | {"score": 67.0})
    assert not is_mean(stored | {"scale": "points"})
    assert not is_mean(stored | {"items": None})
    assert not is_mean(stored | {"score": None})


def test_the_command_reads_two_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = paired(4, 50)
    for name, items in (("a", first), ("b", second)):
        (tmp_path / f"{name}.json").write_text(json.dumps(result(name, {"gqa": items})))
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    files = [str(tmp_path / f"{name}.json") for name in "ab"]
    assert run(parser.parse_args(["compare", *files])) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line[:3] == "gqa")
    p_value = compare(result("a", {"gqa": first}), result("b", {"gqa": second}))[0].p_value
    assert line.endswith(f"{p_value:.2g}")
