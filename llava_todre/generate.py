"""Questions about images or videos in, answers and what happened to the visual tokens out."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import StopStringCriteria

from llava_todre.errors import TodreError
from llava_todre.locking import in_turn
from llava_todre.model.chat_template import find_template
from llava_todre.model.images import Picture, open_picture, picture_digest, process_images
from llava_todre.model.llava import LlavaLlamaForCausalLM
from llava_todre.model.prompt import (
    AUTO,
    DEFAULT_IMAGE_TOKEN,
    Template,
    build_prompt,
    tokenizer_image_token,
)
from llava_todre.pruners import Pruner
from llava_todre.settings import checked, require_known, whole
from llava_todre.stage1.select import ImageFeatures
from llava_todre.stage2.prefix import PrefixStore
from llava_todre.stats import PruneStats


@dataclass(frozen=True, eq=False)
class Views:
    """An image, or the frames of a video, resized and cut for the vision tower."""

    pixels: Tensor
    """(V, 3, S, S), or (3, S, S) for an image that is one view."""
    size: tuple[int, int]
    """(width, height) of the image before."""


# A video frame is one view, resized and cropped as CLIP was trained: no tiles, no padding.
_FRAME = SimpleNamespace(image_aspect_ratio="square")


@dataclass(frozen=True)
class Request:
    """One question."""

    question: str
    """May contain ``<image>`` where each image goes; they stand in front otherwise."""
    images: Sequence[Picture | Views] = ()
    """PIL images, files or data URIs; with ``is_video`` the frames of one video in order; none for
    text. Or what :func:`prepare` made of them."""
    is_video: bool = False
    seconds: Sequence[float] = ()
    """When each frame of a video is seen, from the start of the video; empty where not known. Only
    some models of transformers read it."""

    def __post_init__(self) -> None:
        """Check the types, once for every way in."""
        if not isinstance(self.question, str):
            raise TodreError(f"question must be text, got {type(self.question).__name__}.")
        for key in ("images", "seconds"):
            value = getattr(self, key)
            if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
                raise TodreError(f"{key} must be a list, got {type(value).__name__}.")
        times: Sequence[Any] = self.seconds
        for second in times:
            if not isinstance(second, Real) or not math.isfinite(second):
                raise TodreError(f"seconds must hold finite numbers, got {second!r}.")


@dataclass(frozen=True)
class Answer:
    """One answer."""

    text: str
    stats: PruneStats
    stages_ms: dict[str, float] = field(default_factory=dict)
    """Wall-clock milliseconds per stage of the batch this answer was in; empty unless timed."""


@torch.no_grad()  # quanto's 4-bit weights do not run in inference mode
@in_turn
def answer(
    model: LlavaLlamaForCausalLM,
    tokenizer: Any,
    requests: Sequence[Request],
    *,
    template: str | Template = AUTO,
    max_new_tokens: int = 64,
    timed: bool = False,
    memory: Memory | None = None,
    **generate_kwargs: Any,
) -> list[Answer]:
    """Answer a batch of questions with the model's current pruner.

    Args:
        model: from ``load_pretrained_model``.
        tokenizer: from ``load_pretrained_model``.
        requests: the batch; prompts may differ in length and number of images. Requests that share
            the very same image objects or files encode them once.
        template: a key of ``conv_templates``, or auto: the one the checkpoint was made for, see
            :func:`~llava_todre.model.chat_template.find_template`.
        max_new_tokens: longest answer.
        timed: measure the stages views, vision, selection, prefill and decode.
        memory: what earlier calls of this model computed about the same images.
        generate_kwargs: passed to ``generate``, e.g. ``num_beams``; greedy unless given otherwise.
    """
    settings = call_settings(model, requests, max_new_tokens, generate_kwargs)
    if not requests:
        return []
    template = find_template(template, model, tokenizer)
    stop = template.stop
    if stop is not None and _can_stop(tokenizer, stop):  # where an answer does not end with EOS
        settings = {"stop_strings": [stop], **settings}
    if settings.get("stop_strings") is not None:
        settings = {"tokenizer": tokenizer, **settings}
    ids, mask = _prepare_prompts(model, tokenizer, requests, template)
    with model.clock.timing(timed) as stages:
        visuals = _encode(model, requests, memory)
        questions = [request.question.replace(DEFAULT_IMAGE_TOKEN, " ") for request in requests]
        # Handed over one by one, so that nothing here holds unpruned tokens during the prefill.
        images: Any = (visuals.pop(0) for _ in range(len(visuals)))
        output = model.generate(
            ids,
            images=images,
            attention_mask=mask,
            questions=questions,
            prefixes=None if memory is None else memory.prefixes,
            **settings,
        )
    texts = tokenizer.batch_decode(output, skip_special_tokens=True)
    if stop is not None:
        texts = [text.split(stop)[0] for text in texts]
    return [
        Answer(text.strip(), stats, stages)
        for text, stats in zip(texts, model.last_stats, strict=True)
    ]


def call_settings(
    model: Any, requests: Sequence[Request], max_new_tokens: int, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return arguments of ``generate`` for a call that answers requests.

    Args:
        model: that will run.
        requests: the batch.
        max_new_tokens: longest answer.
        kwargs: what else ``generate`` is to be given; greedy unless it says otherwise.

    Raises:
        TodreError: something that is no request, or a setting that is unknown or out of range.
    """
    if not isinstance(requests, Sequence) or not all(isinstance(r, Request) for r in requests):
        raise TodreError(f"requests must be a list of Request, got {type(requests).__name__}.")
    for option in ("num_return_sequences", "return_dict_in_generate"):
        if option in kwargs:
            raise TodreError(f"{option} is not accepted here; call model.generate for that.")
    require_known(kwargs)
    max_new_tokens = whole("max_new_tokens", max_new_tokens, 1)
    return checked(model, {"do_sample": False, "max_new_tokens": max_new_tokens, **kwargs})


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


def prepare(model: LlavaLlamaForCausalLM, request: Request) -> Request:
    """Return the request with its pictures loaded, resized and cut.

    This is the part of :func:`answer` that does not run the model; another thread may do it ahead.
    Requests about one image share its :class:`Views` to have it encoded once.
    """
    views = [_views(model, group, request.is_video) for group in _groups(request)]
    return replace(request, images=views)


class Memory:
    """What questions about the same image need only once: its tokens, and its keys and values.

    An image is the same if it has the same pixels, or is an unchanged file. Answers are those of
    calls without a memory: methods that read the question choose their tokens afresh, and only what
    no question can change is kept. For one model, whose weights do not change meanwhile.
    """

    def __init__(self, max_images: int = 1) -> None:
        """Start empty.

        Args:
            max_images: how many images to remember between calls, the latest ones.
        """
        self.max_images = whole("max_images", max_images, 1)
        self.prefixes = PrefixStore(max_images)
        self._images: list[_Encoded] = []

    def find(self, key: Any, pruner: Pruner) -> ImageFeatures | None:
        """Return what is known about an image, and make it the latest."""
        for known in self._images:
            if known.key == key and known.pruner == pruner:
                self._images.remove(known)
                self._images.append(known)
                return known.visual
        return None

    def add(self, key: Any, pruner: Pruner, group: _Group, visual: ImageFeatures) -> None:
        """Remember an image; the oldest is forgotten when the call ends."""
        self._images.append(_Encoded(key, pruner, group, visual))

    def trim(self) -> None:
        """Forget all but the latest images."""
        self._images = self._images[-self.max_images :]


_Group = Sequence[Picture | Views]


@dataclass(frozen=True)
class _Encoded:
    key: Any
    pruner: Pruner
    group: _Group
    """Held so that no other :class:`Views` can get the identity of one of these."""
    visual: ImageFeatures


def _encode(
    model: LlavaLlamaForCausalLM, requests: Sequence[Request], memory: Memory | None
) -> list[ImageFeatures]:
    """Return one encoding per placeholder; those of equal images are the same object."""
    identity = _identity if memory is None else _lasting_identity
    if memory is not None:
        if not isinstance(memory, Memory):
            raise TodreError(f"memory must be a Memory, got {type(memory).__name__}.")
        memory.prefixes.claim(model)
    pictures = {id(item): item for request in requests for item in request.images}
    names = {key: identity(item) for key, item in pictures.items()}
    shown = [
        ((request.is_video, *(names[id(item)] for item in group)), group)
        for request in requests
        for group in _groups(request)
    ]
    known: dict[Any, ImageFeatures] = {}
    if memory is not None:
        found = ((key, memory.find(key, model.pruner)) for key, _ in shown)
        known = {key: visual for key, visual in found if visual is not None}
    new = {key: group for key, group in shown if key not in known}
    with model.clock.stage("views"):
        views = [_views(model, group, key[0]) for key, group in new.items()]
    modalities = ["video" if key[0] else "image" for key in new]
    parts = [slice(index, index + 1) for index in range(len(new))]
    # What is remembered is encoded by itself: its numbers must not depend on its company.
    for part in parts if memory is not None else [slice(None)]:
        encoded = model.encode_images(
            [view.pixels for view in views[part]],
            [view.size for view in views[part]],
            modalities[part],
        )
        known |= zip(list(new)[part], encoded, strict=True)
    if memory is not None:
        for key, group in new.items():
            memory.add(key, model.pruner, group, known[key])
        memory.trim()
    return [known[key] for key, _ in shown]


def _groups(request: Request) -> list[_Group]:
    """Return the pictures behind each placeholder of a request."""
    if request.is_video and not request.images:
        raise TodreError("images is empty; a video needs at least one frame.")
    return [list(request.images)] if request.is_video else [[item] for item in request.images]


def _views(model: LlavaLlamaForCausalLM, group: _Group, is_video: bool) -> Views:
    if len(group) == 1 and isinstance(group[0], Views):
        return group[0]
    opened = [open_picture(item) for item in group]
    config = _FRAME if is_video else model.config
    views = process_images(opened, model.get_vision_tower().image_processor, config)
    return Views(torch.as_tensor(views if is_video else views[0]), opened[0].size)


def _identity(picture: Picture | Views) -> Any:
    """Return what tells pictures apart within one call."""
    return os.fspath(picture) if isinstance(picture, (str, os.PathLike)) else id(picture)


def _lasting_identity(picture: Picture | Views) -> Any:
    """Return what tells pictures apart between calls, in which they may be painted over."""
    if isinstance(picture, Image.Image):
        return picture_digest(picture)
    if not isinstance(picture, (str, os.PathLike)):
        return id(picture)
    try:
        status = os.stat(os.path.expanduser(picture))
    except (OSError, ValueError):
        return os.fspath(picture)  # opening it says what is wrong
    return os.fspath(picture), status.st_size, status.st_mtime_ns


def _prepare_prompts(
    model: LlavaLlamaForCausalLM, tokenizer: Any, requests: Sequence[Request], template: Template
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


def _can_stop(tokenizer: Any, stop: str) -> bool:
    """Return whether generation can end at a string; else the answer is cut there afterwards."""
    try:
        StopStringCriteria(tokenizer, [stop])
    except ValueError:  # no token of the vocabulary writes it
        return False
    return True


def _left_padded(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
