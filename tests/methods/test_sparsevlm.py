"""SparseVLM and SparseVLM+ against a plain reading of their specification."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from layer_views import (
    ANYRES,
    ENTERED,
    HEADS,
    LLAVA_15,
    PROMPTS,
    SYSTEM,
    TEXT,
    VISUAL,
    attention_row,
    best,
    kept_patches,
    make_case,
    patches_per_layer,
    rope_frequencies,
)

from llava_todre.errors import TodreError
from llava_todre.pruners.base import Keep
from llava_todre.pruners.sparsevlm import (
    SparseVLM,
    SparseVLMPlus,
    merge_clusters,
    raters,
    rope_weights,
)

# ---------------------------------------------------------------- reference


def slow_raters(case):
    """Return the positions in the view of the text that matches the image above average."""
    kinds = case.view.prompt.kinds.tolist()
    text = [i for i, kind in enumerate(kinds) if kind == TEXT]
    match = np.zeros(len(text))
    for patch in (i for i, kind in enumerate(kinds) if kind == VISUAL):
        powers = np.exp(case.embeds[text] @ case.embeds[patch])
        match += powers / powers.sum()
    chosen = [text[j] for j in range(len(text)) if match[j] > match.mean()]
    return [case.positions.index(position) for position in chosen]


def slow_scores(case):
    rows = slow_raters(case)
    scores = np.zeros(len(case.kinds))
    for row in rows:
        for head in range(HEADS):
            scores += attention_row(case.queries, case.keys, head, row) / HEADS / len(rows)
    return scores


def slow_recycling(case, kept, scores):
    """Return the merged token of each centre by its position."""
    dropped = [i for i in case.where(VISUAL) if i not in kept]
    most = sorted(best(scores, dropped, int(0.3 * len(dropped)) + 1))
    count = int(len(most) / 10) + 1
    states = case.hidden[most]
    distance = np.zeros((len(most), len(most)))
    for i, state in enumerate(states):
        distance[i] = np.sqrt(((states - state) ** 2).sum(1)) / math.sqrt(states.shape[1])
    density = np.array([math.exp(-np.mean(np.sort(row)[:count] ** 2)) for row in distance])
    score = np.zeros(len(most))
    for i in range(len(most)):
        denser = [distance[i, j] for j in range(len(most)) if density[j] > density[i]]
        score[i] = density[i] * min(denser, default=distance.max())
    centres = sorted(range(len(most)), key=lambda i: -score[i])[:count]
    members = {centre: [centre] for centre in centres}
    for i in range(len(most)):
        if i not in members:
            members[min(centres, key=lambda centre: distance[i, centre])].append(i)
    return {most[centre]: states[of].mean(axis=0) for centre, of in members.items()}


def slow_weight(distance, width, theta=10_000.0):
    angles = [distance * theta ** (-2 * i / width) for i in range(width // 2)]
    return 2 * max(1.0, sum(map(math.cos, angles))) / math.sqrt(width)


def slow_plus(case, count, num_heads, theta=10_000.0):
    rows, patches = slow_raters(case), case.where(VISUAL)
    width = case.queries.shape[-1]
    of_heads = np.zeros((HEADS, len(case.kinds)))
    table = [slow_weight(distance, width, theta) for distance in range(max(case.positions) + 1)]
    for row in rows:
        weights = np.array([table[abs(case.positions[row] - other)] for other in case.positions])
        for head in range(HEADS):
            of_heads[head] += attention_row(case.queries, case.keys, head, row) / weights
    heads = sorted(range(HEADS), key=lambda head: -of_heads[head][patches].sum())[:num_heads]
    return best(of_heads[heads].mean(axis=0), patches, count)


def cases():
    """Name, prompt, entered counts, what is present, the layer, and the released share there."""
    for name, kinds in PROMPTS.items():
        yield pytest.param(kinds, ENTERED[name], None, 2, 300 / 192, id=name)
    half = [i for i, kind in enumerate(ANYRES) if kind != VISUAL or i % 5 < 2]
    yield pytest.param(ANYRES, (2880,), half, 6, 200 / 192, id="second stage")


# ---------------------------------------------------------------- against the reference


@pytest.mark.parametrize("ratio", [0.25, 0.10])
@pytest.mark.parametrize(("kinds", "entered", "present", "layer", "share"), cases())
def test_it_keeps_what_the_reference_keeps(kinds, entered, present, layer, share, ratio):
    case = make_case(kinds, entered, present, layer, head_width=128)
    recycling = SparseVLM(retain_ratio=ratio)
    plain = SparseVLM(retain_ratio=ratio, recycle=False)
    plus = SparseVLMPlus(retain_ratio=ratio, num_heads=3)
    count = math.floor(sum(map(plain.num_keep, entered)) * share + 0.5)
    assert kept_patches(case, plus.at_layer(case.view)) == slow_plus(case, count, 3)

    scores = slow_scores(case)
    expected = best(scores, case.where(VISUAL), count)
    assert kept_patches(case, plain.at_layer(case.view)) == expected

    merged = slow_recycling(case, expected, scores)
    decision = recycling.at_layer(case.view)
    assert isinstance(decision, Keep) and decision.features is not None
    assert kept_patches(case, decision) == expected | set(merged) and len(merged) > 1
    for i, state in zip(decision.indices.tolist(), decision.features.double(), strict=True):
        np.testing.assert_allclose(state.numpy(), merged.get(i, case.hidden[i]), atol=1e-5)
    assert torch.equal(case.view.hidden_states().double(), torch.tensor(case.hidden))


# ---------------------------------------------------------------- schedule


@pytest.mark.parametrize(
    ("pruner", "counts"),
    [
        (SparseVLM(recycle=False), [576] * 3 + [300] * 4 + [200] * 9 + [110] * 16),
        (SparseVLMPlus(), [576] * 3 + [300] * 4 + [200] * 9 + [118] * 16),
        # 276 dropped: 83 recycled in 9 clusters; 309 - 200: 33 in 4; 204 - 110: 29 in 3
        (SparseVLM(), [576] * 3 + [309] * 4 + [204] * 9 + [113] * 16),
    ],
)
def test_a_third_is_the_published_table_for_192(pruner, counts):
    pruner = type(pruner)(**{**vars(pruner), "retain_ratio": 1 / 3})
    assert patches_per_layer(pruner, LLAVA_15, 32) == counts


def test_other_budgets_scale_the_table_and_stop_at_1():
    assert list(SparseVLM().stages(0.5, 32).values()) == pytest.approx(
        [150 / 192, 100 / 192, 55 / 192]
    )
    assert list(SparseVLMPlus().stages(0.8, 32).values()) == pytest.approx(
        [1.0, 160 / 192, 94.4 / 192]
    )


@pytest.mark.parametrize(
    ("num_layers", "layers"), [(32, (2, 6, 15)), (40, (2, 7, 18)), (8, (0, 1, 3)), (4, (0, 1))]
)
def test_stages_follow_the_depth_of_the_decoder(num_layers, layers):
    assert SparseVLM().probe_layers(num_layers) == layers
    assert SparseVLMPlus().probe_layers(num_layers) == layers


# ---------------------------------------------------------------- raters


def rated(text_embeds, patch_embeds, kinds=None, present=None):
    kinds = kinds or [SYSTEM] + [VISUAL] * len(patch_embeds) + [TEXT] * len(text_embeds)
    embeds = torch.zeros(len(kinds), 2)
    prompt_kinds = torch.tensor(kinds)
    embeds[prompt_kinds == VISUAL] = torch.tensor(patch_embeds, dtype=torch.float32)
    embeds[prompt_kinds == TEXT] = torch.tensor(text_embeds, dtype=torch.float32)
    embeds[0] = 100.0
    return raters(make_case(kinds, None, present, prompt_embeds=lambda: embeds).view).tolist()


def test_every_patch_has_one_vote():
    """A patch that shouts for one word does not outvote four that prefer another."""
    assert rated([[1, 0], [0, 1], [0, 0]], [[90, 0]] + [[0, 2]] * 4) == [7]
    assert rated([[1, 0], [0, 1], [0, 0]], [[90, 0], [0, 90], [0, 0]]) == [4, 5]


def test_where_no_word_stands_out_the_last_token_rates():
    assert rated([[1, 1]], [[2, 0], [0, 1]]) == [3]
    assert rated([[0, 0], [0, 0]], [[2, 0], [0, 1]]) == [4]


# ---------------------------------------------------------------- recycling


def test_equal_tokens_make_one_centre_and_the_first_wins():
    states = torch.tensor([[1.0, 0], [1.0, 0], [1.0, 0], [0, 5.0], [0, 5.0]])
    centres, merged = merge_clusters(states, 2)
    assert sorted(centres.tolist()) == [0, 3]
    assert merged[centres.argsort()].tolist() == [[1.0, 0], [0, 5.0]]


def test_a_centre_stays_in_its_own_cluster():
    """Among four equal tokens, all three centres are at distance zero from each other."""
    centres, merged = merge_clusters(torch.full((4, 2), 3.0), 3)
    assert centres.tolist() == [0, 1, 2]
    assert torch.equal(merged, torch.full((3, 2), 3.0))


@pytest.mark.parametrize(("num_tokens", "count"), [(1, 1), (5, 1), (5, 5)])
def test_extreme_numbers_of_clusters(num_tokens, count):
    states = torch.randn(num_tokens, 4, generator=torch.Generator().manual_seed(0))
    centres, merged = merge_clusters(states, count)
    assert len(set(centres.tolist())) == count
    expected = states[centres] if count == num_tokens else states.mean(dim=0, keepdim=True)
    torch.testing.assert_close(merged, expected)


def test_large_states_do_not_underflow():
    """Their densities, exp(-115) and less, are zero in single precision."""
    states = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)) * 15
    centres, _ = merge_clusters(states, 6)
    distance = (states.double()[:, None] - states.double()).norm(dim=-1) / math.sqrt(64)
    density = (-distance.sort(dim=1).values[:, :6].square().mean(dim=1)).exp()
    assert density.max() < 1e-50 and density.min() > 0
    score = [
        density[i] * min(distance[i][density > density[i]].tolist(), default=distance.max())
        for i in range(40)
    ]
    assert centres.tolist() == sorted(range(40), key=lambda i: -score[i])[:6]


@pytest.mark.parametrize(
    ("options", "num_merged"),
    [
        ({}, 15),  # 485 dropped, 146 clustered
        ({"cluster_ratio": 0.5}, 74),
        ({"recycle_ratio": 0.1}, 5),
        ({"recycle_ratio": 1.0}, 49),
        ({"recycle_ratio": 1.0, "cluster_ratio": 1.0}, 485),
    ],
)
def test_how_much_is_recycled_is_an_option(options, num_merged):
    case = make_case(LLAVA_15, layer=2)
    decision = SparseVLM(retain_tokens=58, **options).at_layer(case.view)
    assert len(kept_patches(case, decision)) == 91 + num_merged


# ---------------------------------------------------------------- SparseVLM+


def test_the_rope_weight_is_bounded_far_away_only():
    weights = rope_weights(3000, rope_frequencies(128, 10_000.0))
    floor = 2 / math.sqrt(128)
    assert (weights[:1479] > floor).all()
    assert weights[1479] == pytest.approx(floor)
    assert weights.min() == pytest.approx(floor)


@pytest.mark.parametrize(("num_heads", "theta"), [(1, 1e4), (14, 1e4), (2, 5e5)])
def test_number_of_heads_and_the_rope_base_of_the_model_matter(num_heads, theta):
    """The view has 8 heads: 14 are all of them."""
    case = make_case(LLAVA_15, layer=2, rope_theta=theta)
    pruner = SparseVLMPlus(num_heads=num_heads)
    expected = slow_plus(case, 91, num_heads, theta)
    assert kept_patches(case, pruner.at_layer(case.view)) == expected


# ---------------------------------------------------------------- edges


def test_dropping_one_token_merges_it_into_itself():
    kinds = [SYSTEM] + [VISUAL] * 10 + [TEXT] * 5
    present = [0, *range(1, 5), *range(11, 16)]
    case = make_case(kinds, (10,), present, layer=15)
    decision = SparseVLM(retain_tokens=5).at_layer(case.view)
    assert kept_patches(case, decision) == set(case.where(VISUAL))
    kept = case.view.hidden_states()[decision.indices]
    torch.testing.assert_close(decision.features, kept)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (SparseVLM, {"prune_depths": (0.1, 0.2)}, r"3 ascending numbers, got \[0\.1, 0\.2\]"),
        (SparseVLMPlus, {"prune_depths": (0.1, 0.3, 0.2)}, r"got \[0\.1, 0\.3, 0\.2\]"),
    ],
)
def test_depths_are_three_and_ascending(method, options, message):
    with pytest.raises(TodreError, match=message):
        method(**options)
