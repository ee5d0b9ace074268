"""Questions about images or videos in, answers and what happened to the visual tokens out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from llava_todre.errors import TodreError
from llava_todre.model.images import load_image, process_images
from llava_todre.model.llava import LlavaLlamaForCausalLM
from llava_todre.model.prompt import build_prompt, tokenizer_image_token
from llava_todre.stats import PruneStats

Picture = Image.Image | str | os.PathLike[str]

# A video frame is one view, resized and cropped as CLIP was trained: no tiles, no padding.
_FRAME = SimpleNamespace(image_aspect_ratio="square")


@dataclass(frozen=True)
class Request:
    """One question."""

    question: str
    """May contain ``<image>`` where each image goes; they stand in front otherwise."""
    images: Sequence[Picture]
    """PIL images or files; with ``is_video`` the frames of one video in order."""
    is_video: bool = False


@dataclass(frozen=True)
class Answer:
    """One answer."""

    text: str
    stats: PruneStats
    stages_ms: dict[str, float] = field(default_factory=dict)
    """Wall-clock milliseconds per stage of the batch this answer was in; empty unless timed."""


@torch.inference_mode()
def answer(
    model: LlavaLlamaForCausalLM,
    tokenizer: Any,
    requests: Sequence[Request],
    *,
    template: str = "vicuna_v1",
    max_new_tokens: int = 64,
    timed: bool = False,
    **generate_kwargs: Any,
) -> list[Answer]:
    """Answer a batch of questions with the model's current pruner.

    Args:
        model: from ``load_pretrained_model``.
        tokenizer: from ``load_pretrained_model``.
        requests: the batch; prompts may differ in length and number of images. Requests that share
            the very same image objects encode them once.
        template: a key of ``conv_templates``.
        max_new_tokens: longest answer.
        timed: measure the stages views, vision, selection, prefill and decode.
        generate_kwargs: passed to ``generate``, e.g. ``num_beams``; greedy unless given otherwise.
    """
    if max_new_tokens < 1:
        raise TodreError(f"max_new_tokens {max_new_tokens} is out of range; allowed: 1 or more.")
    if not requests:
        return []
    model.clock.enabled, model.clock.stages_ms = timed, {}
    with model.clock.stage("views"):
        pixels, sizes, modalities, places = _prepare_images(model, requests)
    encoded = model.encode_images(pixels, sizes, modalities) if pixels else []
    visuals = [encoded[place] for place in places] or None
    ids, mask = _prepare_prompts(model, tokenizer, requests, template)
    settings = {"do_sample": False, "max_new_tokens": max_new_tokens} | generate_kwargs
    output = model.generate(ids, images=visuals, attention_mask=mask, **settings)
    new = output if visuals else output[:, ids.shape[1] :]
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    stages = dict(model.clock.stages_ms)
    return [
        Answer(text.strip(), stats, stages)
        for text, stats in zip(texts, model.last_stats, strict=True)
    ]


def ask(
    model: LlavaLlamaForCausalLM,
    tokenizer: Any,
    images: Picture | Sequence[Picture],
    question: str,
    **kwargs: Any,
) -> Answer:
    """Answer one question about one or several images; see :func:`answer` for ``kwargs``."""
    several = images if isinstance(images, Sequence) and not isinstance(images, str) else [images]
    return answer(model, tokenizer, [Request(question, several)], **kwargs)[0]


def _prepare_images(
    model: LlavaLlamaForCausalLM, requests: Sequence[Request]
) -> tuple[list[Tensor], list[tuple[int, int]], list[str], list[int]]:
    """Return distinct pixels, sizes and modalities, and which of them each placeholder shows."""
    processor = model.get_vision_tower().image_processor
    pixels: list[Tensor] = []
    sizes: list[tuple[int, int]] = []
    modalities: list[str] = []
    known: dict[Any, int] = {}
    places: list[int] = []
    for request in requests:
        if not request.images:
            raise TodreError("images is empty; give at least one image or frame per question.")
        groups = [list(request.images)] if request.is_video else [[item] for item in request.images]
        for group in groups:
            key = (request.is_video, *(_identity(item) for item in group))
            if key not in known:
                known[key] = len(pixels)
                opened = [_open(item) for item in group]
                config = _FRAME if request.is_video else model.config
                views = process_images(opened, processor, config)
                pixels.append(torch.as_tensor(views if request.is_video else views[0]))
                sizes.append(opened[0].size)
                modalities.append("video" if request.is_video else "image")
            places.append(known[key])
    return pixels, sizes, modalities, places


def _open(picture: Picture) -> Image.Image:
    return picture if isinstance(picture, Image.Image) else load_image(picture)


def _identity(picture: Picture) -> Any:
    return id(picture) if isinstance(picture, Image.Image) else os.fspath(picture)


def _prepare_prompts(
    model: LlavaLlamaForCausalLM, tokenizer: Any, requests: Sequence[Request], template: str
) -> tuple[Tensor, Tensor]:
    """Return left-padded (B, T) ids with image placeholders, and their (B, T) mask."""
    rows: list[Tensor] = []
    for request in requests:
        num_images = 1 if request.is_video else len(request.images)
        prompt = build_prompt(request.question, num_images, template)
        rows.append(torch.tensor(tokenizer_image_token(prompt, tokenizer)))
    ids = _left_padded(rows)
    mask = _left_padded([torch.ones_like(row) for row in rows])
    return ids.to(model.device), mask.to(model.device)


def _left_padded(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
