"""Stage 1 of one method with the decoder stage of another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import selected, visual_tokens

from llava_todre.errors import TodreError
from llava_todre.model.llava import LlavaLlamaForCausalLM
from llava_todre.pruners import Combined, Observed, create_pruner


def test_options_go_to_the_stage_that_has_them() -> None:
    pruner = create_pruner("divprune+todre", retain_ratio=0.25, tau=0.3)
    assert pruner == Combined(
        before=create_pruner("divprune", retain_ratio=0.25),
        inside=create_pruner("todre", tau=0.3),
    )
    pruner = create_pruner("random+vtw", retain_ratio=0.25)
    assert isinstance(pruner, Combined) and pruner.inside == create_pruner("vtw")
    pruner = create_pruner("random+fastv", retain_tokens=9, seed=4, **{"inside.retain_ratio": 0.5})
    assert isinstance(pruner, Combined)
    assert pruner.before == create_pruner("random", retain_tokens=9, seed=4)
    assert pruner.inside == create_pruner("fastv", retain_ratio=0.5)
    pruner = create_pruner("todre_v1+todre", **{"before.seed": 3, "inside.tau": 0.5})
    assert isinstance(pruner, Combined)
    assert (pruner.before.seed, pruner.inside.tau) == (3, 0.5)  # type: ignore[attr-defined]
    pruner = create_pruner("todre_v1+todre", newlines="none")
    assert isinstance(pruner, Combined)
    assert pruner.newlines == pruner.before.newlines == pruner.inside.newlines == "none"
    assert Observed(method=pruner).newlines == "none"


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("todre_v1+todre", {"tau": 0.1}, "both .* expected before.tau or inside.tau, got tau"),
        ("divprune+tood", {}, "method 'tood' is unknown. Did you mean 'todre'"),
        ("dvprune+todre", {}, "method 'dvprune' is unknown. Did you mean 'divprune'"),
        ("divprune+todre", {"sed": 1}, "'sed' is unknown"),
        ("divprune+todre", {"insde.tau": 1}, "'insde.tau' is unknown"),
        ("todre+divprune", {}, "inside must be .* inside the decoder, .* got DivPrune"),
        ("fastv+todre", {}, "before must be .* before the decoder, .* got FastV"),
        ("vanilla+todre", {"retain_ratio": 0.5}, "keeps every token"),
        ("todre+fastv", {"inside.retain_ratio": 0.5, "inside.newlines": "all"}, "'row' and 'all'"),
        ("divprune+todre", {"newlines": "some"}, "newlines 'some' is unknown"),
        (
            "divprune+fastv",
            {"retain_ratio": 0.25},
            "inside.retain_ratio or .* as 'fastv' has",
        ),
        ("a+b+c", {}, "method"),
        ("+todre", {}, "method ''"),
        ("todre+", {}, "method ''"),
    ],
)
def test_what_does_not_fit_is_refused(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TodreError, match=message):
        create_pruner(method, **options)


def test_it_is_a_value_like_any_method() -> None:
    pruner = create_pruner("divprune+todre")
    assert pruner == create_pruner("divprune+todre") != create_pruner("divprune+todre_v1")
    assert hash(pruner) == hash(create_pruner("divprune+todre"))
    with pytest.raises(ValueError):
        dataclasses.replace(pruner, retain_ratio=0.5)  # the budget is that of its first stage


def test_each_stage_is_that_of_its_method() -> None:
    pruner = create_pruner("fastervlm+todre", retain_ratio=0.25)
    alone = create_pruner("fastervlm", retain_ratio=0.25)
    tokens = visual_tokens(side=8)
    assert pruner.needs == alone.needs
    assert pruner.num_keep(64) == 16
    assert torch.equal(selected(pruner, tokens, 16).indices, selected(alone, tokens, 16).indices)
    assert pruner.probe_layers(32) == create_pruner("todre").probe_layers(32)
    assert create_pruner("todre+vanilla").probe_layers(32) == ()
    assert not create_pruner("vanilla+todre").will_select(576)


@torch.no_grad()
def test_both_stages_at_once_and_each_alone(
    tiny_llava: Callable[..., LlavaLlamaForCausalLM],
) -> None:
    model = tiny_llava()
    batch = {
        "input_ids": torch.tensor([[1, 5, -200, 7, 8]]),
        "images": torch.randn(1, 5, 3, 56, 56, generator=torch.Generator().manual_seed(0)),
        "image_sizes": [(112, 112)],
    }

    def layers(method: str, **options: Any) -> tuple[int, ...]:
        model.set_pruner(method, **options)
        model(**batch)
        return model.last_stats[0].visual_tokens_per_layer

    withdraw = {"tau": 1.0, "probe_depths": (0.5,)}
    full = layers("vanilla")[0]
    first = layers("todre+vanilla", retain_ratio=0.25)
    assert 20 <= first[0] < full and first == (first[0],) * 8
    assert layers("vanilla+todre", **withdraw) == (full,) * 5 + (0,) * 3
    assert layers("divprune+todre", retain_ratio=0.25, **withdraw)[4:] == (
        layers("divprune", retain_ratio=0.25)[0], 0, 0, 0,
    )  # fmt: skip
