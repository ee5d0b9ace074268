"""Exact-match accuracy of the training network, packed but equal to single-turn prompts.

B images, T text tokens. An answer is right if every one of its tokens and the `</s>` behind it
are the most likely ones, which is exactly when greedy decoding gives the answer and stops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eval.mini.heldout import Sample
from eval.mini.questions import TASKS
from scripts.mini_training.network import MiniDecoder
from scripts.mini_training.packing import NO_TARGET, pack_questions
from scripts.mini_training.tokenizer import PromptEncoder
from scripts.mini_training.views import pixel_values
from scripts.mini_training.vision import VisionTower


@dataclass(frozen=True)
class Evaluation:
    """`accuracy` per task, and `masses`: mean text-to-visual attention mass of every layer."""

    accuracy: dict[str, float]
    masses: list[float]


@torch.no_grad()
def encode_images(
    tower: VisionTower, images: np.ndarray, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """uint8 (B, side, side, 3) to tower features (B, views, 64, 128)."""
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        features = tower.features(pixel_values(images)).to(dtype)
    return features.unflatten(0, (len(images), -1))


@torch.no_grad()
def evaluate(
    tower: VisionTower,
    decoder: MiniDecoder,
    samples: Sequence[Sample],
    encoder: PromptEncoder,
    dtype: torch.dtype = torch.bfloat16,
    images_per_step: int = 8,
) -> Evaluation:
    """Answer every question of every sample with all visual tokens."""
    results: dict[str, list[bool]] = {task: [] for task in TASKS}
    masses = []
    prefix = torch.tensor(encoder.prefix)
    for start in range(0, len(samples), images_per_step):
        chunk = samples[start : start + images_per_step]
        packed = pack_questions([sample.questions for sample in chunk], encoder)
        images = np.stack([np.asarray(sample.image) for sample in chunk])
        visual = decoder.visual_tokens(encode_images(tower, images, dtype))
        hidden, mass = decoder(prefix, visual, packed.text)
        masses.append(mass)
        wrong = (decoder.logits(hidden).argmax(-1) != packed.targets) & (
            packed.targets != NO_TARGET
        )
        for i, sample in enumerate(chunk):
            failed = set(packed.text.segments[i][wrong[i]].tolist())
            for j, question in enumerate(sample.questions):
                results[question.task].append(j not in failed)
    accuracy = {task: float(np.mean(right)) for task, right in results.items() if right}
    return Evaluation(accuracy, torch.stack(masses).mean(0).tolist())
