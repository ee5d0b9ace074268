"""GlobalCom2 against a plain reference in float64."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from conftest import visual_tokens
from slow import SHAPES, groups, kept
from torch import Tensor

from llava_todre.pruners.globalcom2 import GlobalCom2, crop_ratios
from llava_todre.spans import VisualTokens

LOGITS = ("cls_logits", -1)


def slow_shares(total: int, weights: list[float], limits: list[int]) -> list[int]:
    """Largest remainder; only for shares that stay below their limits."""
    wanted = [total * weight / sum(weights) for weight in weights]
    shares = [int(value) for value in wanted]
    while sum(shares) < total:
        behind = [value - share for value, share in zip(wanted, shares, strict=True)]
        shares[behind.index(max(behind))] += 1
    assert all(share <= limit for share, limit in zip(shares, limits, strict=True))
    return shares


def slow_top(score: dict[int, float], count: int) -> list[int]:
    return sorted(score, key=lambda i: (-score[i], i))[:count]


def slow_ratios(overview: list[list[float]], grid: tuple[int, int], ratio: float) -> list[float]:
    columns, rows = grid
    side = len(overview)
    sums = [0.0] * (columns * rows)
    for y in range(side):
        for x in range(side):
            cell_row = min(y // (side // rows), rows - 1)
            cell_column = min(x // (side // columns), columns - 1)
            sums[cell_row * columns + cell_column] += overview[y][x]
    weight = [math.exp((value - max(sums)) / 10) for value in sums]
    p = [value / sum(weight) for value in weight]
    return [min(1.0, ratio * (1 + value - sum(p) / len(p))) for value in p]


def slow_resize(image: list[list[float]], height: int, width: int, y: int, x: int) -> float:
    """Pixel (y, x) of ``image`` resized bilinearly; pixels are areas, edges repeat."""
    parts = []
    for place, old, new in ((y, len(image), height), (x, len(image[0]), width)):
        source = max(0.0, (place + 0.5) * old / new - 0.5)
        low = min(int(source), old - 1)
        parts.append((low, min(low + 1, old - 1), source - low))
    (top, bottom, down), (left, right, across) = parts
    upper = (1 - across) * image[top][left] + across * image[top][right]
    lower = (1 - across) * image[bottom][left] + across * image[bottom][right]
    return (1 - down) * upper + down * lower


def canvas_place(tokens: VisualTokens, i: int, side: int) -> tuple[int, int]:
    assert tokens.grid is not None
    crop_row, crop_column = divmod(int(tokens.view[i]) - 1, tokens.grid[0])
    return crop_row * side + int(tokens.row[i]), crop_column * side + int(tokens.column[i])


def slow_select(tokens: VisualTokens, budget: int) -> list[int]:
    logits = tokens.vision[LOGITS].double().tolist()
    views = tokens.view.tolist()
    if tokens.grid is None:
        best = [slow_top({i: logits[i] for i in each}, n) for each, n in groups(tokens, budget)]
        return sorted(sum(best, []))
    ratio = budget / len(tokens)
    thumbnail = [i for i, view in enumerate(views) if view == 0]
    side = 1 + max(int(tokens.row[i]) for i in thumbnail)
    overview = [[0.0] * side for _ in range(side)]
    for i in thumbnail:
        overview[int(tokens.row[i])][int(tokens.column[i])] = logits[i]
    num_thumbnail = math.floor(ratio * len(thumbnail) + 0.5)
    picked = slow_top({i: logits[i] for i in thumbnail}, num_thumbnail)
    place = {i: canvas_place(tokens, i, side) for i, view in enumerate(views) if view > 0}
    top, bottom = min(y for y, _ in place.values()), max(y for y, _ in place.values())
    left, right = min(x for _, x in place.values()), max(x for _, x in place.values())
    crops = [
        [i for i in place if views[i] == 1 + j] for j in range(tokens.grid[0] * tokens.grid[1])
    ]
    sizes = [len(crop) for crop in crops]
    ratios = slow_ratios(overview, tokens.grid, ratio)
    shares = slow_shares(
        budget - num_thumbnail, [n * rho for n, rho in zip(sizes, ratios, strict=True)], sizes
    )
    for crop, share in zip(crops, shares, strict=True):
        own = {i: logits[i] for i in crop}
        guide = {
            i: slow_resize(
                overview, bottom - top + 1, right - left + 1, place[i][0] - top, place[i][1] - left
            )
            for i in crop
        }
        own_norm = math.sqrt(sum(value**2 for value in own.values()))
        guide_norm = math.sqrt(sum(value**2 for value in guide.values()))
        picked += slow_top({i: own[i] / own_norm + guide[i] / guide_norm for i in crop}, share)
    return sorted(picked)


def part(tokens: VisualTokens, keep: Tensor) -> VisualTokens:
    """The tokens where ``keep`` (N,) is true, as if the others were padding."""
    return dataclasses.replace(
        tokens,
        features=tokens.features[keep],
        view=tokens.view[keep],
        row=tokens.row[keep],
        column=tokens.column[keep],
        vision={LOGITS: tokens.vision[LOGITS][keep]},
    )


def with_logits(tokens: VisualTokens, logits: Tensor) -> VisualTokens:
    return dataclasses.replace(tokens, vision={LOGITS: logits})


def select(tokens: VisualTokens, budget: int) -> list[int]:
    return kept(GlobalCom2(), tokens, budget)


TALL = {"grid": (1, 3), "side": 14, "padding": 4}


@pytest.mark.parametrize("ratio", [0.25, 0.10])
@pytest.mark.parametrize("shape", [*SHAPES.values(), TALL], ids=[*SHAPES, "tall"])
def test_keeps_what_the_reference_keeps(shape, ratio):
    tokens = visual_tokens(**shape)
    budget = round(ratio * len(tokens))
    assert select(tokens, budget) == slow_select(tokens, budget)


@pytest.mark.parametrize("seed", range(5))
def test_columns_may_be_padding_too(seed):
    """An odd number of them on one side, and one row more on the other."""
    tokens = visual_tokens(grid=(2, 2), side=12, padding=1, seed=seed)
    canvas_column = (tokens.view - 1) % 2 * 12 + tokens.column
    tokens = part(tokens, (tokens.view == 0) | ((canvas_column >= 3) & (canvas_column < 22)))
    budget = round(0.2 * len(tokens))
    assert select(tokens, budget) == slow_select(tokens, budget)


def test_crops_compare_by_their_part_of_the_thumbnail():
    """Sums 0, 0, 0 and 10 ln 3: p is 1/6 three times and 1/2, and its mean 1/4."""
    overview = torch.zeros(4, 4)
    overview[2:, 2:] = 10 * math.log(3) / 4
    expected = [0.2 * 11 / 12] * 3 + [0.2 * 5 / 4]
    assert crop_ratios(overview, (2, 2), 0.2, 10.0) == pytest.approx(expected)
    assert crop_ratios(overview, (2, 2), 0.9, 10.0)[3] == 1.0
    assert crop_ratios(overview, (2, 2), 0.2, 1e9) == pytest.approx([0.2] * 4)


def test_a_crop_asks_for_all_its_tokens_at_most():
    """12 and 4 columns, R = 0.8, all weight on the first: rho is 1 (not 1.2) and 0.4."""
    tokens = visual_tokens(grid=(2, 1), side=12)
    tokens = part(tokens, (tokens.view < 2) | (tokens.column < 4))
    logits = tokens.vision[LOGITS].clone()
    logits[(tokens.view == 0) & (tokens.column < 6)] += 10
    picked = select(with_logits(tokens, logits), 269)
    # Of 336 tokens; 115 of the thumbnail, and 154 in the proportions 144 * 1 to 48 * 0.4.
    assert tokens.view[picked].bincount().tolist() == [115, 136, 18]


def test_a_crop_that_is_all_padding_is_no_trouble():
    tokens = visual_tokens(grid=(1, 3), side=6)
    tokens = part(tokens, (tokens.view == 0) | (tokens.view == 2))
    for budget in (1, 7, 40, 71):
        assert set(tokens.view[select(tokens, budget)].tolist()) <= {0, 2}


@pytest.mark.parametrize("budget", [1, 200, 575])
def test_a_strip_of_whose_crops_nothing_is_left_is_pruned_like_a_thumbnail(budget: int) -> None:
    """Of an image over 72 times as long as high, unpadding leaves no patch of a crop."""
    strip, alone = visual_tokens(grid=(3, 1), padding=12), visual_tokens()
    assert len(strip) == len(alone) == 576
    strip.vision[LOGITS] = alone.vision[LOGITS]
    assert select(strip, budget) == select(alone, budget)
