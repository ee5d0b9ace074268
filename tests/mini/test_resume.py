"""A training run that is killed and continued ends with the weights of an undisturbed one."""

import dataclasses
import json

import pytest
import torch

from scripts.mini_training.decoder import PHASE_A, PHASE_B, DecoderPhase
from scripts.mini_training.loop import Run, rate
from scripts.mini_training.network import DecoderConfig, MiniDecoder
from scripts.mini_training.tokenizer import PromptEncoder
from scripts.mini_training.tower import TowerConfig, TowerPhase
from scripts.mini_training.vision import VisionConfig, VisionTower

VISION = VisionConfig(
    hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
)


def tower_phase():
    config = TowerConfig(num_steps=5, images_per_step=2, tiles_per_step=3, num_backgrounds=2)
    return TowerPhase(config, VISION)


def decoder_phase(config):
    torch.manual_seed(0)
    encoder = PromptEncoder()
    sizes = DecoderConfig(
        encoder.vocabulary_size, 16, hidden_size=32, intermediate_size=32, num_hidden_layers=2
    )
    small = dataclasses.replace(config, num_steps=5, images_per_step=2, num_backgrounds=2)
    return DecoderPhase(small, VisionTower(VISION), MiniDecoder(sizes), encoder, 2)


class Killed(Exception):
    pass


def killed_at(phase, last_step):
    original = phase.train_step

    def train_step(step):
        if step == last_step:
            raise Killed
        return original(step)

    phase.train_step = train_step
    return phase


MAKERS = {
    "tower": tower_phase,
    "tile": lambda: decoder_phase(PHASE_A),
    "anyres": lambda: decoder_phase(PHASE_B),
}


@pytest.mark.parametrize("name", MAKERS)
def test_resumed_equals_uninterrupted(tmp_path, name):
    straight = MAKERS[name]()
    Run(tmp_path / "straight").train(straight)
    with pytest.raises(Killed):
        Run(tmp_path / "killed", save_every_s=-1).train(killed_at(MAKERS[name](), 3))
    resumed = MAKERS[name]()
    Run(tmp_path / "killed").train(resumed)
    model = "tower" if name == "tower" else "decoder"
    expected, actual = straight.state_dict()[model], resumed.state_dict()[model]
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=0, atol=0)
    again = MAKERS[name]()
    Run(tmp_path / "killed").train(killed_at(again, 0))
    torch.testing.assert_close(again.state_dict()[model], dict(expected), rtol=0, atol=0)
    curve = (tmp_path / "killed" / "training_curve.jsonl").read_text().splitlines()
    kinds = [json.loads(line)["kind"] for line in curve]
    assert kinds == ["train", "validation"]


def test_batches_depend_on_the_step_only():
    first, second = decoder_phase(PHASE_B), decoder_phase(PHASE_B)
    first.batch(0)
    assert first.batch(3).questions == second.batch(3).questions
    assert first.batch(3).questions != first.batch(4).questions


def test_rate_warms_up_and_decays():
    assert rate(0, 100, 10, 0.5) == pytest.approx(0.1)
    assert rate(30, 100, 10, 0.5) == 1
    assert rate(75, 100, 10, 0.5) == pytest.approx(0.5)
    assert rate(99, 100, 10, 0.5) == pytest.approx(0.02)
