"""Question, answer, and the interface of every model."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch

from llava_todre.errors import TodreError
from llava_todre.flops import DecoderShape
from llava_todre.image_cache import ImageCache, Views
from llava_todre.locking import turn
from llava_todre.model.images import Picture
from llava_todre.pruners import Pruner
from llava_todre.settings import checked, require_known, whole
from llava_todre.stats import PruneStats


@dataclass(frozen=True)
class Request:
    """One question."""

    question: str
    """May contain ``<image>`` where each image goes; they stand in front otherwise."""
    images: Sequence[Picture | Views] = ()
    """PIL images, files or data URIs; with ``is_video`` the frames of one video in order; none for
    text. Or what :meth:`VLM.prepare` made of them."""
    is_video: bool = False
    seconds: Sequence[float] = ()
    """Time stamp of each frame of a video; empty where not known. Only some models of transformers
    read it."""

    def __post_init__(self) -> None:
        """Check the types, once for every front end."""
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


class VLM(ABC):
    """A vision-language model with one pruning method, of our own class or of transformers."""

    model: Any
    """The model itself: ours, or one of transformers."""
    tokenizer: Any
    processor: Any
    """The image processor, or the processor of a transformers model."""
    decoder: Any
    """The part of the model that has ``layers``."""
    template: Any
    """Name of the conversation template."""
    draws_tokens = False
    """Whether the part of an image that each token covers is known."""

    @property
    @abstractmethod
    def last_stats(self) -> Sequence[PruneStats]:
        """What happened to the tokens of each sample of the latest call."""

    @abstractmethod
    def set_pruner(self, method: str | Pruner, **options: Any) -> Pruner:
        """Choose the method of all later answers, by name and options or as an object."""

    @torch.no_grad()  # quanto's 4-bit weights do not run in inference mode
    def answer(
        self,
        requests: Sequence[Request],
        *,
        max_new_tokens: int = 64,
        timed: bool = False,
        image_cache: ImageCache | None = None,
        **generate_kwargs: Any,
    ) -> list[Answer]:
        """Answer a batch of questions.

        Args:
            requests: the batch; prompts may differ in length and number of images.
            max_new_tokens: longest answer.
            timed: measure the stages views, vision, selection, prefill and decode, with our class.
            image_cache: what earlier calls of this model computed about the same images.
            generate_kwargs: passed to ``generate``, e.g. ``num_beams``; greedy unless given
                otherwise.
        """
        settings = call_settings(self.model, requests, max_new_tokens, generate_kwargs)
        given: Any = image_cache
        if image_cache is not None:
            if not isinstance(given, ImageCache):
                got = type(given).__name__
                raise TodreError(f"image_cache must be an ImageCache, got {got}.")
            image_cache.prefixes.claim(self.model)
        if not requests:
            return []
        with turn(self.model):
            return self._answer(requests, settings, timed, image_cache)

    @abstractmethod
    def _answer(
        self,
        requests: Sequence[Request],
        settings: dict[str, Any],
        timed: bool,
        image_cache: ImageCache | None,
    ) -> list[Answer]:
        """Do :meth:`answer` with checked arguments of ``generate``, for one request or more."""

    def ask(self, images: Picture | Sequence[Picture], question: str, **kwargs: Any) -> Answer:
        """Answer one question about one or several images; see :meth:`answer` for ``kwargs``."""
        return self.answer([about(images, question)], **kwargs)[0]

    def prepare(self, request: Request) -> Request:
        """Return the request with everything done that needs no model; safe in another thread."""
        return request

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return torch.device(self.model.device)

    @property
    def config(self) -> Any:
        """The model's."""
        return self.model.config

    @property
    def decoder_shape(self) -> DecoderShape:
        """The decoder's dimensions, for counting FLOPs."""
        return DecoderShape.of(self.decoder.config)


def about(images: Picture | Sequence[Picture], question: str) -> Request:
    """Return a question about one or several images."""
    several: Any = images if isinstance(images, (list, tuple)) else [images]
    return Request(question, several)


def call_settings(
    model: Any, requests: Sequence[Request], max_new_tokens: int, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return arguments of ``generate`` for a call that answers requests.

    Args:
        model: that will run.
        requests: the batch.
        max_new_tokens: longest answer.
        kwargs: further arguments of ``generate``; greedy unless they say otherwise.

    Raises:
        TodreError: not a list of requests, or a setting that is unknown or out of range.
    """
    if not isinstance(requests, Sequence) or not all(isinstance(r, Request) for r in requests):
        raise TodreError(f"requests must be a list of Request, got {type(requests).__name__}.")
    for option in ("num_return_sequences", "return_dict_in_generate"):
        if option in kwargs:
            raise TodreError(f"{option} must be left out here; call model.generate for it.")
    require_known(kwargs)
    max_new_tokens = whole("max_new_tokens", max_new_tokens, 1)
    return checked(model, {"do_sample": False, "max_new_tokens": max_new_tokens, **kwargs})
