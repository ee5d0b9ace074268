"""Pruned, a stock model answers like a slow decoder that reads only the tokens that stay."""

from __future__ import annotations

import pytest
from checks import (
    PROBES,
    Strides,
    assert_equals_oracle,
    assert_stats_tell_what_was_kept,
    run,
    tau_between,
    text_behind,
)
from oracle import Oracle, stages_of
from tiny import BATCH, DECODERS, ONE, TWO_IMAGES, VIDEO_BATCH, inputs_for, model_of

FAMILIES = ["llava", "llava_next", "llava_next_video", "llava_onevision"]
OF_VIDEO = ["llava_next_video", "llava_onevision"]


@pytest.mark.parametrize("ratio", [0.25, 0.1])
@pytest.mark.parametrize("samples", [ONE, BATCH], ids=["one", "batch"])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_stages(family, attention, samples, ratio):
    model = model_of(family, attention)
    inputs = inputs_for(model, samples)
    tau = tau_between(model, samples, ratio)
    output, stats = run(model, inputs, "todre", retain_ratio=ratio, probe_depths=PROBES, tau=tau)
    stages = [stages_of(of_sample) for of_sample in stats]
    assert any(len(of_sample) > 1 for of_sample in stages), "something is withdrawn"
    assert_equals_oracle(model, inputs, output, stages)
    oracle = Oracle(model, inputs)
    for row, of_sample in enumerate(stats):
        for image in of_sample.images:
            assert len(image.keep_idx) == max(1, int(ratio * image.num_tokens + 0.5))
        assert_stats_tell_what_was_kept(of_sample, stages[row], oracle, row)


def test_samples_of_a_batch_withdraw_at_different_layers(attention):
    model = model_of("llava_next", attention)
    tau = tau_between(model, BATCH, 0.25)
    knobs = {"retain_ratio": 0.25, "probe_depths": PROBES, "tau": tau}
    output, stats = run(model, inputs_for(model, BATCH), "todre", **knobs)
    assert stats[0].withdrawn_from != stats[1].withdrawn_from
    stages = [stages_of(of_sample) for of_sample in stats]
    assert_equals_oracle(model, inputs_for(model, BATCH), output, stages)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_every_decoder(family, decoder, attention):
    model = model_of(family, attention, decoder)
    inputs = inputs_for(model, BATCH)
    plan = ((9, 3, 0), (8, 2, 2), (8, 5, 0))
    method = Strides(retain_ratio=0.25, plan=plan)
    assert [text_behind(sample) for sample in BATCH] == [9, 8, 0]
    output, stats = run(model, inputs, method)
    stages = [
        method.stages(of_sample, text_behind(sample))
        for of_sample, sample in zip(stats, BATCH, strict=True)
    ]
    assert_equals_oracle(model, inputs, output, stages)


@pytest.mark.parametrize("samples", [VIDEO_BATCH], ids=["videos and images"])
@pytest.mark.parametrize("family", OF_VIDEO)
def test_videos(family, attention, samples):
    model = model_of(family, attention)
    inputs = inputs_for(model, samples)
    knobs = {"retain_ratio": 0.25, "probe_depths": PROBES, "tau": tau_between(model, samples, 0.25)}
    output, stats = run(model, inputs, "todre", **knobs)
    assert_equals_oracle(model, inputs, output, [stages_of(of_sample) for of_sample in stats])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_stage_1_alone(family, side):
    model = model_of(family)
    inputs = inputs_for(model, [*TWO_IMAGES, *ONE], side)
    output, stats = run(model, inputs, "todre", retain_ratio=0.1, probe_depths=())
    assert not any(of_sample.probes for of_sample in stats)
    assert_equals_oracle(model, inputs, output, [stages_of(of_sample) for of_sample in stats])


@pytest.mark.parametrize("family", FAMILIES)
def test_part_of_the_tokens_is_dropped_inside(family, attention):
    model = model_of(family, attention)
    samples = [*ONE, *TWO_IMAGES]
    inputs = inputs_for(model, samples)
    method = Strides(retain_ratio=0.25, plan=((9, 1, 2), (9, 4, 2), (10, 2, 3), (10, 5, 0)))
    output, stats = run(model, inputs, method)
    stages = [
        method.stages(of_sample, text_behind(sample))
        for of_sample, sample in zip(stats, samples, strict=True)
    ]
    assert_equals_oracle(model, inputs, output, stages)
    oracle = Oracle(model, inputs)
    for row, of_sample in enumerate(stats):
        assert_stats_tell_what_was_kept(of_sample, stages[row], oracle, row)
