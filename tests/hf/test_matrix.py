"""Every cell of the tables in ``docs/models.md``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from checks import (
    ANY,
    PROBES,
    Strides,
    assert_equals_oracle,
    assert_follows,
    emulated_flash,
    planned,
    run,
    tau_between,
)
from oracle import Oracle, stages_of
from tiny import (
    BATCH,
    ONE,
    TWO_IMAGES,
    USUAL_DECODER,
    VIDEO,
    VIDEO_BATCH,
    Sample,
    build,
    inputs_for,
    model_of,
    with_ids,
)
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from eval.pages.models import (
    ABSENT,
    FEATURES,
    MATRIX,
    PAGE,
    REFUSED,
    YES,
    drops_too_early,
    missing_needs,
    render,
)
from llava_todre import hf
from llava_todre.errors import TodreError
from llava_todre.hf.families import FAMILIES, family_of
from llava_todre.pruners import PRUNERS

STEPS = 6
"""More of them, of every family, are in ``test_equality``."""
GREEDY = {"max_new_tokens": STEPS, "do_sample": False}
Check = Callable[[str], None]
CHECKS: dict[str, Check] = {}
REFUSALS: set[str] = set()
STAGE_1 = Strides(retain_ratio=0.25)
STAGE_2 = Strides(retain_ratio=0.25, plan=((ANY, 3, 0),))


def check(feature: str) -> Callable[[Check], Check]:
    def register(function: Check) -> Check:
        CHECKS[feature] = function
        return function

    return register


def refusal(feature: str) -> Callable[[Check], Check]:
    REFUSALS.add(feature)
    return check(feature)


CELLS = [
    (family, feature)
    for family, features in MATRIX.items()
    for feature, word in features.items()
    if word != ABSENT
]


@pytest.mark.parametrize(("family", "feature"), CELLS)
def test_feature(family, feature):
    CHECKS[feature](family)


def test_every_cell_has_a_check_that_says_the_same():
    assert set(CHECKS) == set(FEATURES)
    assert tuple(MATRIX) == tuple(family.name for family in FAMILIES) == tiny.FAMILIES
    for features in MATRIX.values():
        assert set(features) == set(FEATURES)
        for feature, word in features.items():
            assert word in (ABSENT, REFUSED if feature in REFUSALS else YES)


def test_what_is_absent_is_no_part_of_the_model():
    absent = [
        (family, feature)
        for family, features in MATRIX.items()
        for feature, word in features.items()
        if word == ABSENT
    ]
    for family, feature in absent:
        if feature == "video":
            assert not hasattr(model_of(family).model, "get_video_features")
        else:
            assert feature.startswith("sliding window")
            assert not hasattr(model_of(family).config.text_config, "sliding_window")


def test_the_page_is_current():
    assert PAGE.read_text() == render()


def assert_right(
    family: str, samples: list[Sample], *plan: tuple[int, int, int], side: str = "left"
) -> None:
    """Compare greedy answers with the oracle.

    Args:
        family: whose model.
        samples: the batch.
        plan: (sample, layer, stride), see ``checks.planned``.
        side: of the padding.
    """
    model = model_of(family)
    inputs = inputs_for(model, samples, side)
    assert_follows(model, inputs, planned(inputs, 0.25, *plan), STEPS)


def greedy(model: Any, inputs: dict[str, Any], method: Strides, **options: Any) -> Any:
    with hf.prune(model, method):
        return model.generate(**inputs, **(GREEDY | options))


# ---------------------------------------------------------------- prompts


@check("one image")
def one_image(family: str) -> None:
    assert_right(family, ONE, (0, 3, 0))


@check("several images")
def several_images(family: str) -> None:
    assert_right(family, TWO_IMAGES, (0, 2, 0))


@check("video")
def video(family: str) -> None:
    assert_right(family, VIDEO, (0, 3, 0))
    assert_right(family, VIDEO_BATCH, (1, 3, 0))


@check("padded batch, some samples without image")
def padded(family: str) -> None:
    assert_right(family, BATCH, (0, 3, 0), (1, 5, 0))


@check("right-padded batch, no attention mask")
def no_mask(family: str) -> None:
    assert_right(family, BATCH, (0, 3, 0), (1, 5, 0), side="right")
    model = model_of(family)
    inputs = inputs_for(model, BATCH)
    method = planned(inputs, 0.25, (0, 3, 0), (1, 5, 0))
    expected = greedy(model, inputs, method)
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
    assert not bool(mask.all())
    with hf.prune(model, method):
        assert torch.equal(model.generate(ids, **inputs, **GREEDY), expected)


@check("prompts of text only")
def text_only(family: str) -> None:
    model = model_of(family)
    inputs = inputs_for(model, [[7], [4]])
    untouched = model.generate(**inputs, **GREEDY)
    with hf.prune(model, STAGE_2):
        assert torch.equal(model.generate(**inputs, **GREEDY), untouched)
        stats = hf.last_stats(model)
    assert [of_sample.text_tokens for of_sample in stats] == [8, 5]
    assert not any(of_sample.images for of_sample in stats)


@check("conversation given again")
def conversation(family: str) -> None:
    model = model_of(family)
    inputs = inputs_for(model, ONE)
    first = greedy(model, inputs, STAGE_2)
    longer = with_ids(model, inputs, torch.cat([first, torch.tensor([[7, 8]])], dim=1))
    assert longer["input_ids"].shape[1] == inputs["input_ids"].shape[1] + STEPS + 2
    assert_follows(model, longer, planned(longer, 0.25, (0, 4, 0)), STEPS)


# ---------------------------------------------------------------- what a method does


@check("pruning before the decoder")
def before(family: str) -> None:
    assert_right(family, BATCH)


@check("withdrawal inside the decoder")
def withdrawal(family: str) -> None:
    model = model_of(family)
    inputs, tau = inputs_for(model, ONE), tau_between(model, ONE, 0.25)
    knobs = {"retain_ratio": 0.25, "probe_depths": PROBES, "tau": tau}
    output, stats = run(model, inputs, "todre", STEPS, **knobs)
    assert stats[0].withdrawn_from is not None
    assert_equals_oracle(model, inputs, output, [stages_of(stats[0])])


@check("dropping a part inside the decoder")
def part(family: str) -> None:
    assert_right(family, ONE, (0, 2, 2), (0, 4, 3))


@check("masks for FlashAttention (emulated)")
def flash(family: str) -> None:
    model = model_of(family)
    with emulated_flash(model) as calls:
        assert_right(family, BATCH, (0, 3, 0), (1, 2, 2))
    assert len(calls) == STEPS * 8
    with emulated_flash(model):  # no padding, and so no mask, until the samples differ
        assert_right(family, [*ONE, [4, (112, 100), 8]], (0, 3, 0))


# ---------------------------------------------------------------- how it generates


@check("sampling")
def sampling(family: str) -> None:
    model = model_of(family)
    inputs = inputs_for(model, ONE)

    def sample(seed: int, **options: Any) -> Tensor:
        torch.manual_seed(seed)
        return greedy(model, inputs, STAGE_2, do_sample=True, **options)

    assert torch.equal(sample(0), sample(0))
    assert not torch.equal(sample(0), sample(1))
    assert torch.equal(sample(0, top_k=1), greedy(model, inputs, STAGE_2))


@check("beam search")
def beams(family: str) -> None:
    model = model_of(family)
    inputs = inputs_for(model, [[5, 7], *ONE])
    with hf.prune(model, STAGE_2):
        found = model.generate(**inputs, num_beams=3, max_new_tokens=4, do_sample=False)
        stats = hf.last_stats(model)
    oracle = Oracle(model, inputs)
    for row, stages in enumerate([[(0, [])], STAGE_2.stages(stats[1], ANY)]):
        decoder, embeds, present = oracle.pruned(row, stages)
        expected = decoder.beams(embeds, 4, 3, present)
        assert found[row, inputs["input_ids"].shape[1] :].tolist() == expected
    assert stats[1].withdrawn_from == 4 and stats[0].images == ()


@check("several answers per prompt")
def several_answers(family: str) -> None:
    model = model_of(family)
    inputs = inputs_for(model, [*ONE, [5, 7]])
    length = inputs["input_ids"].shape[1]
    beams = {"num_beams": 3, "max_new_tokens": 4}
    best = greedy(model, inputs, STAGE_2, **beams)
    pairs = greedy(model, inputs, STAGE_2, num_return_sequences=2, **beams)
    assert torch.equal(pairs[::2], best)
    assert not torch.equal(pairs[1::2], best)
    torch.manual_seed(0)
    drawn = greedy(model, inputs, STAGE_2, num_return_sequences=3, do_sample=True)
    prompts = inputs["input_ids"].repeat_interleave(3, dim=0)
    assert torch.equal(drawn[:, :length], prompts)
    assert len({tuple(row.tolist()) for row in drawn[:3]}) > 1


@check("end of sequence at different steps")
def ends(family: str) -> None:
    model = model_of(family)
    inputs = inputs_for(model, [*ONE, [5, 7]])
    length = inputs["input_ids"].shape[1]
    expected = greedy(model, inputs, STAGE_2)
    end = next(token for token in expected[0, length:] if token not in expected[1, length:])
    place = int((expected[0, length:] == end).nonzero()[0])
    expected[0, length + place + 1 :] = 0
    assert torch.equal(greedy(model, inputs, STAGE_2, eos_token_id=int(end)), expected)


@check("repetition penalty")
def penalty(family: str) -> None:
    model = model_of(family)
    inputs = inputs_for(model, ONE)
    length = inputs["input_ids"].shape[1]
    steps = {"max_new_tokens": 16}
    found = greedy(model, inputs, STAGE_2, repetition_penalty=1.8, **steps)
    assert not torch.equal(found, greedy(model, inputs, STAGE_2, **steps))
    _, stats = run(model, inputs, STAGE_2, 1)
    decoder, embeds, present = Oracle(model, inputs).pruned(0, STAGE_2.stages(stats[0], ANY))
    said = set(inputs["input_ids"][0].tolist())
    for token in found[0, length:].tolist():
        logits = decoder.run(embeds, present).logits[-1]
        again = torch.tensor(sorted(said))
        logits[again] = torch.where(logits > 0, logits / 1.8, logits * 1.8)[again]
        assert token == int(logits.argmax())
        said.add(token)
        embeds, present = decoder.extend(embeds, present, token)


@check("max_length, min_length")
def lengths(family: str) -> None:
    model = model_of(family)
    inputs = inputs_for(model, ONE)
    length = inputs["input_ids"].shape[1]
    expected = greedy(model, inputs, STAGE_2)
    end = int(expected[0, length + 2])
    late = greedy(model, inputs, STAGE_2, eos_token_id=end, min_new_tokens=4)
    assert late.shape[1] > length + 4

    def again(**options: Any) -> Tensor:
        with hf.prune(model, STAGE_2):
            return model.generate(**inputs, **options)

    assert torch.equal(again(max_length=length + 3), expected[:, : length + 3])
    config = GenerationConfig(max_length=length + 3, pad_token_id=0, do_sample=False)
    assert torch.equal(again(generation_config=config), expected[:, : length + 3])
    limits = {"max_length": length + STEPS, "min_length": length + 4, "eos_token_id": end}
    assert torch.equal(again(**limits), late)
    with pytest.raises(ValueError, match="max_length"):
        again(max_length=length)


@check("streamer")
def streamer(family: str) -> None:
    model = model_of(family)
    inputs = inputs_for(model, ONE)
    heard: list[Any] = []

    class Ear:
        def put(self, tokens: Tensor) -> None:
            heard.append(tokens)

        def end(self) -> None:
            heard.append("end")

    expected = greedy(model, inputs, STAGE_2, streamer=Ear())
    assert torch.equal(heard[0], inputs["input_ids"])
    assert heard.pop() == "end"
    assert torch.cat([tokens.flatten() for tokens in heard]).tolist() == expected[0].tolist()


@check("output_hidden_states")
def hidden_states(family: str) -> None:
    model = model_of(family)
    output = greedy(
        model,
        inputs_for(model, ONE),
        STAGE_2,
        output_hidden_states=True,
        return_dict_in_generate=True,
    )
    with hf.prune(model, STAGE_2):
        model.generate(**inputs_for(model, ONE), **GREEDY)
        held = hf.last_stats(model)[0].prompt_tokens_per_layer
    # The last one is behind the norm; a layer's input is counted before tokens leave it.
    lengths = [states.shape[1] for states in output.hidden_states[0]]
    assert lengths == [held[0], *held]


@check("bfloat16")
def bfloat16(family: str) -> None:
    model = build(family, USUAL_DECODER.get(family)).bfloat16()
    inputs = inputs_for(model, ONE)
    knobs = {"retain_ratio": 0.25, "probe_depths": PROBES, "tau": 1.0}
    output, stats = run(model, inputs, "todre", STEPS, **knobs)
    assert output.sequences.shape[1] == inputs["input_ids"].shape[1] + STEPS
    assert stats[0].withdrawn_from == 4


# ---------------------------------------------------------------- works for one stage only


@check("use_cache=False, before the decoder only")
def no_cache(family: str) -> None:
    model = model_of(family)
    inputs = inputs_for(model, BATCH)
    expected = greedy(model, inputs, STAGE_1)
    assert torch.equal(greedy(model, inputs, STAGE_1, use_cache=False), expected)


@check("static cache, before the decoder only")
def static_cache(family: str) -> None:
    model = model_of(family)
    inputs = inputs_for(model, BATCH)
    expected = greedy(model, inputs, STAGE_1)
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(greedy(model, inputs, STAGE_1, **static), expected)


def with_window(family: str) -> Any:
    if USUAL_DECODER.get(family) in ("llama", "mistral"):
        return build(family, "mistral", sliding_window=90)
    options = {"use_sliding_window": True, "max_window_layers": 4}
    return build(family, USUAL_DECODER.get(family), sliding_window=90, **options)


@check("sliding window, before the decoder only")
def window(family: str) -> None:
    model = with_window(family)
    assert any(DynamicCache(config=model.model.language_model.config).is_sliding)
    # The pruned prompt fits the window.
    assert_follows(model, inputs_for(model, ONE), STAGE_1, STEPS)


def assert_refused(
    family: str, match: str, method: Strides = STAGE_2, model: Any = None, **options: Any
) -> None:
    model = model or model_of(family)
    with pytest.raises(TodreError, match=match) as caught:
        greedy(model, inputs_for(model, ONE), method, **options)
    assert "\n" not in str(caught.value)


@refusal("use_cache=False, inside the decoder")
def no_cache_inside(family: str) -> None:
    assert_refused(family, "use_cache must be True", use_cache=False)
    assert_refused(
        family, "use_cache must be True", generation_config=GenerationConfig(use_cache=False)
    )


@refusal("static cache, inside the decoder")
def static_cache_inside(family: str) -> None:
    assert_refused(family, "cache_implementation", cache_implementation="static")


@refusal("sliding window, inside the decoder")
def window_inside(family: str) -> None:
    assert_refused(family, "sliding_window", model=with_window(family))


@refusal("past_key_values")
def given_cache(family: str) -> None:
    model = model_of(family)
    for method in (STAGE_1, STAGE_2):
        assert_refused(family, "past_key_values", method, past_key_values=DynamicCache())
        inputs = inputs_for(model, [[7]])
        with pytest.raises(TodreError, match="past_key_values"):
            greedy(model, inputs, method, past_key_values=DynamicCache())


@refusal("assisted decoding, prompt lookup")
def assisted(family: str) -> None:
    for method in (STAGE_1, STAGE_2):
        assert_refused(family, "prompt_lookup_num_tokens", method, prompt_lookup_num_tokens=3)
        assert_refused(family, "assistant_model", method, assistant_model=model_of(family))


@refusal("chunked prefill")
def chunked(family: str) -> None:
    for method in (STAGE_1, STAGE_2):
        assert_refused(family, "prefill_chunk_size", method, prefill_chunk_size=16)


@refusal("training mode")
def training(family: str) -> None:
    model = build(family, USUAL_DECODER.get(family)).train()
    assert_refused(family, "training mode", STAGE_1, model)


# ---------------------------------------------------------------- methods


@pytest.mark.parametrize("method", PRUNERS)
@pytest.mark.parametrize("family", MATRIX)
def test_a_method_runs_or_says_what_it_lacks(family, method):
    model = model_of(family)
    reasons = [f"needs {need}," for need in missing_needs(family_of(model), method)]
    if not reasons and drops_too_early(method, 8, family_of(model).deep_layers(model)):
        reasons = ["adds image features to them up to layer 1"]
    if reasons:
        with pytest.raises(TodreError, match="|".join(reasons)) as caught:
            hf.attach(model, method)
        assert "\n" not in str(caught.value)
        return
    inputs = inputs_for(model, BATCH)
    with hf.prune(model, method, **({} if method == "vanilla" else {"retain_ratio": 0.5})):
        answer = model.generate(**inputs, max_new_tokens=1, do_sample=False)
        stats = hf.last_stats(model)
    assert answer.shape[1] == inputs["input_ids"].shape[1] + 1
    if method != "vanilla":
        fewer = [sum(s.visual_tokens_per_layer) < 8 * s.visual_tokens for s in stats[:2]]
        assert all(fewer) or method in ("todre", "todre_v1")
