"""Budgets of the methods that drop tokens between decoder layers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from layer_views import SYSTEM, TEXT, VISUAL, make_case, patches_per_layer
from torch import Tensor

from llava_todre.errors import TodreError
from llava_todre.pruners.base import Keep, LayerView
from llava_todre.pruners.dart import DART
from llava_todre.pruners.fastv import FastV
from llava_todre.pruners.pyramiddrop import PyramidDrop
from llava_todre.pruners.sparsevlm import SparseVLM, SparseVLMPlus
from llava_todre.pruners.staged import StagedPruner

KINDS = [SYSTEM] * 5 + [VISUAL] * 100 + [TEXT] * 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Halves(StagedPruner):
    """Keeps (1 + r) / 2 of the first patches after layer 1 and r after layer 4."""

    called_for: list = dataclasses.field(default_factory=list)

    def stages(self, ratio: float, num_layers: int) -> dict[int, float]:
        del num_layers
        return {4: ratio, 1: (ratio + min(1.0, 2 * ratio)) / 2}

    def choose(self, view: LayerView, count: int) -> Tensor:
        self.called_for.append((view.layer, count))
        return view.patches[-count:].flip(0)


@pytest.mark.parametrize(
    ("options", "num_layers", "layers"),
    [
        ({}, 32, (1, 4)),
        ({}, 6, (1, 4)),
        ({}, 5, (1,)),
        ({}, 2, ()),
        ({"retain_ratio": 1.0}, 32, ()),
        ({"retain_ratio": 1}, 32, ()),
        ({"retain_ratio": 1.0, "retain_tokens": 64}, 32, (1, 4)),
    ],
)
def test_it_is_called_after_its_stages_unless_they_are_too_late_or_keep_all(
    options, num_layers, layers
):
    assert Halves(**options).probe_layers(num_layers) == layers


def test_the_last_stage_keeps_the_budget_and_the_chosen_patches_only():
    pruner = Halves(retain_ratio=0.3)
    assert patches_per_layer(pruner, KINDS, 8) == [100] * 2 + [45] * 3 + [30] * 3
    assert pruner.called_for == [(1, 45), (4, 30)]
    keep = pruner.at_layer(make_case(KINDS, layer=4).view)
    assert sorted(keep.tolist()) == [*range(75, 105)]


def test_counts_round_half_up_and_are_at_least_one():
    view = make_case([SYSTEM] + [VISUAL] * 5 + [TEXT], layer=4).view
    for ratio, count in [(0.5, 3), (0.49, 2), (0.1, 1), (0.01, 1)]:
        pruner = Halves(retain_ratio=ratio)
        pruner.at_layer(view)
        assert pruner.called_for == [(4, count)]


def test_shares_count_from_the_patches_that_entered_not_from_those_present():
    case = make_case(KINDS, (100,), [*range(5), *range(40, 111)], layer=4)
    pruner = Halves(retain_ratio=0.3)
    assert len(pruner.at_layer(case.view)) == 30


def test_images_of_a_prompt_share_one_pool():
    """Budgets are rounded per image: 25 % of 10 and of 30 are 3 and 8."""
    kinds = [SYSTEM, *[VISUAL] * 10, TEXT, *[VISUAL] * 30, TEXT]
    pruner = Halves(retain_ratio=0.25)
    keep = pruner.at_layer(make_case(kinds, (10, 30), layer=4).view)
    assert pruner.called_for == [(4, 11)]
    assert len(keep) == 11 and 12 <= int(keep.min()) and int(keep.max()) < 42
    tokens = Halves(retain_tokens=7)
    tokens.at_layer(make_case(kinds, (10, 30), layer=4).view)
    assert tokens.called_for == [(4, 14)]


@pytest.mark.parametrize(
    ("kinds", "options"),
    [
        ([SYSTEM, SYSTEM, TEXT], {}),
        ([SYSTEM, VISUAL, VISUAL, TEXT], {"retain_tokens": 2}),
        ([SYSTEM, VISUAL, VISUAL, TEXT], {"retain_tokens": 9, "budget_rule": "mean"}),
        ([SYSTEM, VISUAL, VISUAL, TEXT], {"retain_ratio": 0.9}),
    ],
)
def test_nothing_happens_without_patches_or_within_the_budget(kinds, options):
    pruner = Halves(**options)
    assert pruner.at_layer(make_case(kinds, layer=4).view) is None
    assert pruner.called_for == []


def test_a_stage_that_would_keep_what_is_left_changes_nothing():
    case = make_case(KINDS, (100,), [*range(5), *range(75, 111)], layer=4)
    assert Halves(retain_ratio=0.3).at_layer(case.view) is None
    assert Halves(retain_ratio=0.31).at_layer(case.view) is None
    assert Halves(retain_ratio=0.29).at_layer(case.view) is not None


def test_a_merge_is_handed_on_as_it_is():
    class Merging(Halves):
        def choose(self, view, count):
            return Keep(view.patches[:6], torch.full((6, 64), 2.0))

    decision = Merging().at_layer(make_case(KINDS, layer=4).view)
    assert isinstance(decision, Keep)
    assert len(decision.indices) == 6 and (decision.features == 2).all()


def without_recycling(**options) -> SparseVLM:
    return SparseVLM(recycle=False, **options)


METHODS = [
    (Halves, 0.5),
    (FastV, 0.10),
    (FastV, 0.75),
    (DART, 0.25),
    (PyramidDrop, 0.30),
    (PyramidDrop, 0.70),
    (SparseVLMPlus, 1 / 3),
    (SparseVLMPlus, 0.95),
    (SparseVLM, 0.14),
    (SparseVLM, 1 / 3),
    (SparseVLM, 0.8),
    (without_recycling, 0.4),
]


@pytest.mark.parametrize("num_layers", [32, 40])
@pytest.mark.parametrize(("method", "ratio"), METHODS)
def test_the_rule_mean_meets_the_mean_over_all_layers(method, ratio, num_layers):
    """Up to half a token that rounding costs per stage, one more where tokens are recycled."""
    kinds = [SYSTEM] * 5 + [VISUAL] * 576 + [TEXT] * 6
    pruner = method(retain_ratio=ratio, budget_rule="mean")
    counts = patches_per_layer(pruner, kinds, num_layers)
    wanted = pruner.num_keep(576)
    assert abs(sum(counts) / num_layers - wanted) < (1.5 if method is SparseVLM else 0.6)
    assert all(later <= earlier for earlier, later in zip(counts, counts[1:], strict=False))


@pytest.mark.parametrize(
    ("pruner", "num_patches", "counts"),
    [
        # 171 = (2 * 576 + 30 * 144) / 32
        (FastV(retain_tokens=171, budget_rule="mean"), 576, [576] * 2 + [144] * 30),
        # 270 = (576 + 288 + 144 + 72) / 4
        (
            PyramidDrop(retain_tokens=270, budget_rule="mean"),
            576,
            [576] * 8 + [288] * 8 + [144] * 8 + [72] * 8,
        ),
        # (32 * 1 - 2 * 10) / 30 = 0.4 tokens are left for layers 2 to 31: one stays
        (FastV(retain_ratio=0.1, budget_rule="mean"), 10, [10] * 2 + [1] * 30),
    ],
)
def test_the_rule_mean_by_hand(pruner, num_patches, counts):
    kinds = [SYSTEM] + [VISUAL] * num_patches + [TEXT] * 3
    assert patches_per_layer(pruner, kinds, 32) == counts


@pytest.mark.parametrize("rule", ["count", "mean"])
def test_a_budget_of_all_tokens_drops_none_even_where_a_schedule_would(rule):
    pruner = SparseVLM(retain_tokens=100, budget_rule=rule)
    assert patches_per_layer(pruner, KINDS, 32) == [100] * 32


@pytest.mark.parametrize(
    ("pruner", "num_layers", "message"),
    [
        (
            FastV(retain_ratio=0.05),
            32,
            r"retain_ratio 0\.05 .* layers 1 of 32, .* above 0\.0625 of",
        ),
        (FastV(retain_ratio=0.10), 8, r"retain_ratio 0\.1 .* layers 1 of 8, .* above 0\.25 of"),
        (PyramidDrop(), 32, r"retain_ratio 0\.125 .* layers 7, 15, 23 of 32, .* above 0\.25 of"),
        (
            SparseVLM(retain_ratio=0.09),
            32,
            r"retain_ratio 0\.09 .* layers 2, 6, 15 of 32, .* above 0\.09777",
        ),
        (DART(retain_tokens=36), 32, r"retain_tokens 36 \(retain_ratio 0\.0625\) .* above 0\.0625"),
    ],
)
def test_a_mean_that_the_first_layers_alone_exceed_is_refused(pruner, num_layers, message):
    pruner = dataclasses.replace(pruner, budget_rule="mean")
    case = make_case(
        [SYSTEM] + [VISUAL] * 576 + [TEXT],
        layer=pruner.probe_layers(num_layers)[0],
        num_layers=num_layers,
    )
    with pytest.raises(TodreError, match=message) as caught:
        pruner.at_layer(case.view)
    assert "\n" not in str(caught.value)
