"""Pruned, a stock model answers like a slow decoder that reads only the tokens that stay."""

from __future__ import annotations

import pytest
import torch
from checks import (
    GREEDY,
    PROBES,
    assert_equals_oracle,
    assert_follows,
    assert_stats_tell_what_was_kept,
    planned,
    run,
    tau_between,
    text_behind,
)
from oracle import Oracle, stages_of
from tiny import (
    BATCH,
    DECODERS,
    FAMILIES,
    ONE,
    QWEN,
    THREE,
    TWO_IMAGES,
    USUAL_DECODER,
    VIDEO,
    VIDEO_BATCH,
    inputs_for,
    model_of,
)

from eval.pages.models import MATRIX, YES
from llava_todre import hf

PROMPTS = {"one": ONE, "batch": THREE, "video": VIDEO, "videos and images": VIDEO_BATCH}
CASES = [
    (family, prompt)
    for family in FAMILIES
    for prompt in PROMPTS
    if "video" not in prompt or MATRIX[family]["video"] == YES
]


@pytest.mark.parametrize(("attention", "ratio"), [("sdpa", 0.25), ("eager", 0.1)])
@pytest.mark.parametrize(("family", "prompt"), CASES)
def test_both_stages(family, prompt, attention, ratio):
    """Every family, 16 cached steps, alone and three of different lengths, sdpa and eager."""
    samples = PROMPTS[prompt]
    model = model_of(family, attention)
    inputs = inputs_for(model, samples)
    assert len(samples) in (1, 3)
    assert len(samples) == 1 or len(inputs["attention_mask"].sum(dim=1).unique()) == 3
    assert (inputs["attention_mask"][:, -1] == 1).all(), "padding is on the left"
    tau = tau_between(model, samples, ratio)
    knobs = {"retain_ratio": ratio, "probe_depths": PROBES, "tau": tau}
    output, stats = run(model, inputs, "todre", steps=16, **knobs)
    stages = [stages_of(of_sample) for of_sample in stats]
    assert any(len(of_sample) > 1 for of_sample in stages), "something is withdrawn"
    assert_equals_oracle(model, inputs, output, stages)
    oracle = Oracle(model, inputs)
    for row, of_sample in enumerate(stats):
        for image in of_sample.images:
            assert len(image.keep_idx) == max(1, int(ratio * image.num_tokens + 0.5))
        assert_stats_tell_what_was_kept(of_sample, stages[row], oracle, row)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_dropped_matters(family):
    """Else the comparison above would prove nothing."""
    model = model_of(family)
    inputs = inputs_for(model, THREE)
    unpruned = model.generate(**inputs, **GREEDY)
    with hf.prune(model, "todre", retain_ratio=0.25, probe_depths=()):
        pruned = model.generate(**inputs, **GREEDY)
    assert sum(torch.equal(*rows) for rows in zip(unpruned, pruned, strict=True)) < 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_probe_that_drops_nothing_changes_no_token(family):
    """The prompt then goes through the capture with all its tokens, positions and features."""
    model = model_of(family)
    inputs = inputs_for(model, BATCH)
    before = model.generate(**inputs, **GREEDY)
    with hf.prune(model, method="todre", retain_ratio=1.0, probe_depths=(0.5,), tau=0.0):
        during = model.generate(**inputs, **GREEDY)
        assert [len(of_sample.probes) for of_sample in hf.last_stats(model)] == [1, 1, 0]
    assert torch.equal(before, during)


@pytest.mark.parametrize("family", ["llava_next", *QWEN, "internvl"])
def test_fastv_drops_what_the_last_token_attends_to_least(family):
    model = model_of(family, "eager" if family in ("llava_next", "qwen2_vl") else "sdpa")
    inputs = inputs_for(model, BATCH)
    output, stats = run(model, inputs, "fastv", retain_ratio=0.25, layer=4)
    oracle, stages = Oracle(model, inputs), []
    for row, of_sample in enumerate(stats):
        whole = [set(range(image.num_tokens)) for image in of_sample.images]
        stages.append([(0, whole)])
        if not whole:
            continue
        decoder, embeds, _ = oracle.pruned(row, stages[row])
        paid = decoder.run(embeds).attention[3].mean(dim=0)[-1]  # (L,)
        of_images = [
            visual.columns[~torch.tensor(visual.is_newline)]
            for visual in oracle.samples[row].visuals
        ]
        pool = torch.cat(of_images)
        count = sum(max(1, int(0.25 * len(image) + 0.5)) for image in whole)
        best = set(pool[paid[pool].topk(count).indices].tolist())
        held = [{i for i, at in enumerate(image.tolist()) if at in best} for image in of_images]
        stages[row].append((4, held))
    assert_equals_oracle(model, inputs, output, stages)


def test_samples_of_a_batch_withdraw_at_different_layers(attention):
    model = model_of("llava_next", attention)
    tau = tau_between(model, BATCH, 0.25)
    knobs = {"retain_ratio": 0.25, "probe_depths": PROBES, "tau": tau}
    output, stats = run(model, inputs_for(model, BATCH), "todre", **knobs)
    assert stats[0].withdrawn_from != stats[1].withdrawn_from
    stages = [stages_of(of_sample) for of_sample in stats]
    assert_equals_oracle(model, inputs_for(model, BATCH), output, stages)


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_decoder(decoder, attention):
    model = model_of("llava_next", attention, decoder)
    inputs = inputs_for(model, BATCH)
    assert_follows(model, inputs, planned(inputs, 0.25, (0, 3, 0), (1, 2, 2), (1, 5, 0)))


@pytest.mark.parametrize("family", FAMILIES)
def test_stage_1_alone(family):
    model = model_of(family)
    inputs = inputs_for(model, [*TWO_IMAGES, *ONE], "right")
    output, stats = run(model, inputs, "todre", retain_ratio=0.1, probe_depths=())
    assert not any(of_sample.probes for of_sample in stats)
    assert_equals_oracle(model, inputs, output, [stages_of(of_sample) for of_sample in stats])


@pytest.mark.parametrize("family", USUAL_DECODER)
def test_part_of_the_tokens_is_dropped_inside(family):
    model = model_of(family, "eager")
    inputs = inputs_for(model, [*ONE, *TWO_IMAGES])
    method = planned(inputs, 0.25, (0, 1, 2), (0, 4, 2), (1, 2, 3), (1, 5, 0))
    stats = assert_follows(model, inputs, method)
    oracle = Oracle(model, inputs)
    for row, of_sample in enumerate(stats):
        stages = method.stages(of_sample, text_behind(inputs, row))
        assert_stats_tell_what_was_kept(of_sample, stages, oracle, row)
