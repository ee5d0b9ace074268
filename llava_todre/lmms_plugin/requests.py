"""One call of lmms-eval: its items, the batches they form, and the images of each.

Batches depend on the requests alone, never on what is finished already, so an interrupted run
computes every answer in the same batch, and thus with the same rounding, as one that was not.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from PIL import Image

from llava_todre.errors import TodreError, unknown
from llava_todre.model.images import picture_digest
from llava_todre.video import read_clip

logger = logging.getLogger(__name__)
Given = TypeVar("Given")
Made = TypeVar("Made")
_SAMPLING = ("temperature", "top_p", "top_k")
_SEARCH = ("num_beams", "repetition_penalty")
_KNOWN = (*_SAMPLING, *_SEARCH, "max_new_tokens", "do_sample", "until", "image_aspect_ratio")

Key = tuple[str, str, int, int]
"""Task, split, ``doc_id``, ``repeat``."""


@dataclass(frozen=True, eq=False)
class Item:
    """One question about one document."""

    task: str
    split: str
    doc_id: int
    repeat: int
    """Counts the questions about this document, from 0."""
    prompt: str
    gen_kwargs: dict[str, Any]
    """The task's; never changed, as lmms-eval reads them again."""
    doc_to_visual: Callable[[Any], Any]

    @property
    def key(self) -> Key:
        """Unique among the items of a call."""
        return self.task, self.split, self.doc_id, self.repeat


def items_of(requests: Iterable[Any]) -> tuple[dict[Key, Item], list[Key]]:
    """Return the items of a call in order, and for each request the item that answers it.

    With several processes lmms-eval repeats the last request where a process has fewer than the
    others. It drops these answers, so they are not computed again.
    """
    items: dict[Key, Item] = {}
    keys: list[Key] = []
    seen: Counter[tuple[str, str, int]] = Counter()
    for request in requests:
        prompt, gen_kwargs, doc_to_visual, doc_id, task, split = request.args
        place = (task, split, doc_id)
        is_padding = bool((request.metadata or {}).get("__padding_only__"))
        repeat = 0 if is_padding else seen[place]
        seen[place] += not is_padding
        key = (*place, repeat)
        keys.append(key)
        items.setdefault(key, Item(*key, prompt, gen_kwargs, doc_to_visual))
    return items, keys


@dataclass(frozen=True, eq=False)
class Batch:
    """Items that are answered together."""

    items: tuple[Item, ...]
    shares_images: bool
    """Whether it is from data in which several documents show the same image."""

    def name(self, shown: Sequence[Shown]) -> str:
        """Return a hash of all inputs."""
        inputs: list[Any] = [self.shares_images]
        for item, visuals in zip(self.items, shown, strict=True):
            inputs.append([*item.key, item.prompt, item.gen_kwargs, *visuals.digests])
        return _hash(inputs)

    @contextmanager
    def named(self) -> Iterator[None]:
        """Log which documents a failure in the block is about."""
        try:
            yield
        except Exception:
            places: dict[tuple[str, str], list[int]] = {}
            for item in self.items:
                places.setdefault((item.task, item.split), []).append(item.doc_id)
            for (task, split), documents in sorted(places.items()):
                logger.error("task %s, split %s, documents %s failed", task, split, documents)
            raise


def batches_of(
    items: Iterable[Item],
    size: int,
    image_key: Callable[[Item], str | None],
    sharing: Container[tuple[str, str]] = (),
) -> list[Batch]:
    """Return batches of items with equal generation arguments, in order.

    Items about the same image follow each other, whatever their task.

    Args:
        items: all of them.
        size: items of a batch.
        image_key: identifies the images of an item; None for unknown.
        sharing: tasks and splits in which several documents show the same image.
    """
    groups: dict[Any, dict[Any, list[Item]]] = {}
    for item in items:
        again = (item.task, item.split) in sharing
        by_image = groups.setdefault((again, _as_json(item.gen_kwargs)), {})
        by_image.setdefault(image_key(item) or item.key, []).append(item)
    batches = []
    for (again, _), by_image in groups.items():
        ordered = [item for same in by_image.values() for item in same]
        for start in range(0, len(ordered), size):
            batches.append(Batch(tuple(ordered[start : start + size]), again))
    return batches


def generation(
    gen_kwargs: dict[str, Any], max_new_tokens: int
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return arguments for ``generate`` and the strings that end an answer.

    As in LLaVA, an answer is sampled only where the task gives a temperature above 0.
    ``image_aspect_ratio`` is ignored: it is for models without such a setting of their own.

    Args:
        gen_kwargs: the task's.
        max_new_tokens: where the task does not say.
    """
    for key in gen_kwargs:
        if key not in _KNOWN:
            raise unknown("generation argument", key, _KNOWN)
    given = {key: value for key, value in gen_kwargs.items() if value is not None}
    sampled = given.get("temperature", 0) > 0
    settings: dict[str, Any] = {"max_new_tokens": given.get("max_new_tokens", max_new_tokens)}
    settings["do_sample"] = sampled
    for key in (*_SEARCH, *(_SAMPLING if sampled else ())):
        if key in given:
            settings[key] = given[key]
    until = given.get("until", ())
    return settings, (until,) if isinstance(until, str) else tuple(until)


def cut(answer: str, until: Iterable[str]) -> str:
    """Return the answer up to the first of the strings that end it."""
    for end in until:
        answer = answer.split(end)[0] if end else answer
    return answer.strip()


def ahead(make: Callable[[Given], Made], things: Iterable[Given]) -> Generator[Made, None, None]:
    """Yield ``make(thing)`` for each; another thread makes the next one meanwhile.

    A thread rather than processes: decoding and resizing release the interpreter lock, and what
    lmms-eval knows about a document cannot be sent to a process.
    """
    waiting: deque[Future[Made]] = deque()
    pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")
    try:
        for thing in things:
            waiting.append(pool.submit(make, thing))
            if len(waiting) > 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------- images and videos


@dataclass(frozen=True)
class Shown:
    """The images of an item, or the frames of its video."""

    images: tuple[Image.Image, ...]
    is_video: bool
    digests: tuple[str, ...]
    """A hash of every image, or of the video file."""
    seconds: tuple[float, ...] = ()
    """Time stamp of each frame of the video, if the file has them."""

    @property
    def name(self) -> str | None:
        """A hash of all of it, the same for every item that shows it; None without images."""
        return _hash(self.digests) if self.digests else None


def shown_of(item: Item, visuals: Sequence[Any] | None, max_frames: int) -> Shown:
    """Return the images of an item.

    Args:
        item: for messages.
        visuals: what the task's ``doc_to_visual`` returned: PIL images, one video file, or nothing.
        max_frames: frames of a video.
    """
    given = [visual for visual in visuals or () if visual is not None]
    if len(given) == 1 and isinstance(given[0], (str, os.PathLike)):
        path = os.fspath(given[0])
        try:
            status = os.stat(path)
        except OSError as error:
            raise TodreError(f"video {path!r} cannot be read: {error.strerror}.") from None
        version = f"{os.path.basename(path)} {status.st_size} {status.st_mtime_ns}"
        clip = read_clip(path, max_frames, version)
        return Shown(clip.frames, True, (version,), clip.seconds)
    if not all(isinstance(visual, Image.Image) for visual in given):
        kinds = ", ".join(sorted({type(visual).__name__ for visual in given}))
        raise TodreError(
            f"document {item.doc_id} of {item.task} must show PIL images, one video file or "
            f"nothing, got {len(given)} of type {kinds}."
        )
    return Shown(tuple(given), False, tuple(picture_digest(image) for image in given))


def _hash(value: Any) -> str:
    return hashlib.sha256(_as_json(value).encode()).hexdigest()[:16]


def _as_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
