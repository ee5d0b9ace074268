"""Questions to a stock model of transformers."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image

from llava_todre.errors import TodreError
from llava_todre.hf import attach, detach, encode, last_stats
from llava_todre.hf.arguments import any_refused
from llava_todre.hf.capture import decoder_of
from llava_todre.hf.families import family_of
from llava_todre.hf.shared_inputs import Shown, joined
from llava_todre.hf.video_metadata import metadata_of
from llava_todre.image_cache import ImageCache, lasting_identity
from llava_todre.locking import turn
from llava_todre.model.adapters import unwrapped
from llava_todre.model.bounded import within
from llava_todre.model.checkpoint import first_line
from llava_todre.model.images import check_elongation, open_picture
from llava_todre.model.prompt import DEFAULT_IMAGE_TOKEN
from llava_todre.pruners import Pruner, resolve
from llava_todre.request import VLM, Answer, Request
from llava_todre.stats import PruneStats


class StockModel(VLM):
    """A model of transformers with its processor and one method."""

    template = "that of the processor"

    def __init__(self, model: Any, processor: Any) -> None:
        """Attach a method that prunes nothing.

        Raises:
            TodreError: a model that is not supported.
        """
        model = unwrapped(model)
        family_of(model)
        self.model, self.decoder = model, decoder_of(model)
        self.processor, self.tokenizer = processor, getattr(processor, "tokenizer", None)
        self.pruner = attach(model, "vanilla")

    @property
    def last_stats(self) -> Sequence[PruneStats]:
        """What happened to the tokens of each sample of the latest call."""
        return last_stats(self.model)

    def set_pruner(self, method: str | Pruner, **options: Any) -> Pruner:
        """Choose the method of all later answers; returns it. See :func:`llava_todre.hf.attach`."""
        pruner = resolve(method, options)
        with turn(self.model):  # not between a call of another thread and its statistics
            attach(self.model, pruner)  # raises before the active one is gone
            detach(self.model)
            detach(self.model)
            attach(self.model, pruner)
            self.pruner = pruner
        return pruner

    def _answer(
        self,
        requests: Sequence[Request],
        settings: dict[str, Any],
        timed: bool,
        image_cache: ImageCache | None,
    ) -> list[Answer]:
        """Answer in the processor's own chat template; stages are not measured.

        A video is given as its frames, for Qwen2.5-VL and Qwen3-VL with their seconds.
        """
        del timed
        if image_cache is None or any_refused(self.model, settings):
            inputs = self._processed(requests)
        else:
            inputs = self._shared(requests, image_cache)
        if settings.get("stop_strings") is not None:
            settings = {"tokenizer": self.processor.tokenizer, **settings}
        try:
            output = self.model.generate(**inputs, **settings)
        except TodreError:
            raise
        except (ValueError, TypeError, IndexError) as error:
            raise TodreError(
                f"{type(self.processor).__name__} and {type(self.model).__name__} do not fit each "
                f"other or this batch: {first_line(error)}"
            ) from error
        new = output[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(new, skip_special_tokens=True)
        stats = last_stats(self.model)
        for request, each in zip(requests, stats, strict=True):
            shown = len(request.images)
            # A video counts once, or once for each frame where the model takes them for images.
            if len(each.images) not in ((1, shown) if request.is_video else (shown,)):
                raise TodreError(
                    f"{type(self.processor).__name__} put {len(each.images)} of "
                    f"{1 if request.is_video else shown} images or "
                    "videos into the prompt; does this model read videos? Allowed: what its chat "
                    "template has a place for."
                )
        return [Answer(text.strip(), each) for text, each in zip(texts, stats, strict=True)]

    def _processed(self, requests: Sequence[Request]) -> Any:
        """Return what the processor makes of requests, where the model is."""
        inputs = self._inputs(requests).to(self.device)
        for key, value in inputs.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                inputs[key] = value.to(self.model.dtype)
        return inputs

    def _shared(self, requests: Sequence[Request], image_cache: ImageCache) -> dict[str, Any]:
        """Return the inputs of a call that reads only what is new."""
        try:
            prompts = [self._known(request, image_cache) for request in requests]
        finally:
            image_cache.trim()
        inputs = joined(prompts, self.processor.tokenizer.pad_token_id or 0, self.device)
        return inputs | {"prefixes": image_cache.prefixes}

    def _known(self, request: Request, image_cache: ImageCache) -> tuple[torch.Tensor, Shown]:
        """Return the (T,) ids of a request and what it shows, which is read where it is new."""
        names = tuple(map(lasting_identity, request.images))
        key = (request.is_video, tuple(request.seconds), names)
        known: Any = image_cache.find(key, self.pruner) if names else Shown([])
        short, placeholders = self._tokens(request), self._placeholders()
        ids = None if known is None else known.ids(short, placeholders)
        if ids is None:
            processed = self._processed([request])
            ids = processed["input_ids"][0].cpu()
            if known is None:
                images = encode(self.model, **processed)
                known = Shown.of(images, ids, short, placeholders)
                image_cache.add(key, self.pruner, request.images, known)
        return ids, known

    def _placeholders(self) -> torch.Tensor:
        """Return the ids that stand for an image or a video in a prompt."""
        tokens = [getattr(self.processor, name, None) for name in ("image_token", "video_token")]
        known = [self.processor.tokenizer.convert_tokens_to_ids(token) for token in tokens if token]
        return torch.tensor([token for token in known if isinstance(token, int)])

    def _tokens(self, request: Request) -> torch.Tensor:
        """Return (T,) ids of a prompt with one placeholder per image or video."""
        text = self._prompt(request, len(request.images))
        ids = self.processor.tokenizer(text, **self._begins([text]))["input_ids"]
        return torch.tensor(ids)

    def _begins(self, texts: Sequence[str]) -> dict[str, bool]:
        """Return what keeps a tokenizer from writing BOS where the template has written it."""
        begin = getattr(self.processor.tokenizer, "bos_token", None)
        written = isinstance(begin, str) and all(text.startswith(begin) for text in texts)
        return {"add_special_tokens": False} if written else {}

    def _inputs(self, requests: Sequence[Request]) -> Any:
        texts, images, videos = [], [], []
        for request in requests:
            if not request.question.replace(DEFAULT_IMAGE_TOKEN, "").strip():
                raise TodreError(f"question {request.question!r} is empty; give at least one word.")
            shown_images = [self._image(image) for image in request.images]
            texts.append(self._prompt(request, len(shown_images)))
            if request.is_video:
                videos.append(shown_images)
            elif shown_images:  # by request: OneVision cuts an image only where it is the only one
                images.append(shown_images)
        shown: dict[str, Any] = {}
        if videos:
            # The frames were chosen by whoever asks; a processor would choose among them again.
            shown = {"videos": videos, "do_sample_frames": False}
            of_videos = [request for request in requests if request.is_video]
            times = metadata_of(of_videos, self.config.model_type)
            shown |= {} if times is None else {"video_metadata": times}
        try:
            return self.processor(
                text=texts,
                images=images or None,
                **shown,
                **self._begins(texts),
                padding=True,
                padding_side="left",
                return_tensors="pt",
            )
        except (ValueError, TypeError) as error:  # such as videos of different lengths in one batch
            raise TodreError(
                f"{type(self.processor).__name__} does not take this batch of {len(requests)}: "
                f"{first_line(error)}"
            ) from error

    def _prompt(self, request: Request, num_images: int) -> str:
        """Return the prompt; images stand where the question says, or in front."""
        given = request.question.count(DEFAULT_IMAGE_TOKEN)
        kind, count = ("video", 1) if request.is_video else ("image", num_images)
        if given not in (0, count):
            raise TodreError(
                f"question contains {given} {DEFAULT_IMAGE_TOKEN} but {count} image(s) were given; "
                "the numbers must agree, or leave them out and they are put in front."
            )
        parts: list[dict[str, str]] = [{"type": kind}] * (count if given == 0 else 0)
        for piece in re.split(f"({DEFAULT_IMAGE_TOKEN})", request.question):
            if piece == DEFAULT_IMAGE_TOKEN:
                parts.append({"type": kind})
            elif piece.strip():
                parts.append({"type": "text", "text": piece if given == 0 else piece.strip()})
        conversation = [{"role": "user", "content": parts}]
        write = partial(
            self.processor.apply_chat_template, conversation, add_generation_prompt=True
        )
        try:
            return str(within("the chat template", write))
        except TodreError:
            raise
        except (ValueError, TypeError, MemoryError, TemplateError) as error:  # such as: it has none
            raise TodreError(
                f"{type(self.processor).__name__} cannot write the prompt: {first_line(error)}"
            ) from error

    def _image(self, image: Any) -> Any:
        """Return an image as it is shown; arrays are left to the processor."""
        if not isinstance(image, (str, os.PathLike, Image.Image)):
            return image
        shown = open_picture(image)
        if self.config.model_type == "llava":  # resizes by the short side, whatever comes
            processor = self.processor.image_processor
            mode = "pad" if getattr(processor, "do_pad", False) else "square"
            check_elongation(shown.size, dict(processor.size).get("shortest_edge") or 1, mode)
        return shown
