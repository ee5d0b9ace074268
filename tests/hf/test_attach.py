"""Attaching and detaching: nothing before, nothing after, and calls that do not mix."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import GREEDY, Strides
from tiny import (
    BATCH,
    FAMILIES,
    ONE,
    QWEN,
    SMALL,
    USUAL_DECODER,
    VIDEO_BATCH,
    build,
    inputs_for,
    model_of,
)
from torch import Tensor, nn

import llava_todre.hf.attachment
from llava_todre import hf
from llava_todre.errors import TodreError
from llava_todre.hf.families import family_of
from llava_todre.pruners import Keep, LayerView, create_pruner

METHOD = Strides(retain_ratio=0.25, plan=((9, 3, 0), (8, 5, 2)))


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llava_next")


@pytest.fixture(scope="module")
def inputs(model: Any) -> dict[str, Any]:
    return inputs_for(model, BATCH)


def answer(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
    return model.generate(**inputs, **(GREEDY | options))


def snapshot(model: Any) -> dict[str, Any]:
    """Return all that attaching could leave on a model, but what each call of Qwen leaves there."""
    modules = {
        name: (
            id(module),
            type(module),
            {key: _flat(value) for key, value in vars(module).items() if key != "rope_deltas"},
        )
        for name, module in model.named_modules()
    }
    return {
        "modules": modules,
        "config": model.config.to_dict(),
        "generation_config": model.generation_config.to_dict(),
        "weights": {name: weight.clone() for name, weight in model.state_dict().items()},
    }


def _flat(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else id(value)


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    weights, others = before.pop("weights"), after.pop("weights")
    assert before == after
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())


# ---------------------------------------------------------------- off


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("method", "attention"), [("vanilla", "sdpa"), ("todre", "sdpa"), ("todre", "eager")]
)
def test_a_method_that_drops_nothing_changes_no_bit(family, method, attention, monkeypatch):
    model = model_of(family, attention)
    inputs = inputs_for(model, BATCH)
    options = {"output_logits": True, "return_dict_in_generate": True}
    untouched = answer(model, inputs, **options)
    monkeypatch.setattr(llava_todre.hf.attachment, "capture", None)
    knobs = {} if method == "vanilla" else {"retain_ratio": 1.0, "probe_depths": ()}
    with hf.prune(model, method, **knobs):
        off = answer(model, inputs, **options)
        stats = hf.last_stats(model)
    assert [len(of_sample.images) for of_sample in stats] == [1, 2, 0]
    assert all(of_sample.kept_tokens == of_sample.visual_tokens for of_sample in stats)
    for other in (off, answer(model, inputs, **options)):
        assert torch.equal(other.sequences, untouched.sequences)
        assert all(map(torch.equal, other.logits, untouched.logits))


def test_rows_that_unpadding_left_empty_stay_while_nothing_is_dropped(model):
    inputs = inputs_for(model, [[3, (2000, 57), 9]])
    with hf.prune(model, "todre", retain_ratio=1.0, tau=0.0):
        found = answer(model, inputs)
        stats = hf.last_stats(model)[0]
    assert stats.kept_tokens == 16 and stats.newline_tokens == 12
    assert torch.equal(found, answer(model, inputs))
    with hf.prune(model, "todre", retain_ratio=0.5):
        answer(model, inputs)
        assert hf.last_stats(model)[0].newline_tokens == 0


# ---------------------------------------------------------------- afterwards


@pytest.mark.parametrize(
    ("family", "method"),
    [
        *((family, METHOD) for family in FAMILIES),
        ("llava_next", "fastervlm"),
        ("llava_next", "visionzip"),
    ],
)
def test_nothing_is_left_after_detach(family, method):
    model = build(family)
    inputs = inputs_for(model, BATCH)
    untouched = answer(model, inputs)  # transformers installs hooks of its own once
    before = snapshot(model)
    hf.attach(model, method)
    answer(model, inputs)
    with pytest.raises(Exception, match="."):
        answer(model, inputs, logits_processor="broken")
    hf.detach(model)
    assert_same(before, snapshot(model))
    assert torch.equal(answer(model, inputs), untouched)


class Raising(Strides):
    """Fails inside the decoder."""

    def at_layer(self, view: LayerView) -> Keep | Tensor | None:
        raise KeyError(view.layer)


class RaisingFirst(Strides):
    """Fails before the decoder."""

    def select(self, *_: Any) -> Any:
        raise KeyError("select")


@pytest.mark.parametrize("method", [Raising, RaisingFirst])
def test_nothing_is_left_after_an_exception(model, inputs, method):
    before = snapshot(model)
    with pytest.raises(KeyError), hf.prune(model, method(retain_ratio=0.25, plan=((9, 3, 0),))):
        answer(model, inputs)
    assert_same(before, snapshot(model))


def test_nothing_is_left_when_a_layer_fails_that_is_listened_to(model, inputs):
    def fail(*_: Any) -> None:
        raise KeyError("mlp")

    before = snapshot(model)
    broken = model.model.language_model.layers[3].mlp.register_forward_hook(fail)
    with pytest.raises(KeyError), hf.prune(model, METHOD):
        answer(model, inputs)
    broken.remove()
    assert_same(before, snapshot(model))


def test_nothing_is_left_when_the_tower_fails(model, inputs):
    before = snapshot(model)
    broken = inputs | {"image_sizes": inputs["image_sizes"][:1]}
    with pytest.raises(Exception, match=r".+"), hf.prune(model, METHOD):
        answer(model, broken)
    assert_same(before, snapshot(model))


def test_a_generate_that_someone_else_put_there_comes_back(inputs):
    model = build("llava_next")
    asked = []

    def theirs(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs)
        return type(model).generate(model, *args, **kwargs)

    model.generate = theirs
    with hf.prune(model, METHOD):
        assert model.generate is not theirs
        answer(model, inputs)
    assert model.generate is theirs
    assert len(asked) == 1 and "pixel_values" not in asked[0]


# ---------------------------------------------------------------- several


def test_the_latest_of_two_methods_works_until_it_is_detached(model, inputs):
    alone = {}
    for ratio in (0.5, 0.1):
        with hf.prune(model, "divprune", retain_ratio=ratio):
            alone[ratio] = answer(model, inputs)
    with hf.prune(model, "divprune", retain_ratio=0.5):
        with hf.prune(model, "divprune", retain_ratio=0.1):
            assert torch.equal(answer(model, inputs), alone[0.1])
        assert torch.equal(answer(model, inputs), alone[0.5])
        assert hf.last_stats(model)[0].kept_tokens == 40
    assert "generate" not in vars(model)


def test_a_method_that_does_nothing_covers_one_that_does(model, inputs):
    untouched = answer(model, inputs)
    with hf.prune(model, METHOD), hf.prune(model, "vanilla"):
        assert torch.equal(answer(model, inputs), untouched)


def test_attaching_twice_needs_detaching_twice(model, inputs):
    untouched = answer(model, inputs)
    hf.attach(model, METHOD)
    hf.attach(model, METHOD)
    hf.detach(model)
    assert hf.last_stats(model) == ()
    answer(model, inputs)
    assert len(hf.last_stats(model)) == 3
    hf.detach(model)
    assert torch.equal(answer(model, inputs), untouched)
    with pytest.raises(TodreError, match="nothing is attached to this LlavaNext"):
        hf.detach(model)


def test_what_is_attached_within_a_block_outlives_it(model, inputs):
    with hf.prune(model, "random"):
        inner = hf.attach(model, METHOD)
    assert [each.pruner for each in vars(model)["_todre_attachments"]] == [inner]
    answer(model, inputs)
    assert len(hf.last_stats(model)) == 3
    hf.detach(model)
    assert "generate" not in vars(model)


def test_an_error_is_not_hidden_where_a_block_was_detached_before(model):
    with pytest.raises(KeyError, match="theirs"), hf.prune(model, METHOD):
        hf.detach(model)
        raise KeyError("theirs")
    assert "generate" not in vars(model)


def test_two_models_with_two_methods_take_turns(inputs):
    methods: list[tuple[Any, str, dict[str, Any]]] = [
        (model_of("llava_next"), "fastv", {"retain_ratio": 0.5}),
        (model_of("llava"), "todre", {"retain_ratio": 0.25, "tau": 1.0}),
    ]
    asked = [inputs_for(model, BATCH) for model, _, _ in methods]
    alone = []
    for (model, method, knobs), of_model in zip(methods, asked, strict=True):
        with hf.prune(model, method, **knobs):
            alone.append(answer(model, of_model))
    for model, method, knobs in methods:
        hf.attach(model, method, **knobs)
    for _ in range(2):
        for (model, _, _), of_model, expected in zip(methods, asked, alone, strict=True):
            assert torch.equal(answer(model, of_model), expected)
    for model, _, _ in methods:
        hf.detach(model)


def test_calls_do_not_depend_on_those_before(model, inputs):
    small = inputs_for(model, SMALL)
    with hf.prune(model, METHOD):
        first = answer(model, inputs)
        answer(model, small)
        assert torch.equal(answer(model, inputs), first)


def test_a_copy_of_an_attached_model_is_its_own(model, inputs):
    with hf.prune(model, METHOD):
        other = copy.deepcopy(model)
        expected = answer(model, inputs)
        assert torch.equal(answer(other, inputs), expected)
        with torch.no_grad():
            other.lm_head.weight.mul_(-1.0)
        assert not torch.equal(answer(other, inputs), expected)
        assert torch.equal(answer(model, inputs), expected)
    hf.detach(other)
    assert "generate" not in vars(other)


@pytest.mark.parametrize("family", FAMILIES)
def test_probes_hear_the_queries_that_layers_make_anyway(family):
    model = build(family)
    calls = [0] * 8

    def count(index: int) -> Any:
        def hook(*_: Any) -> None:
            calls[index] += 1

        return hook

    for index, layer in enumerate(model.model.language_model.layers):
        layer.self_attn.q_proj.register_forward_hook(count(index))
    with hf.prune(model, "todre", retain_ratio=0.25, probe_depths=(3 / 8, 5 / 8), tau=0.0):
        answer(model, inputs_for(model, BATCH), max_new_tokens=1)
        assert [len(stats.probes) for stats in hf.last_stats(model)] == [2, 2, 0]
    assert calls == [1] * 8


# ---------------------------------------------------------------- what is said


def test_the_return_type_stays(model, inputs):
    for options in ({}, {"return_dict_in_generate": True, "output_scores": True}):
        untouched = answer(model, inputs, **options)
        with hf.prune(model, METHOD):
            pruned = answer(model, inputs, **options)
        assert type(pruned) is type(untouched)
    assert pruned.sequences.shape == untouched.sequences.shape
    assert len(pruned.scores) == GREEDY["max_new_tokens"]


def test_statistics_are_those_of_the_last_call(model, inputs):
    with hf.prune(model, METHOD):
        assert hf.last_stats(model) == ()
        answer(model, inputs)
        assert [len(stats.images) for stats in hf.last_stats(model)] == [1, 2, 0]
        answer(model, inputs_for(model, SMALL))
        assert len(hf.last_stats(model)) == 1
        with pytest.raises(TodreError, match="prefill_chunk_size"):
            answer(model, inputs, prefill_chunk_size=8)
        assert hf.last_stats(model) == ()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: hf.attach(model, "todr"), "todre"),
        (lambda model: hf.attach(model, METHOD, tau=0.1), "option of method .*'tau' is unknown"),
        (lambda model: hf.attach(model, "downsample"), "needs resized, which models of the family"),
        (lambda model: hf.attach(None), "model must be one of Llava.*, got NoneType"),
        (lambda model: hf.attach(model, None), "a name or a method object, got None"),
        (lambda model: hf.attach(model, type(METHOD)), "must be a name or a method object, got"),
        (lambda model: hf.last_stats(None), "nothing is attached to this NoneType"),
        (lambda model: hf.attach(nn.Linear(1, 1)), "model must be one of Llava.*, got Linear"),
        (hf.detach, "nothing is attached"),
        (hf.last_stats, "nothing is attached"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(model, call: Callable[[Any], Any], message):
    before = snapshot(model)
    with pytest.raises(TodreError, match=message) as caught:
        call(model)
    assert "\n" not in str(caught.value)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_that_no_processor_makes_are_one_line(family):
    """Stated images must be shown: what the model's own code stumbles over is named, too."""
    model = build(family)
    inputs = inputs_for(model, ONE)
    whole = snapshot(model)
    described = [key for key in inputs if key not in ("input_ids", "attention_mask")]
    for key in described:
        value = inputs[key]
        wrong = [3, "ab", value[:0]]
        if key in ("image_sizes", "image_grid_thw"):
            wrong += [None, value.flatten()]
        elif family in QWEN:  # without pixels, the others take it for a prompt of text
            wrong.append(None)
        for each in wrong:
            with hf.prune(model, METHOD), pytest.raises(TodreError) as caught:
                answer(model, {**inputs, key: each})
            assert "\n" not in str(caught.value)
    assert_same(whole, snapshot(model))


def test_what_would_be_left_out_in_silence_is_refused(model, inputs):
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    plain = {key: value for key, value in inputs.items() if key != "input_ids"}
    with hf.prune(model, METHOD):
        with pytest.raises(TodreError, match="position_ids is not supported together"):
            answer(model, inputs, position_ids=inputs["attention_mask"].cumsum(1))
        with pytest.raises(TodreError, match="inputs_embeds is not supported together"):
            answer(model, plain, inputs_embeds=embeds)
    untouched = answer(model, plain, inputs_embeds=embeds)
    with hf.prune(model, "vanilla"):
        assert torch.equal(answer(model, plain, inputs_embeds=embeds), untouched)


def test_flex_attention_is_refused_inside_the_decoder(model, inputs, monkeypatch):
    config = model.model.language_model.config
    monkeypatch.setattr(config, "_attn_implementation_internal", "flex_attention")
    with (
        hf.prune(model, METHOD),
        pytest.raises(TodreError, match="must be eager.*, got flex_attention"),
    ):
        answer(model, inputs)


@pytest.mark.parametrize(
    ("family", "other"),
    [("llava", "full"), ("llava_next", "full"), ("llava_onevision", "default")],
)
def test_a_tower_whose_tokens_are_used_in_another_way_is_refused(family, other):
    model = build(family)
    inputs = inputs_for(model, ONE)
    model.config.vision_feature_select_strategy = other
    with (
        pytest.raises(TodreError, match=f"select_strategy must be .*, got {other}"),
        hf.prune(model, METHOD),
    ):
        answer(model, inputs)


def test_a_layer_that_the_tower_lacks_is_refused(model, inputs):
    with (
        pytest.raises(TodreError, match=r"vision layer of .* must be from -4 to 3, .* got 4"),
        hf.prune(model, "fastervlm", cls_layer=4),
    ):
        answer(model, inputs)


def test_attach_returns_the_method(model):
    pruner = hf.attach(model, "todre", retain_ratio=0.3)
    hf.detach(model)
    assert pruner == create_pruner("todre", retain_ratio=0.3)


def test_a_model_that_accelerate_dispatches(inputs):
    accelerate = pytest.importorskip("accelerate")
    model = build("llava_next")
    expected = {}
    with hf.prune(model, METHOD):
        expected = answer(model, inputs)
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    before = snapshot(model)
    with hf.prune(model, METHOD):
        assert torch.equal(answer(model, inputs), expected)
    assert_same(before, snapshot(model))


def test_an_argument_given_twice_or_a_mask_of_another_shape_is_refused():
    model = model_of("llava_next")
    inputs = inputs_for(model, ONE)
    ids = inputs.pop("input_ids")
    with hf.prune(model, "random", retain_ratio=0.5):
        with pytest.raises(TypeError, match="generation_config"):
            model.generate(ids, model.generation_config, generation_config=None, **inputs)
        inputs["attention_mask"] = torch.ones(1, 1, *ids.shape)
        with pytest.raises(TodreError, match=r"attention_mask \(1, 1, .* does not fit input_ids"):
            model.generate(ids, **inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_pruned_is_withheld_from_the_models_own_generate(family):
    model = build(family, USUAL_DECODER.get(family))
    reads_video = any("video" in key for key in family_of(model).inputs)
    inputs = inputs_for(model, VIDEO_BATCH if reads_video else BATCH)
    seen: dict[str, Any] = {}
    own = model.generate

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.update(kwargs)
        return own(*args, **kwargs)

    model.generate = spy
    with hf.prune(model, METHOD):
        answer(model, inputs)
    assert len(inputs) > 2 and seen.keys() & inputs.keys() == {"input_ids", "attention_mask"}
