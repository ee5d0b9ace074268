"""Methods: budgets, ranges, presets, pivots, what they ask for and when they withdraw."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import reference
import torch
from conftest import layer_view, selected
from reference import SYSTEM, TEXT, VISUAL
from torch import Tensor

from llava_todre.errors import TodreError
from llava_todre.model import vision
from llava_todre.pruners import (
    PRUNERS,
    LayerView,
    Pruner,
    Random,
    Todre,
    TodreV1,
    create_pruner,
    resolve,
)
from llava_todre.pruners.base import NEEDS, VISION_NEEDS, layers_at
from llava_todre.pruners.controls import Vanilla
from llava_todre.spans import VisualTokens

CLS = ("cls_attention", -1)


def visual_tokens(
    num_views: int = 1, side: int = 4, is_video: bool = False, seed: int = 0
) -> VisualTokens:
    """Return random tokens of some views of ``side`` x ``side`` patches."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.arange(num_views * side * side)
    patch = index % side**2
    return VisualTokens(
        features=torch.randn(len(index), 8, generator=generator),
        view=index // side**2,
        row=patch // side,
        column=patch % side,
        is_video=is_video,
        vision={CLS: torch.rand(len(index), generator=generator)},
    )


def tokens_whose_best_is(index: int, **kwargs: Any) -> VisualTokens:
    """Return tokens of which ``index`` gets the most [CLS] attention of all."""
    tokens = visual_tokens(**kwargs)
    tokens.vision[CLS][index] = 2.0
    return tokens


# ---------------------------------------------------------------- budget


@pytest.mark.parametrize(
    ("ratio", "num_tokens", "budget"),
    [
        (0.10, 2880, 288),
        (0.25, 2880, 720),
        (0.10, 576, 58),
        (0.25, 576, 144),
        (0.5, 5, 3),
        (0.5, 7, 4),
        (0.1, 5, 1),
        (0.1, 4, 1),
        (0.001, 576, 1),
        (0.999, 10, 10),
        (1.0, 2345, 2345),
    ],
)
def test_ratio_rounds_half_up_and_keeps_at_least_one(ratio, num_tokens, budget):
    assert Todre(retain_ratio=ratio).num_keep(num_tokens) == budget


def test_number_of_tokens_replaces_the_ratio():
    pruner = Todre(retain_ratio=0.5, retain_tokens=64)
    assert [pruner.num_keep(n) for n in (576, 65, 64, 10)] == [64, 64, 64, 10]


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("todre", {"tau": -0.01}, r"tau must be a number, 0 <= tau <= 1, got -0\.01\.$"),
        (
            "todre",
            {"retain_tokens": 0},
            "a whole number, retain_tokens >= 1, or null, got 0",
        ),
        (
            "todre",
            {"probe_depths": (0.5, 0.0)},
            r"0 < each <= 1, got \[0\.5, 0\.0\]",
        ),
        ("todre", {"pivot": "clss"}, "pivot 'clss' .* mean 'cls'"),
        ("prumerge", {"adaptive": 1}, "adaptive must be true or false, got 1"),
        ("vanilla", {"retain_ratio": 0.5}, r"keeps every token: expected no budget, got 0\.5"),
        ("vanilla", {"retain_tokens": 64}, "keeps every token: expected no budget, got 64"),
        ("todrev1", {}, "method 'todrev1' is unknown. Did you mean 'todre_v1'"),
        ("pruner", {}, "method 'pruner' is unknown.* Allowed: .*todre, todre_v1, .*vanilla"),
        ("todre", {"retain_ration": 0.5}, "'retain_ration' is unknown. Did you mean 'retain_rat"),
        ("random", {"tau": 0.1}, "option of method 'random': 'tau' is unknown"),
        ("todre", {"needs": ()}, "'needs' is unknown"),
    ],
)
def test_bad_values_are_named_with_what_is_allowed(method, options, message):
    with pytest.raises(TodreError, match=message) as caught:
        create_pruner(method, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", [None, 3, b"todre", ["todre"], Todre])
def test_a_method_is_a_name(method):
    with pytest.raises(TodreError, match="method must be a name or a method object, got"):
        create_pruner(method)


def test_options_may_be_numbers_of_other_libraries():
    given = {"retain_ratio": np.float32(0.25), "tau": np.float64(0.5)}
    depths = [np.array([0.5, 0.75], np.float32), [0.5, 0.75], (np.float32(0.5), torch.tensor(0.75))]
    for each in depths:
        pruner = create_pruner("todre", **given, probe_depths=each, cls_layer=np.int64(-2))
        same = create_pruner(
            "todre", retain_ratio=0.25, tau=0.5, probe_depths=(0.5, 0.75), cls_layer=-2
        )
        assert pruner == same and repr(pruner) == repr(same) and hash(pruner) == hash(same)
    assert repr(Todre(retain_tokens=np.int64(9))) == repr(Todre(retain_tokens=9))
    with pytest.raises(TodreError, match=r"retain_ratio must be .* got 1\.5"):
        create_pruner("todre", retain_ratio=np.float64(1.5))


def test_the_error_is_a_value_error():
    assert issubclass(TodreError, ValueError)


# ---------------------------------------------------------------- presets


def test_version_2_of_the_paper_is_the_default():
    pruner = create_pruner("todre")
    assert isinstance(pruner, Todre)
    assert pruner.objective == "max_sum"
    assert pruner.pivot == "cls"
    assert pruner.cls_layer == -1
    assert pruner.probe_depths == (7 / 8,)
    assert pruner.tau == 0.10
    assert pruner.text_set == "after_image"
    assert pruner.retain_ratio == 0.10
    assert pruner.retain_tokens is None


def test_version_1_differs_in_rule_layers_and_threshold_only():
    old, new = dataclasses.asdict(TodreV1()), dataclasses.asdict(Todre())
    assert {key: value for key, value in old.items() if value != new[key]} == {
        "objective": "max_min",
        "probe_depths": (4 / 8, 5 / 8, 6 / 8, 7 / 8),
        "tau": 0.03,
    }


@pytest.mark.parametrize(
    ("method", "num_layers", "layers"),
    [
        ("todre", 32, (28,)),
        ("todre", 40, (35,)),
        ("todre", 8, (7,)),
        ("todre_v1", 32, (16, 20, 24, 28)),
        ("todre_v1", 40, (20, 25, 30, 35)),
        ("vanilla", 32, ()),
        ("random", 32, ()),
    ],
)
def test_probe_layers_of_the_presets(method, num_layers, layers):
    assert create_pruner(method).probe_layers(num_layers) == layers


def test_depths_become_layers_from_zero_sorted_and_without_repeats():
    assert layers_at((), 32) == ()
    assert layers_at((1.0,), 32) == (31,)
    assert layers_at((0.5, 0.25, 0.26), 8) == (2, 4)


@pytest.mark.parametrize("method", PRUNERS)
def test_methods_are_frozen_dataclasses_that_can_be_keys(method):
    pruner = create_pruner(method)
    assert isinstance(pruner, Pruner)
    assert pruner == create_pruner(method)
    assert hash(pruner) == hash(create_pruner(method))
    for need in pruner.needs:
        assert need in NEEDS if isinstance(need, str) else need[0] in VISION_NEEDS
    with pytest.raises(dataclasses.FrozenInstanceError):
        pruner.retain_ratio = 0.5  # type: ignore[misc]


# ---------------------------------------------------------------- Stage 1


@pytest.mark.parametrize("objective", ["max_sum", "max_min"])
def test_todre_grows_its_set_from_the_pivot(objective):
    tokens = tokens_whose_best_is(11)
    picked = reference.greedy_diverse(tokens.features, 6, 11, objective)
    got = selected(Todre(objective=objective), tokens, 6).indices
    assert got.tolist() == sorted(picked)


def test_pivot_of_one_view_is_its_best_token():
    assert Todre().pivot_index(tokens_whose_best_is(13)) == 13


def test_pivot_of_crops_comes_from_the_thumbnail_alone():
    tokens = tokens_whose_best_is(40, num_views=5)
    thumbnail = int(tokens.vision[CLS][:16].argmax())
    assert Todre().pivot_index(tokens) == thumbnail


def test_pivot_of_a_video_is_the_best_token_of_its_best_frame():
    assert Todre().pivot_index(tokens_whose_best_is(40, num_views=5, is_video=True)) == 40


@pytest.mark.parametrize(("pivot", "sign"), [("nearest", 1.0), ("farthest", -1.0)])
@pytest.mark.parametrize("is_video", [False, True])
def test_pivot_by_the_mean_is_a_token_of_the_thumbnail_or_any_frame(pivot, sign, is_video):
    tokens = visual_tokens(num_views=5, is_video=is_video)
    rows = torch.nn.functional.normalize(tokens.features.double(), dim=1)
    closeness = [
        sign * float(torch.nn.functional.cosine_similarity(row, rows.mean(0), dim=0))
        for row in rows
    ]
    allowed = range(80) if is_video else range(16)
    assert Todre(pivot=pivot).pivot_index(tokens) == max(allowed, key=lambda i: closeness[i])
    assert Todre(pivot=pivot).needs == frozenset()


def test_centred_similarity_takes_the_mean_away_first():
    tokens = visual_tokens()
    lopsided = dataclasses.replace(tokens, features=tokens.features + 3.0)
    centred = tokens.features.double() - tokens.features.double().mean(0)
    pivot = Todre().pivot_index(tokens)
    expected = sorted(reference.greedy_diverse(centred, 6, pivot, "max_sum"))
    for given in (tokens, lopsided):
        assert selected(Todre(similarity="centred"), given, 6).indices.tolist() == expected
    assert selected(Todre(), lopsided, 6).indices.tolist() != expected


def test_random_pivot_depends_on_the_seed_alone():
    tokens, same = visual_tokens(num_views=5), visual_tokens(num_views=5, seed=1)
    pivots = {seed: Todre(pivot="random", seed=seed).pivot_index(tokens) for seed in range(40)}
    assert pivots == {s: Todre(pivot="random", seed=s).pivot_index(same) for s in range(40)}
    assert all(0 <= pivot < 80 for pivot in pivots.values())
    assert len(set(pivots.values())) > 20


def test_random_selection_depends_on_seed_and_number_of_tokens_alone():
    first = selected(Random(seed=3), visual_tokens(), 5).indices
    assert torch.equal(first, selected(Random(seed=3), visual_tokens(seed=9), 5).indices)
    assert not torch.equal(first, selected(Random(seed=4), visual_tokens(), 5).indices)


def test_random_selection_is_uniform():
    tokens, draws = visual_tokens(), 400
    hits = torch.zeros(16)
    for seed in range(draws):
        hits[selected(Random(seed=seed), tokens, 4).indices] += 1
    spread = (draws * 0.25 * 0.75) ** 0.5
    assert (hits - draws / 4).abs().max() < 4 * spread


def test_random_selection_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    selected(Random(), visual_tokens(), 4)
    Todre(pivot="random").pivot_index(visual_tokens())
    assert torch.equal(torch.rand(3), expected)


def test_vanilla_never_selects():
    assert [Vanilla().num_keep(n) for n in (1, 576, 2880)] == [1, 576, 2880]
    with pytest.raises(NotImplementedError):
        selected(Vanilla(), visual_tokens(), 3)


# ---------------------------------------------------------------- nothing that no one needs


@pytest.mark.parametrize(
    ("method", "options", "calls"),
    [
        ("todre", {}, 1),
        ("todre_v1", {"cls_layer": -2}, 1),
        ("todre", {"pivot": "random"}, 0),
        ("todre", {"retain_ratio": 1.0}, 0),
        ("todre", {"retain_tokens": 80}, 0),
        ("random", {}, 0),
        ("vanilla", {}, 0),
    ],
)
def test_cls_attention_is_computed_only_for_a_pivot(
    tiny_llava, monkeypatch, method, options, calls
):
    asked = []
    original = vision.cls_attention

    def spy(layer: torch.nn.Module, hidden: Tensor) -> Tensor:
        asked.append(layer)
        return original(layer, hidden)

    monkeypatch.setitem(vision.QUANTITIES, "cls_attention", spy)
    model = tiny_llava()
    pruner = model.set_pruner(method, **options)
    with torch.no_grad():
        model(
            input_ids=torch.tensor([[1, 5, -200, 7]]),
            images=torch.randn(1, 5, 3, 56, 56),
            image_sizes=[(112, 112)],
        )
    layers = model.get_vision_tower().vision_tower.encoder.layers
    assert asked == ([layers[pruner.cls_layer]] if calls else [])  # type: ignore[attr-defined]


def pivots_of_eq_3(model: Any, pixels: Tensor) -> dict[str, list[int]]:
    """Return the patch that [CLS] attends to most in each image of one view, in float64."""
    tower = model.get_vision_tower().vision_tower.double()
    hidden = tower(pixels.double(), output_hidden_states=True).hidden_states[-2]
    block = tower.encoder.layers[-1]
    states, attention = block.layer_norm1(hidden), block.self_attn
    query, keys = attention.q_proj(states[:, :1]), attention.k_proj(states)  # (V, 1 or 17, 32)
    best: dict[str, list[int]] = {}
    for name, heads in (("mean", 4), ("unsplit", 1)):
        width = 32 // heads
        parts = (
            torch.softmax(q @ k.transpose(1, 2) / width**0.5, dim=-1)
            for q, k in zip(query.split(width, dim=-1), keys.split(width, dim=-1), strict=True)
        )
        best[name] = sum(parts)[:, 0, 1:].argmax(dim=-1).tolist()
    tower.float()
    return best


@torch.no_grad()
def test_eq_3_can_be_read_without_heads(tiny_llava, draw):
    model = tiny_llava(mm_patch_merge_type="flat", image_aspect_ratio="pad")
    pixels = torch.randn(24, 3, 56, 56, generator=draw)
    expected = pivots_of_eq_3(model, pixels)
    assert expected["mean"] != expected["unsplit"]
    for heads, places in expected.items():
        for method in ("todre", "todre_v1"):
            model.set_pruner(method, retain_tokens=1, cls_heads=heads)
            model(input_ids=torch.tensor([[1, 5, -200, 7]] * 24), images=pixels)
            assert [int(stats.images[0].keep_idx) for stats in model.last_stats] == places


def test_methods_that_ignore_the_text_are_not_given_it(tiny_llava):
    """And those that ask get the embeddings of the text after the image."""
    given = []

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Recorder(Pruner):
        def select(self, tokens: VisualTokens, budget: int) -> Any:
            given.append(tokens)
            return selected(Random(), tokens, budget)

    class Reader(Recorder):
        needs = frozenset({"text_embeds"})

    model = tiny_llava()
    prompt = {
        "input_ids": torch.tensor([[1, 5, -200, 7, 8]]),
        "images": torch.randn(1, 5, 3, 56, 56),
        "image_sizes": [(112, 112)],
    }
    with torch.no_grad():
        for pruner in (Recorder(), Reader()):
            model.set_pruner(pruner)
            model(**prompt)
    assert given[0].text_embeds is None
    assert not given[0].vision and not given[1].vision
    assert torch.equal(given[1].text_embeds, model.get_input_embeddings().weight[[7, 8]])


# ---------------------------------------------------------------- Stage 2


def measured_view(kinds: list[int], to_visual: float, to_text: float) -> LayerView:
    """Return a view whose attention ratios are given."""

    @dataclasses.dataclass(frozen=True)
    class Measured(LayerView):
        def attention_ratios(self, text: Tensor) -> tuple[float, float]:
            self.measured["text"] = text.sum().item()
            return to_visual, to_text

    return layer_view(Measured, layer=28, kinds=torch.tensor(kinds, dtype=torch.int8))


KINDS = [SYSTEM] * 2 + [VISUAL] * 4 + [TEXT] * 3


@pytest.mark.parametrize(
    ("to_visual", "to_text", "withdraws"),
    [
        (0.09, 0.09, True),
        (0.09, 0.0, True),
        (0.10, 0.0, False),
        (0.0, 0.10, False),
        (0.09, 0.11, False),
        (0.11, 0.09, False),
        (0.0, 0.0, True),
    ],
)
def test_visual_tokens_leave_when_both_ratios_are_below_tau(to_visual, to_text, withdraws):
    keep = Todre(tau=0.10).at_layer(measured_view(KINDS, to_visual, to_text))
    assert (keep.tolist() == []) if withdraws else (keep is None)


def test_tau_zero_never_withdraws():
    assert Todre(tau=0.0).at_layer(measured_view(KINDS, 0.0, 0.0)) is None


@pytest.mark.parametrize(("text_set", "count"), [("after_image", 3), ("all", 5)])
def test_the_text_set_is_an_option(text_set, count):
    view = measured_view(KINDS, 0.0, 0.0)
    Todre(text_set=text_set).at_layer(view)
    assert view.measured["text"] == count


def test_without_visual_tokens_nothing_is_measured():
    view = measured_view([SYSTEM, SYSTEM, TEXT], 0.0, 0.0)
    assert Todre().at_layer(view) is None
    assert view.measured == {}


@pytest.mark.parametrize("text_set", ["after_image", "all"])
@pytest.mark.parametrize("kinds", [[SYSTEM, VISUAL], [SYSTEM, VISUAL, TEXT, VISUAL]])
def test_a_prompt_that_ends_with_an_image_keeps_it(kinds, text_set):
    """Its last token predicts the answer (and Eq. 8 has no value for an empty T)."""
    assert Todre(text_set=text_set).at_layer(measured_view(kinds, 0.0, 0.0)) is None


# ---------------------------------------------------------------- names and objects


def test_options_next_to_an_object_replace_its_own():
    assert resolve("todre", {"tau": 0.2}) == Todre(tau=0.2)
    assert resolve(Todre(retain_ratio=0.5), {"tau": 0.2}) == Todre(retain_ratio=0.5, tau=0.2)
    assert resolve(Todre(), {}) == Todre()
    with pytest.raises(TodreError, match="option of method 'Todre': 'tua' is unknown"):
        resolve(Todre(), {"tua": 0.2})
    with pytest.raises(TodreError, match="expected none next to the object, .* got tau"):
        resolve(create_pruner("random+todre"), {"tau": 0.2})
