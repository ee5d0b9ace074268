"""One answer of a model to questions of random words about a random image, timed.

Symbols: B questions, T length of a prompt with its image placeholder.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from eval.bench.timing import synchronise
from llava_todre.model.images import process_images
from llava_todre.model.llava import LlavaLlamaForCausalLM
from llava_todre.model.prompt import IMAGE_TOKEN_INDEX

SYSTEM_TOKENS = 35
"""Of the vicuna template, up to the image."""
QUESTION_TOKENS = 30
"""A question of POPE, the request to answer with one word, and the turn of the assistant."""
STAGES = ("views", "vision", "selection", "prefill", "decode")


@dataclass(frozen=True)
class Timed:
    """What one call took, in milliseconds."""

    total_ms: float
    first_token_ms: float | None
    """Until the first token is known to the host; for one question only."""
    token_ms: float | None
    """Per decoded token after the first, with all that ``generate`` does around it."""
    stages_ms: dict[str, float]
    """By the model's own clock; ``other`` is what no stage covers."""


class _Arrivals(BaseStreamer):
    """Notes when tokens arrive; the first ``put`` is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Note the time; ``generate`` has moved the value to the host."""
        del value
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


def random_image(model: LlavaLlamaForCausalLM, seed: int) -> Image.Image:
    """Return noise of a size that takes 2 x 2 crops."""
    side = 2 * model.get_vision_tower().config.image_size
    noise = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def questions(
    model: LlavaLlamaForCausalLM, lengths: Sequence[int], seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return (B, T) ids and mask of prompts with so many words after the image, left-padded.

    They share the words before it.
    """
    draw = torch.Generator().manual_seed(seed)
    vocab = model.config.vocab_size
    system = torch.randint(3, vocab, (SYSTEM_TOKENS,), generator=draw)
    longest = max(lengths)
    ids = torch.zeros(len(lengths), longest + SYSTEM_TOKENS + 1, dtype=torch.int64)
    for row, length in zip(ids, lengths, strict=True):
        words = torch.randint(3, vocab, (length,), generator=draw)
        prompt = torch.cat([system, torch.tensor([IMAGE_TOKEN_INDEX]), words])
        row[-len(prompt) :] = prompt
    return ids.to(model.device), (ids != 0).long().to(model.device)


@torch.inference_mode()
def answer(
    model: LlavaLlamaForCausalLM,
    images: Sequence[Image.Image],
    ids: Tensor,
    mask: Tensor,
    new_tokens: int,
    **kwargs: Any,
) -> Timed:
    """Answer B questions (ids, mask: B, T), each about its own image or all about the only one."""
    arrivals = _Arrivals()
    if len(ids) == 1:
        kwargs["streamer"] = arrivals
    synchronise()
    start = time.perf_counter()
    with model.clock.timing(True) as stages:
        with model.clock.stage("views"):
            processor = model.get_vision_tower().image_processor
            pixels = list(process_images(images, processor, model.config))
        encoded = model.encode_images(pixels, [each.size for each in images])
        model.generate(
            ids,
            images=encoded if len(encoded) == len(ids) else encoded * len(ids),
            attention_mask=mask,
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            **kwargs,
        )
    synchronise()
    total = time.perf_counter() - start
    spent = {name: stages.get(name, 0.0) for name in STAGES}
    spent |= {name: value for name, value in stages.items() if name not in spent}
    spent["other"] = total * 1e3 - sum(spent.values())
    first = token = None
    if arrivals.times:
        first = (arrivals.times[1] - start) * 1e3
    if len(arrivals.times) > 2:
        last = arrivals.times[-1] - arrivals.times[1]
        token = last * 1e3 / (len(arrivals.times) - 2)
    return Timed(total * 1e3, first, token, spent)
