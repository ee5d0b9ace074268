"""What every method promises: options, budgets, half precision, finite input, no side effects."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import selected, visual_tokens
from layer_views import LLAVA_15, make_case

from llava_todre.errors import TodreError
from llava_todre.pruners import PRUNERS, Keep, Pruner, create_pruner
from llava_todre.pruners.method_file import method_yaml
from llava_todre.pruners.options import Option, options_of
from llava_todre.spans import VisualTokens

CONFIGS = Path(__file__).parents[2] / "configs" / "methods"
BEFORE = [name for name in PRUNERS if create_pruner(name).selects]
STAGED = ["fastv", "dart", "pyramiddrop", "sparsevlm", "sparsevlm_plus"]
SHAPES: list[dict[str, Any]] = [
    {"side": 12},
    {"grid": (2, 2), "side": 6, "padding": 2},
    {"frames": 5, "side": 6},
]
CHECKED = [
    *((name, "features") for name in ("todre", "divprune", "trimtokenator", "cdpruner", "holov")),
    *((name, "vision_features") for name in ("visionzip", "vispruner", "prumerge")),
    *(("pooling", "features"), ("visionzip", ("keys", -2)), ("prumerge", ("keys", -1))),
]
"""Methods that compare or merge, and what."""


def tokens_of(**shape: Any) -> VisualTokens:
    """Return tokens with what HiPrune's default depth names, too."""
    tokens = visual_tokens(**shape)
    vision = {**tokens.vision, ("received_attention", 0.35): tokens.vision["received_attention", 8]}
    return dataclasses.replace(tokens, vision=vision)


def as_float(tokens: VisualTokens) -> VisualTokens:
    """Return the same values in single precision."""
    names = ("features", "vision_features", "cls_features", "text_embeds")
    return dataclasses.replace(tokens, **{name: getattr(tokens, name).float() for name in names})


# ---------------------------------------------------------------- options


def bad_values(option: Option) -> list[Any]:
    """Return values on every wrong side of what is declared."""
    wrong: list[Any] = [float("nan"), {}, *(() if option.optional else (None,))]
    if option.choices:
        return [*wrong, 1, option.choices[0] + "s"]
    if option.kind is bool:
        return [*wrong, 1, "true"]
    outside = [] if option.above is None else [option.above]
    outside += [] if option.low is None else [option.low - 1]
    outside += [] if option.below is None else [option.below]
    outside += [] if option.high is None else [option.high + 1]
    if option.kind is tuple:
        return [*wrong, 0.5, "0.5", ("x",), (True,), *((each,) for each in outside)]
    return [*wrong, "1", True, *outside, *([1.5] if option.kind is int else [])]


BAD = [
    (name, key, value)
    for name, method in PRUNERS.items()
    if name != "vanilla"  # it refuses any budget, see test_pruners
    for key, option in options_of(method).items()
    for value in bad_values(option)
]


@pytest.mark.parametrize(("name", "key", "value"), BAD)
def test_a_bad_option_is_named_with_what_is_allowed(name: str, key: str, value: Any) -> None:
    with pytest.raises(TodreError) as caught:
        create_pruner(name, **{key: value})
    message = str(caught.value)
    assert key in message and "\n" not in message
    assert repr(value) in message or repr(list(value)) in message


@pytest.mark.parametrize("name", PRUNERS)
def test_every_option_is_declared_and_its_default_allowed(name: str) -> None:
    declared = options_of(PRUNERS[name])
    assert set(declared) == {field.name for field in dataclasses.fields(PRUNERS[name])}
    for key, option in declared.items():
        assert option.help.endswith(".") and "\n" not in option.help
        option.check(key, getattr(create_pruner(name), key))


@pytest.mark.parametrize("name", PRUNERS)
def test_the_method_file_is_made_from_the_options(name: str) -> None:
    made = method_yaml(name)
    assert (CONFIGS / f"{name}.yaml").read_text() == made, "run `make docs`"
    assert all(len(line) <= 100 for line in made.splitlines())


# ---------------------------------------------------------------- Stage 1


@pytest.mark.parametrize(
    ("name", "options", "needs"),
    [
        ("divprune", {}, set()),
        ("cdpruner", {}, {"text_embeds"}),
        ("cdpruner", {"relevance": "clip"}, {"clip_similarity"}),
        ("cdpruner", {"relevance": "none"}, set()),
        ("trimtokenator", {}, {"text_embeds"}),
        ("vispruner", {}, {("cls_attention", -2), "vision_features"}),
        ("vispruner", {"cls_layer": -1}, {("cls_attention", -1), "vision_features"}),
        ("visionzip", {}, {("cls_attention", -2), ("keys", -2), "vision_features"}),
        ("visionzip", {"cls_layer": -3}, {("cls_attention", -3), ("keys", -3), "vision_features"}),
        ("prumerge", {}, {("cls_attention_unsplit", -1), ("keys", -1), "vision_features"}),
        ("prumerge_plus", {}, {("cls_attention_unsplit", -1), ("keys", -1), "vision_features"}),
        ("fastervlm", {}, {("cls_attention", -2)}),
        ("fastervlm", {"cls_layer": -1}, {("cls_attention", -1)}),
        ("holov", {}, {("cls_attention", -2)}),
        ("globalcom2", {}, {("cls_logits", -1)}),
        ("globalcom2", {"cls_layer": -2}, {("cls_logits", -2)}),
        ("hiprune", {}, {("received_attention", 0.35), ("received_attention", -2)}),
        (
            "hiprune",
            {"object_depth": 0.1, "register_layer": -1},
            {("received_attention", 0.1), ("received_attention", -1)},
        ),
        ("downsample", {}, {"resized"}),
        *((name, {}, set()) for name in STAGED),
    ],
)
def test_needs_follow_the_options(name: str, options: dict[str, Any], needs: set) -> None:
    assert create_pruner(name, **options).needs == needs


@pytest.mark.parametrize("shape", SHAPES, ids=["image", "unpadded", "video"])
@pytest.mark.parametrize("name", BEFORE)
def test_every_budget_is_met_and_nothing_it_reads_is_changed(name: str, shape: dict) -> None:
    tokens = tokens_of(**shape)
    before = copy.deepcopy({key: value for key, value in vars(tokens).items() if key != "project"})
    for count in (1, 2, 37, len(tokens) - 1):
        (kept,) = create_pruner(name, retain_tokens=count).keep([tokens])  # it checks the count
        assert kept.indices.dtype == torch.int64 and bool((kept.indices.diff() > 0).all())
        assert kept.features is None or bool(kept.features.isfinite().all())
        again = create_pruner(name, retain_tokens=count).keep([tokens])[0]
        assert torch.equal(again.indices, kept.indices)
    for key, value in before.items():
        now = getattr(tokens, key)
        if isinstance(value, torch.Tensor):
            assert torch.equal(now, value), key
    assert all(torch.equal(tokens.vision[key], value) for key, value in before["vision"].items())


@pytest.mark.parametrize("name", BEFORE)
def test_half_precision_is_compared_in_float32(name: str) -> None:
    """Merged features are rounded once, at the end, and projected in the dtype of the model."""
    tokens = tokens_of(grid=(2, 1), side=8, dtype=torch.bfloat16)
    tokens = dataclasses.replace(tokens, project=lambda states: states)
    pruner = create_pruner(name)
    (kept,), (expected,) = pruner.keep([tokens]), pruner.keep([as_float(tokens)])
    assert torch.equal(kept.indices, expected.indices)
    if expected.features is not None:
        assert kept.features is not None and kept.features.dtype == torch.bfloat16
        assert torch.equal(kept.features, expected.features.bfloat16())


@pytest.mark.parametrize("name", ["visionzip", "prumerge", "prumerge_plus"])
def test_all_views_are_projected_at_once(name: str) -> None:
    tokens = tokens_of(grid=(2, 2), side=12)
    given = []

    def project(states: torch.Tensor) -> torch.Tensor:
        given.append(states.shape)
        return tokens["project"](states)

    selected(create_pruner(name), dataclasses.replace(tokens, project=project), 72)
    assert given == [(72, 48)]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize(("name", "what"), CHECKED)
def test_a_value_that_is_not_finite_is_an_error(name: str, what: Any, bad: float) -> None:
    tokens = tokens_of(side=6)
    read = tokens.features if what == "features" else tokens[what]
    read.view(36, -1)[3, 5] = bad
    with pytest.raises(TodreError, match="1 of 36 visual tokens"):
        selected(create_pruner(name), tokens, 4)


@pytest.mark.parametrize("name", BEFORE)
def test_what_is_read_without_being_needed_is_named(name: str) -> None:
    tokens = tokens_of(side=6)
    pruner = create_pruner(name)
    bare = VisualTokens(tokens.features, tokens.view, tokens.row, tokens.column)
    if not pruner.needs:
        assert len(selected(pruner, bare, 9).indices)
        return
    with pytest.raises(TodreError, match="was not computed; add .* to the needs") as caught:
        selected(pruner, bare, 9)
    assert any(str(need) in str(caught.value) for need in pruner.needs)


# ---------------------------------------------------------------- what a hook may return


class Wrong(Pruner):
    """Returns what it is given."""

    def select(self, tokens: VisualTokens, num_keep: int) -> Any:
        return WRONG[self.retain_ratio][0]


WRONG = {
    0.11: ([0, 1, 2, 3], r"must return \(K,\) int64 indices, got list"),
    0.12: (torch.ones(36, dtype=torch.bool), r"indices, got torch.bool \(36,\)"),
    0.13: (torch.tensor([0, 36, 2, 3, 4]), "indices from 0 to 35, got 0 to 36"),
    0.14: (torch.tensor([-1, 1, 2, 3, 4]), "indices from 0 to 35, got -1 to 4"),
    0.15: (torch.tensor([4, 1, 4, 3, 2]), "each index once, got 4 twice"),
    0.16: (torch.tensor([0, 1, 2]), "must keep 6 of 36 tokens, got 3"),
    0.17: (Keep(torch.arange(6), torch.zeros(5, 64)), "for its 6 indices, got 5"),
}


@pytest.mark.parametrize("ratio", WRONG)
def test_what_a_hook_returns_is_checked(ratio: float) -> None:
    with pytest.raises(TodreError, match=f"Wrong.select .*{WRONG[ratio][1]}"):
        Wrong(retain_ratio=ratio).keep([visual_tokens(side=6)])


def test_features_follow_the_order_of_their_indices() -> None:
    features = torch.arange(3.0)[:, None]
    kept = Keep.checked(Keep(torch.tensor([7, 2, 5]), features), "hook", 9)
    assert kept.indices.tolist() == [2, 5, 7]
    assert kept.features is not None and kept.features[:, 0].tolist() == [1, 2, 0]


# ---------------------------------------------------------------- Stage 2


@pytest.mark.parametrize("name", STAGED)
def test_inside_the_decoder_half_precision_is_compared_in_float32(name: str) -> None:
    layer = create_pruner(name).probe_layers(32)[-1]
    view = make_case(LLAVA_15, layer=layer).view

    def case(turn: Any) -> Any:
        return make_case(
            LLAVA_15,
            layer=layer,
            queries=lambda rows: turn(view.queries(rows).bfloat16()),
            keys=lambda: turn(view.keys().bfloat16()),
            hidden=turn(view.hidden_states().bfloat16()),
            prompt_embeds=lambda: turn(view.prompt.embeds().bfloat16()),
        ).view

    half, single = (
        Keep.checked(create_pruner(name, retain_ratio=0.1).at_layer(one), name, len(LLAVA_15))
        for one in (case(lambda states: states), case(lambda states: states.float()))
    )
    assert torch.equal(half.indices, single.indices)
    assert half.features is None or half.features.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["dart", "sparsevlm"])
def test_inside_the_decoder_states_must_be_finite(name: str) -> None:
    hidden = torch.zeros(len(LLAVA_15), 64)
    hidden[35 : 35 + 576] = torch.nan
    layer = create_pruner(name).probe_layers(32)[0]
    with pytest.raises(TodreError, match="NaN or Inf"):
        create_pruner(name).at_layer(make_case(LLAVA_15, layer=layer, hidden=hidden).view)
