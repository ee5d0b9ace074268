"""VTW: which layer, what leaves, and the search for the layer."""

from __future__ import annotations

import math

import pytest
import torch
from layer_views import PROMPTS, make_case

from llava_todre.errors import TodreError
from llava_todre.pruners.vtw import VTW, search_layer


@pytest.mark.parametrize(
    ("options", "num_layers", "layers"),
    [
        ({}, 32, (15,)),
        ({}, 40, (19,)),
        ({}, 7, (3,)),
        ({"retain_ratio": 0.01}, 32, (0,)),
        ({"retain_ratio": 0.47}, 32, (14,)),
        ({"retain_ratio": 0.99}, 32, ()),
        ({"retain_ratio": 1.0}, 32, ()),
        ({"layer": 15}, 32, (14,)),
        ({"layer": 1, "retain_ratio": 0.9}, 32, (0,)),
        ({"layer": 31}, 32, (30,)),
        ({"layer": 32}, 32, ()),
    ],
)
def test_the_share_of_layers_or_the_layer_itself_says_where(options, num_layers, layers):
    assert VTW(**options).probe_layers(num_layers) == layers


def test_a_layer_the_decoder_does_not_have_is_refused():
    with pytest.raises(TodreError, match="layer must be from 1 to 10 .* 10 layers, got 16"):
        VTW(layer=16).probe_layers(10)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_no_patch_stays(prompt):
    """Nothing is read but the kinds of the tokens."""
    unused = dict.fromkeys(("hidden_states", "queries", "keys", "prompt_embeds"))
    assert VTW().at_layer(make_case(PROMPTS[prompt], layer=15, **unused).view).tolist() == []


def test_a_number_of_tokens_is_refused():
    with pytest.raises(TodreError, match="retain_tokens must be null .* got 64"):
        VTW(retain_tokens=64)


# ---------------------------------------------------------------- the search


class Calibration:
    """Logits that come closer to the full model's the later tokens are withdrawn."""

    def __init__(self, num_samples: int = 3, distance: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(0)
        self.full = torch.randn(num_samples, 50, generator=generator)
        self.shift = distance * torch.randn(num_samples, 50, generator=generator)
        self.called_with: list = []

    def __call__(self, layer):
        self.called_with.append(layer)
        shift = 0.0 if layer is None else self.shift * 2.0**-layer
        return list(self.full + shift)

    def divergence(self, layer: int) -> float:
        """Return the mean over samples of sum p log(p / q), p withdrawn and q full."""
        total = 0.0
        for withdrawn, full in zip(self(layer), self(None), strict=True):
            p, q = (
                [math.exp(x) / sum(math.exp(y) for y in logits.tolist()) for x in logits.tolist()]
                for logits in (withdrawn, full)
            )
            total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        return total / len(self.full)


def test_the_search_takes_the_first_layer_below_eta():
    expected = {layer: Calibration().divergence(layer) for layer in range(2, 12)}
    eta = 1.01 * expected[6]
    layer, divergences = search_layer(Calibration(), 32, eta=eta, first=2)
    assert layer == 6
    assert divergences == pytest.approx({d: expected[d] for d in range(2, 7)}, rel=1e-3)


def test_the_search_is_lazy_and_runs_the_full_model_once():
    calibration = Calibration()
    layer, _ = search_layer(calibration, 32)
    assert calibration.called_with == [None, *range(5, layer + 1)]
    assert layer < 32


def test_the_divergence_is_that_of_the_withdrawn_model_from_the_full_one():
    """KL(removed || full): 0.8 log(0.8 / 0.5) + 0.2 log(0.2 / 0.5); the reverse is 0.2231."""
    logits = {None: torch.tensor([0.5, 0.5]).log(), 5: torch.tensor([0.8, 0.2]).log()}
    layer, divergences = search_layer(lambda d: [logits[d]], 6, eta=0.0)
    assert layer == 6
    assert divergences == pytest.approx({5: 0.192745}, rel=1e-4)
    assert search_layer(lambda d: [logits[d]], 6, eta=0.1928)[0] == 5


def test_samples_are_averaged_not_summed_and_any_offset_of_logits_is_fine():
    same, off = torch.zeros(2), torch.tensor([0.8, 0.2]).log() + 100
    _, divergences = search_layer(
        lambda d: [same, same] if d is None else [same + 7, off], 2, eta=0.0, first=1
    )
    assert divergences == pytest.approx({1: 0.19274 / 2}, rel=1e-3)


def test_a_divergence_of_exactly_eta_is_enough():
    assert search_layer(lambda d: [torch.ones(4)], 32, eta=0.0) == (5, {5: 0.0})


def test_without_a_layer_below_eta_the_number_of_layers_is_returned():
    calibration = Calibration(distance=1e6)
    layer, divergences = search_layer(calibration, 8, eta=1e-4, first=3)
    assert layer == 8
    assert list(divergences) == [3, 4, 5, 6, 7]
    with pytest.raises(TodreError, match="1 <= first <= 4, got 5"):
        search_layer(calibration, 5)


def test_logits_in_half_precision_are_compared_in_single():
    full = torch.tensor([1.0, 0.0, -1.0], dtype=torch.bfloat16)
    _, divergences = search_layer(lambda d: [full if d is None else full + 1], 6, eta=0.0)
    assert divergences[5] == pytest.approx(0.0, abs=1e-6)


def test_the_search_refuses_bad_arguments():
    for key, value in (("eta", -1), ("eta", float("nan")), ("first", 0)):
        with pytest.raises(TodreError, match=f"{key} must be .* got {value}"):
            search_layer(Calibration(), 32, **{key: value})
    with pytest.raises(TodreError, match="one sample or more, got none"):
        search_layer(lambda d: [], 32)
    with pytest.raises(ValueError):
        search_layer(lambda d: [torch.ones(3)] * (2 if d is None else 1), 32)
