"""One front for every model: load a checkpoint of any layout, ask about images or videos.

:func:`load` decides once whether our own class or one of transformers runs a checkpoint; what it
returns looks the same. :func:`answer`, :func:`ask` and :func:`prepare` are for a model and
tokenizer of ``load_pretrained_model``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import StopStringCriteria

from llava_todre.errors import TodreError, unknown
from llava_todre.hf.load import load_stock_model, uses_stock
from llava_todre.image_cache import Group, ImageCache, identity, lasting_identity
from llava_todre.load_options import LoadOptions
from llava_todre.model.chat_template import TEMPLATES, find_template, known_name
from llava_todre.model.images import Picture, open_picture, process_images
from llava_todre.model.llava import LlavaLlamaForCausalLM
from llava_todre.model.load import load_pretrained_model
from llava_todre.model.prompt import (
    AUTO,
    DEFAULT_IMAGE_TOKEN,
    Template,
    build_prompt,
    tokenizer_image_token,
)
from llava_todre.pruners import Pruner
from llava_todre.renamed import warn_renamed
from llava_todre.request import VLM, Answer, Request, Views, about
from llava_todre.stage1.select import ImageFeatures
from llava_todre.stats import PruneStats

# A video frame is one view, resized and cropped as CLIP was trained: no tiles, no padding.
_FRAME = SimpleNamespace(image_aspect_ratio="square")


def load(
    path: str,
    options: LoadOptions | None = None,
    *,
    own_only: Mapping[str, Any] | None = None,
    **changes: Any,
) -> VLM:
    """Load a model of any supported family and layout, with a method that prunes nothing.

    Args:
        path: folder or hub id.
        options: how; the defaults of :class:`LoadOptions` when None.
        own_only: further requests by name that only our own class can fulfil; an error where a
            class of transformers runs the checkpoint.
        changes: fields of ``options`` by name, such as ``dtype="bfloat16"``.

    Raises:
        TodreError: one line saying which option or what about the checkpoint is wrong.
    """
    chosen = LoadOptions.of(options, changes)
    if not isinstance(chosen.template, Template) and chosen.template not in TEMPLATES:
        raise unknown("template", chosen.template, TEMPLATES)
    if runs_stock(path, chosen):
        chosen.refuse_own(path, own_only)
        return load_stock_model(path, chosen)
    tokenizer, model, _, _ = load_pretrained_model(
        path, protocol=chosen.protocol, tp_plan=chosen.tp_plan, **chosen.shared()
    )
    if chosen.clip_text is not None:
        model.load_clip_text(chosen.clip_text)
    return OwnModel(model, tokenizer, chosen.template)


def runs_stock(path: str, options: LoadOptions) -> bool:
    """Return whether a class of transformers runs a checkpoint."""
    return uses_stock(options.backend, path, options.revision, options.model_base)


class OwnModel(VLM):
    """Our class with its tokenizer and conversation template."""

    draws_tokens = True

    def __init__(
        self, model: LlavaLlamaForCausalLM, tokenizer: Any, template: str | Template = AUTO
    ) -> None:
        """Take what ``load_pretrained_model`` returned.

        Args:
            model: the model.
            tokenizer: the tokenizer.
            template: a key of ``conv_templates``, or auto: the one the checkpoint was made for, see
                :func:`~llava_todre.model.chat_template.find_template`.
        """
        self.model, self.tokenizer, self.decoder = model, tokenizer, model.model
        self.processor = model.get_vision_tower().image_processor
        self._template = find_template(template, model, tokenizer)
        self.template = known_name(self._template)

    @property
    def last_stats(self) -> Sequence[PruneStats]:
        """What happened to the tokens of each sample of the latest call."""
        stats: Sequence[PruneStats] = self.model.last_stats
        return stats

    def set_pruner(self, method: str | Pruner, **options: Any) -> Pruner:
        """Choose the method of all later answers; see ``LlavaLlamaForCausalLM.set_pruner``."""
        pruner: Pruner = self.model.set_pruner(method, **options)
        return pruner

    def prepare(self, request: Request) -> Request:
        """Return the request with its images loaded, resized and cut.

        Requests about one image share its :class:`Views` to have it encoded once.
        """
        return prepare(self.model, request)

    def _answer(
        self,
        requests: Sequence[Request],
        settings: dict[str, Any],
        timed: bool,
        image_cache: ImageCache | None,
    ) -> list[Answer]:
        model, tokenizer, stop = self.model, self.tokenizer, self._template.stop
        if stop is not None and _can_stop(tokenizer, stop):  # where an answer does not end with EOS
            settings = {"stop_strings": [stop], **settings}
        if settings.get("stop_strings") is not None:
            settings = {"tokenizer": tokenizer, **settings}
        ids, mask = self._prompts(requests)
        with model.clock.timing(timed) as stages:
            visuals = _encode(model, requests, image_cache)
            questions = [request.question.replace(DEFAULT_IMAGE_TOKEN, " ") for request in requests]
            # Passed one by one, so that nothing here holds unpruned tokens during prefill.
            images: Any = (visuals.pop(0) for _ in range(len(visuals)))
            output = model.generate(
                ids,
                images=images,
                attention_mask=mask,
                questions=questions,
                prefixes=None if image_cache is None else image_cache.prefixes,
                **settings,
            )
        texts = tokenizer.batch_decode(output, skip_special_tokens=True)
        if stop is not None:
            texts = [text.split(stop)[0] for text in texts]
        return [
            Answer(text.strip(), stats, stages)
            for text, stats in zip(texts, model.last_stats, strict=True)
        ]

    def _prompts(self, requests: Sequence[Request]) -> tuple[Tensor, Tensor]:
        """Return left-padded (B, T) ids with image placeholders, and their (B, T) mask."""
        rows: list[Tensor] = []
        for request in requests:
            num_images = 1 if request.is_video else len(request.images)
            prompt = build_prompt(request.question, num_images, self._template)
            rows.append(torch.tensor(tokenizer_image_token(prompt, self.tokenizer)))
        ids = _left_padded(rows)
        mask = _left_padded([torch.ones_like(row) for row in rows])
        return ids.to(self.device), mask.to(self.device)


# ---------------------------------------------------------------------- for a model and tokenizer


def answer(
    model: LlavaLlamaForCausalLM,
    tokenizer: Any,
    requests: Sequence[Request],
    *,
    template: str | Template = AUTO,
    max_new_tokens: int = 64,
    timed: bool = False,
    image_cache: ImageCache | None = None,
    memory: ImageCache | None = None,
    **generate_kwargs: Any,
) -> list[Answer]:
    """Answer a batch of questions with the model's current pruner.

    Args:
        model: from ``load_pretrained_model``.
        tokenizer: from ``load_pretrained_model``.
        requests: the batch; prompts may differ in length and number of images. Requests that share
            the very same image objects or files encode them once.
        template: see :class:`OwnModel`.
        max_new_tokens: longest answer.
        timed: measure the stages views, vision, selection, prefill and decode.
        image_cache: what earlier calls of this model computed about the same images.
        memory: the old name of ``image_cache``.
        generate_kwargs: passed to ``generate``, e.g. ``num_beams``; greedy unless given otherwise.
    """
    if memory is not None:
        _require_one(image_cache)
        warn_renamed("memory=", "image_cache=")
        image_cache = memory
    return OwnModel(model, tokenizer, template).answer(
        requests,
        max_new_tokens=max_new_tokens,
        timed=timed,
        image_cache=image_cache,
        **generate_kwargs,
    )


def ask(
    model: LlavaLlamaForCausalLM,
    tokenizer: Any,
    images: Picture | Sequence[Picture],
    question: str,
    **kwargs: Any,
) -> Answer:
    """Answer one question about one or several images; see :func:`answer` for ``kwargs``."""
    if "memory" in kwargs:
        _require_one(kwargs.get("image_cache"))
        warn_renamed("memory=", "image_cache=")
        kwargs["image_cache"] = kwargs.pop("memory")
    return answer(model, tokenizer, [about(images, question)], **kwargs)[0]


def prepare(model: LlavaLlamaForCausalLM, request: Request) -> Request:
    """Return the request with its images loaded, resized and cut.

    This is the part of :func:`answer` that does not run the model; another thread may do it.
    Requests about one image share its :class:`Views` to have it encoded once.
    """
    views = [_views(model, group, request.is_video) for group in _groups(request)]
    return replace(request, images=views)


# ---------------------------------------------------------------------- the images of a batch


def _encode(
    model: LlavaLlamaForCausalLM, requests: Sequence[Request], cache: ImageCache | None
) -> list[ImageFeatures]:
    """Return one encoding per placeholder; those of equal images are the same object."""
    shown = _keyed(requests, lasting=cache is not None)
    known: dict[Any, ImageFeatures] = {}
    if cache is not None:
        found = ((key, cache.find(key, model.pruner)) for key, _ in shown)
        known = {key: visual for key, visual in found if visual is not None}
    new = {key: group for key, group in shown if key not in known}
    with model.clock.stage("views"):
        views = [_views(model, group, key[0]) for key, group in new.items()]
    modalities = ["video" if key[0] else "image" for key in new]
    parts = [slice(index, index + 1) for index in range(len(new))]
    # What is cached is encoded by itself: its numbers must not depend on the rest of the batch.
    for part in parts if cache is not None else [slice(None)]:
        encoded = model.encode_images(
            [view.pixels for view in views[part]],
            [view.size for view in views[part]],
            modalities[part],
        )
        known |= zip(list(new)[part], encoded, strict=True)
    if cache is not None:
        for key, group in new.items():
            cache.add(key, model.pruner, group, known[key])
        cache.trim()
    return [known[key] for key, _ in shown]


def _keyed(requests: Sequence[Request], lasting: bool) -> list[tuple[Any, Group]]:
    """Return the images at each placeholder, with a key that identifies them."""
    name = lasting_identity if lasting else identity
    images = {id(item): item for request in requests for item in request.images}
    names = {key: name(item) for key, item in images.items()}
    return [
        ((request.is_video, *(names[id(item)] for item in group)), group)
        for request in requests
        for group in _groups(request)
    ]


def _groups(request: Request) -> list[Group]:
    """Return the images for each placeholder of a request."""
    if request.is_video and not request.images:
        raise TodreError("images must hold at least one frame of the video, got none.")
    return [list(request.images)] if request.is_video else [[item] for item in request.images]


def _views(model: LlavaLlamaForCausalLM, group: Group, is_video: bool) -> Views:
    if len(group) == 1 and isinstance(group[0], Views):
        return group[0]
    opened = [open_picture(item) for item in group]
    config = _FRAME if is_video else model.config
    views = process_images(opened, model.get_vision_tower().image_processor, config)
    return Views(torch.as_tensor(views if is_video else views[0]), opened[0].size)


def _can_stop(tokenizer: Any, stop: str) -> bool:
    """Return whether generation can end at a string; else the answer is cut there afterwards."""
    try:
        StopStringCriteria(tokenizer, [stop])
    except ValueError:  # no token of the vocabulary writes it
        return False
    return True


def _left_padded(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")


def _require_one(image_cache: ImageCache | None) -> None:
    """Raise a TodreError if ``image_cache`` is given next to its old name."""
    if image_cache is not None:
        raise TodreError("memory is the old name of image_cache; give image_cache alone.")
