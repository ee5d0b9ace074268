"""What the tests of several methods share: shapes, hand-made tokens, parts of slow references."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import selected
from torch import Tensor

from llava_todre.pruners import Keep, Pruner
from llava_todre.spans import VisualTokens

SHAPES: dict[str, dict[str, Any]] = {
    "image": {},
    "crops": {"grid": (2, 2), "side": 12},
    "unpadded": {"grid": (2, 2), "side": 12, "padding": 3},
    "wide": {"grid": (3, 1), "side": 12, "padding": 2},
    "video": {"frames": 5, "side": 12},
}


def at_every_shape(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test with ``shape``, what ``visual_tokens`` takes, and a ``ratio`` of 25 and 10 %."""
    test = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)(test)
    return pytest.mark.parametrize("ratio", [0.25, 0.10])(test)


def slow_shares(total: int, sizes: list[int]) -> list[int]:
    """Share ``total`` in proportion to ``sizes`` by the largest remainder, in whole numbers."""
    whole = [total * size // sum(sizes) for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (-(total * sizes[i] % sum(sizes)), i))
    for i in by_remainder[: total - sum(whole)]:
        whole[i] += 1
    return whole


def groups(tokens: VisualTokens, budget: int) -> Iterator[tuple[list[int], int]]:
    """Yield the tokens of each view and its share of ``budget``."""
    views = tokens.view.tolist()
    members = [[i for i, v in enumerate(views) if v == view] for view in sorted(set(views))]
    yield from zip(members, slow_shares(budget, list(map(len, members))), strict=True)


def unit(rows: Tensor) -> Tensor:
    """Return rows of length one, float64."""
    rows = rows.double()
    return rows / rows.norm(dim=1, keepdim=True)


def kept(method: Pruner, tokens: VisualTokens, num_keep: int) -> list[int]:
    """Return what a method keeps, ascending; it must be ``num_keep`` tokens."""
    found = selected(method, tokens, num_keep).indices.tolist()
    assert len(found) == num_keep
    return found


def grid_of(rows: int, columns: int, **given: Any) -> VisualTokens:
    """Return the tokens of one view of that shape, with zeros as features unless given."""
    index = torch.arange(rows * columns)
    given.setdefault("features", torch.zeros(len(index), 1))
    return VisualTokens(view=index * 0, row=index // columns, column=index % columns, **given)


def assert_merged(selection: Keep, tokens: VisualTokens, expected: dict[int, Tensor]) -> None:
    """Places are equal; features are what the projector makes of the expected ones."""
    assert tokens.project is not None and tokens.vision_features is not None
    assert selection.features is not None
    places = sorted(expected)
    assert selection.indices.tolist() == places
    states = torch.stack([expected[place] for place in places])
    projected = tokens.project(states.to(tokens.vision_features.dtype))
    torch.testing.assert_close(selection.features, projected, rtol=1e-4, atol=1e-5)
