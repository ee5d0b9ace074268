"""Phases A, B and C: projector and decoder learn to answer, with the tower frozen.

B images, V visual tokens, T text tokens. Phase A sees one tile per picture, phase B the AnyRes
views of whole scenes, phase C the same with a decaying rate and more of the two hardest tasks. Two
things are trained in on purpose, both in phases B and C:

- *Position squeeze*: in half of the steps the distances between visual positions shrink by a
  random factor, so that answers do not hang on absolute positions and survive re-numbering.
- *Attention-mass penalty*: text looking at visual tokens in the second half of the layers costs a
  little. Large models stop looking there by themselves; one this small never does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.mini.heldout import Sample, held_out_samples
from eval.mini.questions import Question, ask
from eval.mini.render import Renderer
from eval.mini.scenes import (
    IMAGE_LAYOUT,
    TILE_LAYOUT,
    Layout,
    Scene,
    SeedFamily,
    sample_scene,
    stream,
)
from scripts.mini_training.evaluate import encode_images, evaluate
from scripts.mini_training.loop import rate
from scripts.mini_training.muon import Muon
from scripts.mini_training.network import MiniDecoder
from scripts.mini_training.packing import NO_TARGET, PackedQuestions, pack_questions
from scripts.mini_training.tokenizer import PromptEncoder
from scripts.mini_training.vision import VisionTower

Mix = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class PhaseConfig:
    """Hyperparameters of one decoder phase; rates are for matrices (Muon) and the rest (AdamW)."""

    name: str
    stream_key: int
    layout: Layout
    mix: Mix
    num_steps: int
    images_per_step: int = 8
    muon_rate: float = 0.01
    adam_rate: float = 2e-3
    warmup_steps: int = 50
    decay: float = 1e-9
    squeeze_probability: float = 0.0
    smallest_squeeze: float = 0.1
    mass_penalty: float = 0.0
    end_weight: float = 0.1
    num_backgrounds: int = 160
    seed: int = 0


PHASE_A = PhaseConfig(
    name="tile",
    stream_key=2,
    layout=TILE_LAYOUT,
    mix=(
        ("exist", 3),
        ("colour", 2),
        ("shape", 2),
        ("count", 2),
        ("where", 1),
        ("place", 2),
        ("yes_no", 2),
        ("digit", 1),
        ("read", 1),
        ("choice", 2),
    ),
    num_steps=700,
)
PHASE_B = PhaseConfig(
    name="anyres",
    stream_key=3,
    layout=IMAGE_LAYOUT,
    mix=(
        ("exist", 2),
        ("colour", 1),
        ("shape", 1),
        ("count", 3),
        ("where", 2),
        ("place", 2),
        ("yes_no", 4),
        ("digit", 1),
        ("read", 1),
        ("choice", 3),
    ),
    num_steps=1850,
    squeeze_probability=0.5,
    mass_penalty=0.05,
)
PHASE_C = replace(
    PHASE_B,
    name="polish",
    stream_key=4,
    mix=(
        ("exist", 1),
        ("colour", 1),
        ("shape", 1),
        ("count", 4),
        ("where", 1),
        ("order", 5),
        ("yes_no", 10),
        ("digit", 1),
        ("read", 1),
        ("choice", 1),
    ),
    num_steps=1740,
    muon_rate=0.007,
    adam_rate=1.4e-3,
    decay=0.7,
)


@dataclass(frozen=True)
class Batch:
    """`features`: tower features (B, views, 64, 128), bfloat16."""

    features: Tensor
    questions: list[list[Question]]
    packed: PackedQuestions
    squeeze: float


class DecoderPhase:
    """A `loop.Phase` that trains a `MiniDecoder` on a frozen `VisionTower`."""

    def __init__(
        self,
        config: PhaseConfig,
        tower: VisionTower,
        decoder: MiniDecoder,
        encoder: PromptEncoder,
        num_validation_images: int = 48,
    ) -> None:
        self.config, self.name, self.num_steps = config, config.name, config.num_steps
        self.tower, self.decoder, self._encoder = tower.requires_grad_(False), decoder, encoder
        self._prefix = torch.tensor(encoder.prefix)
        backgrounds = stream(SeedFamily.TRAIN, config.seed, 0)
        self._renderer = Renderer(backgrounds, config.num_backgrounds)
        self._num_validation_images = num_validation_images
        self._validation: list[Sample] = []
        self._parameters = list(decoder.parameters())
        chosen = [*decoder.model.layers.parameters(), *decoder.model.mm_projector.parameters()]
        matrices = [p for p in chosen if p.dim() == 2]
        matrix_ids = {id(p) for p in matrices}
        rest = [p for p in self._parameters if id(p) not in matrix_ids]
        self._muon = Muon(matrices, config.muon_rate)
        self._adam = torch.optim.AdamW(
            rest, config.adam_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        )
        depth = decoder.config.num_hidden_layers
        late = torch.linspace(0.25, 1, depth - depth // 2) / (depth - depth // 2)
        self._mass_weights = torch.cat((torch.zeros(depth // 2), late))

    def _questions(self, rng: np.random.Generator, scene: Scene) -> list[Question]:
        """The phase's mix; what a scene cannot answer becomes an existence question."""
        asked = []
        for task, count in self.config.mix:
            for _ in range(count):
                question = ask(rng, scene, task) or ask(rng, scene, "exist")
                assert question is not None
                asked.append(question)
        return asked

    def batch(self, step: int) -> Batch:
        """Everything step number `step` trains on; a pure function of the step."""
        config = self.config
        rng = stream(SeedFamily.TRAIN, config.seed, config.stream_key, step)
        scenes = [sample_scene(rng, config.layout) for _ in range(config.images_per_step)]
        images = np.stack([self._renderer.render(rng, scene)[0] for scene in scenes])
        questions = [self._questions(rng, scene) for scene in scenes]
        squeeze = 1.0
        if rng.random() < config.squeeze_probability:
            squeeze = math.exp(rng.uniform(math.log(config.smallest_squeeze), 0))
        packed = pack_questions(questions, self._encoder)
        features = encode_images(self.tower, images)
        return Batch(features, questions, packed, squeeze)

    def train_step(self, step: int) -> dict[str, float]:
        """One update of projector and decoder."""
        config = self.config
        factor = rate(step, self.num_steps, config.warmup_steps, config.decay)
        self._muon.lr = config.muon_rate * factor
        for group in self._adam.param_groups:
            group["lr"] = config.adam_rate * factor
        batch = self.batch(step)
        visual = self.decoder.visual_tokens(batch.features)
        hidden, masses = self.decoder(self._prefix, visual, batch.packed.text, batch.squeeze)
        answered = batch.packed.targets != NO_TARGET
        logits, targets = self.decoder.logits(hidden[answered]), batch.packed.targets[answered]
        weights = torch.where(targets == self._encoder.eos, config.end_weight, 1.0)
        losses = F.cross_entropy(logits, targets, reduction="none")
        loss = (losses * weights).sum() / weights.sum()
        total = loss + config.mass_penalty * (masses * self._mass_weights).sum()
        metrics = {"loss": loss.item(), "rate": factor}
        total.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._muon.step()
        self._adam.step()
        for parameter in self._parameters:
            parameter.grad = None
        for layer, mass in enumerate(masses.tolist()):
            metrics[f"mass_{layer}"] = mass
        right = (logits.argmax(-1) == targets) & (targets != self._encoder.eos)
        return metrics | self._task_accuracy(batch, answered, right, targets)

    def _task_accuracy(
        self, batch: Batch, answered: Tensor, right: Tensor, targets: Tensor
    ) -> dict[str, float]:
        """Share of right answer tokens per task in a training batch."""
        words = targets != self._encoder.eos
        image, _ = answered.nonzero(as_tuple=True)
        segment = batch.packed.text.segments[answered]
        tasks = [
            batch.questions[i][j].task
            for i, j in zip(image.tolist(), segment.tolist(), strict=True)
        ]
        metrics = {}
        for task in dict.fromkeys(tasks):
            mine = torch.tensor([name == task for name in tasks]) & words
            metrics[task] = (right & mine).sum().item() / mine.sum().item()
        return metrics

    def validate(self) -> dict[str, float]:
        """Accuracy per task on the validation seeds."""
        if not self._validation:
            self._validation = held_out_samples(
                SeedFamily.VALIDATION, 0, self._num_validation_images, 2, self.config.layout
            )
        return evaluate(self.tower, self.decoder, self._validation, self._encoder).accuracy

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimiser state."""
        return {
            "decoder": self.decoder.state_dict(),
            "muon": self._muon.state_dict(),
            "adam": self._adam.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.decoder.load_state_dict(state["decoder"])
        self._muon.load_state_dict(state["muon"])
        self._adam.load_state_dict(state["adam"])
