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
from llava_todre.model.prompt import (
    DEFAULT_IMAGE_TOKEN,
    build_prompt,
    conv_templates,
    tokenizer_image_token,
)
from llava_todre.stats import PruneStats

Picture = Image.Image | str | os.PathLike[str]

# A video frame is one view, resized and cropped as CLIP was trained: no tiles, no padding.
_FRAME = SimpleNamespace(image_aspect_ratio="square")


@dataclass(frozen=True)
class Request:
    """One question."""

    question: str
    """May contain ``<image>`` where each image goes; they stand in front otherwise."""
    images: Sequence[Picture] = ()
    """PIL images or files; with ``is_video`` the frames of one video in order; none for text."""
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
    for option in ("num_return_sequences", "return_dict_in_generate"):
        if option in generate_kwargs:
            raise TodreError(f"{option} is not accepted here; call model.generate for that.")
    ids, mask = _prepare_prompts(model, tokenizer, requests, template)
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": max_new_tokens}
    stop = conv_templates[template].stop
    if stop is not None:  # for checkpoints that do not end an answer with EOS
        settings |= {"stop_strings": [stop], "tokenizer": tokenizer}
    settings |= generate_kwargs
    with model.clock.timing(timed) as stages:
        with model.clock.stage("views"):
            pixels, sizes, modalities, places = _prepare_images(model, requests)
        encoded = model.encode_images(pixels, sizes, modalities)
        visuals = [encoded[place] for place in places]
        questions = [request.question.replace(DEFAULT_IMAGE_TOKEN, " ") for request in requests]
        output = model.generate(
            ids, images=visuals, attention_mask=mask, questions=questions, **settings
        )
    texts = tokenizer.batch_decode(output, skip_special_tokens=True)
    if stop is not None:
        texts = [text.split(stop)[0] for text in texts]
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
    several: Any = images if isinstance(images, (list, tuple)) else [images]
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
        if request.is_video and not request.images:
            raise TodreError("images is empty; a video needs at least one frame.")
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
    if isinstance(picture, (str, os.PathLike)):
        return load_image(picture)
    if not isinstance(picture, Image.Image):
        raise TodreError(f"image of type {type(picture).__name__}; allowed: PIL image or path.")
    return picture


def _identity(picture: Picture) -> Any:
    return os.fspath(picture) if isinstance(picture, (str, os.PathLike)) else id(picture)


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
