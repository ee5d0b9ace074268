"""The ratio-per-layer plot."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest

from llava_todre.pruners import create_pruner
from llava_todre.stats import Probe
from llava_todre.ui.chart import TO_TEXT, TO_VISUAL, ratio_chart, threshold


def drawn(num: int, num_layers: int, withdrawn_from: int | None = None, tau: Any = None) -> Any:
    probes = [Probe(layer, 0, 0.5 / (layer + 1), 0.25 / (layer + 1)) for layer in range(num)]
    return ElementTree.fromstring(ratio_chart(probes, num_layers, withdrawn_from, tau))


def heights(picture: Any, colour: str) -> list[float]:
    (curve,) = [each for each in picture.iter("polyline") if each.get("stroke") == colour]
    return [float(point.split(",")[1]) for point in curve.get("points").split()]


def test_higher_is_more_and_equal_shares_stand_equally_high() -> None:
    picture = drawn(8, 8, tau=0.25)
    to_visual, to_text = heights(picture, TO_VISUAL), heights(picture, TO_TEXT)
    assert to_visual == sorted(to_visual) and len(to_visual) == 8  # falling shares, y goes down
    assert to_text[0] == to_visual[1]  # both 0.25
    (dotted,) = [each for each in picture.iter("line") if each.get("stroke-dasharray") == "2 4"]
    assert float(dotted.get("y1")) == to_text[0]


def test_the_two_sides_of_the_page_have_one_scale() -> None:
    few = [Probe(layer, 0, 0.3, 0.0) for layer in range(4)]
    many = [Probe(0, 0, 0.9, 0.0), *few[1:]]
    one, other = (
        heights(ElementTree.fromstring(ratio_chart(each, 4, None, None)), TO_VISUAL)
        for each in (few, many)
    )
    assert one[1:] == other[1:]


@pytest.mark.parametrize("num_layers", [2, 10, 32, 80])
def test_everything_stays_inside_and_layers_are_named_without_crowding(num_layers: int) -> None:
    picture = drawn(num_layers - 1, num_layers, withdrawn_from=num_layers - 1, tau=0.1)
    width, height = map(float, picture.get("viewBox").split()[2:])
    for each in picture.iter():
        for key, limit in (("x", width), ("cx", width), ("y", height), ("cy", height)):
            assert 0 <= float(each.get(key, 0)) <= limit
    named = [each.text for each in picture.iter("text") if each.get("text-anchor") == "middle"]
    assert named[0] == "0" and len(named) <= 13
    texts = [each.text for each in picture.iter("text")]
    assert f"layer {num_layers - 1} on" in texts and "tau 0.1" in texts


def test_those_who_cannot_see_it_are_told() -> None:
    label = drawn(8, 10, withdrawn_from=9).get("aria-label")
    assert "0.500 in layer 0, 0.062 in layer 7" in label and "from layer 9 on" in label
    assert "none was measured" in drawn(0, 10).get("aria-label")


def test_the_threshold_is_that_of_the_stage_inside_the_decoder() -> None:
    assert threshold(create_pruner("todre_v1")) == 0.03
    assert threshold(create_pruner("divprune+todre")) == 0.10
    assert threshold(create_pruner("divprune")) is None
