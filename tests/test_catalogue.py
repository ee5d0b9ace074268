"""What ``todre list`` and docs/methods.md say of a method, read off its class."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from torch import Tensor

from llava_todre.catalogue import reads_text, where
from llava_todre.pruners import PRUNERS, LayerView, Pruner


@pytest.mark.parametrize(
    ("name", "place", "text"),
    [
        ("vanilla", "-", False),
        ("random", "before", False),
        ("todre", "both", True),
        ("cdpruner", "before", True),
        ("fastervlm", "before", False),
        ("fastv", "inside", True),
        ("sparsevlm", "inside", True),
        ("dart", "inside", True),  # keys of text tokens as pivots
        ("vtw", "inside", False),  # drops at a fixed layer, whatever is asked
    ],
)
def test_known_methods(name: str, place: str, text: bool) -> None:
    method = PRUNERS[name]
    assert (where(method), reads_text(method)) == (place, text)


def test_a_method_that_has_no_budget_before_the_decoder_is_inside() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Late(PRUNERS["random"]):  # type: ignore[misc]
        select = Pruner.select

        def at_layer(self, view: LayerView) -> Tensor | None:
            return None

    assert where(Late) == "inside"
    assert where(Pruner) == "-"


@pytest.mark.parametrize("name", PRUNERS)
def test_every_method_prunes_somewhere_and_says_what_it_is(name: str) -> None:
    method = PRUNERS[name]
    assert (where(method) == "-") == (name == "vanilla")
    assert "text_embeds" not in method().needs or reads_text(method)
    assert method.about.paper and method.about.budget_note
    assert "\n" not in method.about.paper + method.about.budget_note
    assert all(line.endswith(".") for line in method.about.deviations)
