"""Pooling: means of the cells around the tokens that Uniform keeps, each in its place."""

from __future__ import annotations

import pytest
import torch
from conftest import selected, visual_tokens

from llava_todre.pruners.grid import Pooling, Uniform
from llava_todre.spans import VisualTokens

CASES = {
    "LLaVA-1.5": {},
    "AnyRes": {"grid": (2, 2), "side": 12},
    "padded": {"grid": (2, 2), "side": 12, "padding": 3},
    "wide": {"grid": (3, 1), "side": 12, "padding": 2},
    "video": {"frames": 5, "side": 12},
}


def reference(tokens: VisualTokens, places: list[int]) -> torch.Tensor:
    """Mean of each cell in float64, given what Uniform keeps; cells are cut again, by loops."""
    means = torch.zeros(len(places), tokens.features.shape[1], dtype=torch.float64)
    features = tokens.features.double()
    for view in set(tokens.view.tolist()):
        here = [(r, p) for r, p in enumerate(places) if tokens.view[p] == view]
        members = (tokens.view == view).nonzero()[:, 0]
        if not here:
            continue
        rows = sorted({int(tokens.row[i]) for i in members})
        columns = sorted({int(tokens.column[i]) for i in members})
        share, height, width = len(here), len(rows), len(columns)
        bands = int((share * height / width) ** 0.5 + 0.5)
        while bands * width < share:
            bands += 1
        bands = min(bands, height, share)
        groups: dict[tuple[int, int], list[int]] = {}
        for i in members.tolist():
            band = (int(tokens.row[i]) - rows[0]) * bands // height
            in_band = share * (band + 1) // bands - share * band // bands
            cell = (band, (int(tokens.column[i]) - columns[0]) * in_band // width)
            groups.setdefault(cell, []).append(i)
        assert len(groups) == share
        for group in groups.values():
            (rank,) = [r for r, p in here if p in group]  # one place in each cell
            means[rank] = features[group].mean(dim=0)
    return means


@pytest.mark.parametrize("ratio", [0.25, 0.10])
@pytest.mark.parametrize("case", CASES)
def test_puts_the_mean_of_each_cell_where_uniform_keeps_a_token(case, ratio):
    tokens = visual_tokens(**CASES[case])
    budget = Pooling(retain_ratio=ratio).num_keep(len(tokens))
    selection = selected(Pooling(), tokens, budget)
    assert selection.indices.tolist() == selected(Uniform(), tokens, budget).indices.tolist()
    expected = reference(tokens, selection.indices.tolist())
    torch.testing.assert_close(selection.features.double(), expected, rtol=1e-5, atol=1e-5)


def test_four_cells_of_a_small_image_are_averaged_by_hand():
    index = torch.arange(16)
    tokens = VisualTokens(
        features=index[:, None].float(),
        view=torch.zeros_like(index),
        row=index // 4,
        column=index % 4,
    )
    selection = selected(Pooling(), tokens, 4)
    assert selection.indices.tolist() == [0, 2, 8, 10]
    assert selection.features.flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


def test_one_token_is_the_mean_of_the_image():
    tokens = visual_tokens()
    selection = selected(Pooling(), tokens, 1)
    torch.testing.assert_close(selection.features, tokens.features.mean(dim=0, keepdim=True))
    assert selection.indices.tolist() == [11 * 24 + 11]


def test_all_but_one_averages_one_pair_only():
    tokens = visual_tokens(side=6)
    selection = selected(Pooling(), tokens, 35)
    own = tokens.features[selection.indices]
    changed = (selection.features != own).any(dim=1).nonzero()[:, 0].tolist()
    assert len(selection.indices) == 35
    assert len(changed) == 1
    place = int(selection.indices[changed[0]])
    pair = tokens.features[[place, place + 1]].mean(dim=0)
    torch.testing.assert_close(selection.features[changed[0]], pair)
