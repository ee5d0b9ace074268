"""One model, one question at a time: the growing answer, then the outcome."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from threading import Event
from typing import Any

from PIL import Image
from transformers import StoppingCriteriaList

from llava_todre.errors import TodreError
from llava_todre.pruners import PRUNERS, Observed, Pruner, create_pruner
from llava_todre.request import Answer, Request
from llava_todre.stats import Probe, PruneStats
from llava_todre.ui.progress import Stopped, Tell, Words, watching
from llava_todre.ui.uploads import Upload
from llava_todre.vlm import load

_UPDATE_S = 0.05
"""Seconds between two updates of a visitor's page, at least."""


@dataclass(frozen=True)
class Question:
    """The question to both sides."""

    upload: Upload
    text: str
    max_new_tokens: int = 64
    every_layer: bool = True
    """Whether an extra pass measures the attention ratios after every layer."""


@dataclass(frozen=True)
class Step:
    """Progress of an answer."""

    line: str
    text: str = ""


@dataclass(frozen=True)
class Outcome:
    """An answer, its statistics and times."""

    text: str
    name: str
    """The method, with its share of tokens if it takes one."""
    pruner: Pruner
    stats: PruneStats
    new_tokens: int
    times_ms: dict[str, float]
    """By stage, in order."""
    stopped: bool
    ratios: tuple[Probe, ...] = ()
    """One probe per layer that held visual tokens; () when they were not measured."""
    no_ratios: str = ""
    """Why they were not measured."""


class Studio:
    """A model that answers one question after the other, in its own thread."""

    def __init__(self, path: str, **options: Any) -> None:
        """Load, and answer once, so that the first times are those of a warm model.

        Args:
            path: folder or hub id.
            options: see :func:`llava_todre.load`.

        Raises:
            TodreError: the checkpoint cannot be loaded.
        """
        self.vlm = load(path, **options)
        self._stop = Event()
        """Of the current answer."""
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="studio")
        self.vlm.set_pruner("uniform", retain_tokens=1)
        self.vlm.ask(Image.new("RGB", (64, 64), "white"), "What is this?", max_new_tokens=1)

    def methods(self) -> list[str]:
        """Return the names of the methods that this model can run with their defaults."""
        return [name for name in PRUNERS if self._runs(name)]

    def _runs(self, name: str) -> bool:
        try:
            self.vlm.set_pruner(create_pruner(name))
        except TodreError:
            return False
        return True

    def close(self) -> None:
        """Stop the current answer, and take no more questions."""
        self._stop.set()
        self._worker.shutdown(cancel_futures=True)

    def answer(
        self, question: Question, method: str, ratio: float, stop: Event
    ) -> Iterator[Step | Outcome]:
        """Yield the progress of the answer, then the outcome.

        Args:
            question: with its image or video.
            method: a name of the registry, or A+B.
            ratio: share of the visual tokens to keep; no effect on vanilla.
            stop: may be set by another thread at any time.

        Raises:
            TodreError: the model or the method refuses the question.
            Stopped: ``stop`` was set before the first token.
        """
        latest = Step("waits for the model")

        def tell(line: str) -> None:
            nonlocal latest
            latest = Step(line, latest.text)

        def say(text: str) -> None:
            nonlocal latest
            latest = Step("writes", text)

        work = self._worker.submit(self._answer, question, method, ratio, stop, tell, say)
        shown = None
        try:
            while not wait([work], timeout=_UPDATE_S).done:
                if latest != shown:
                    shown = latest
                    yield shown
            yield work.result()
        finally:
            if not work.done():  # the visitor has left
                stop.set()

    def _answer(
        self,
        question: Question,
        method: str,
        ratio: float,
        stop: Event,
        tell: Tell,
        say: Callable[[str], None],
    ) -> Outcome:
        budget = has_budget(method)
        pruner = create_pruner(method, **({"retain_ratio": ratio} if budget else {}))
        name = f"{method} {ratio:.0%}" if budget else method
        ratios: tuple[Probe, ...] = ()
        reason = "" if question.every_layer else "not requested"
        if question.every_layer:  # first, so that the answer is timed on a warm model
            try:
                ratios = self._ratios(question, pruner, stop, tell)
            except TodreError as error:
                reason = str(error)
        tell("prepares the image")
        start = time.perf_counter()
        given, words = self._run(question, pruner, question.max_new_tokens, stop, tell, say)
        end = time.perf_counter()
        first = words.first_at or end
        times = given.stages_ms or {
            "up to the first token": (first - start) * 1e3,
            "the other tokens": (end - first) * 1e3,
        }
        stopped = stop.is_set()
        return Outcome(
            given.text, name, pruner, given.stats, len(words.ids), times, stopped, ratios, reason
        )

    def _ratios(
        self, question: Question, pruner: Pruner, stop: Event, tell: Tell
    ) -> tuple[Probe, ...]:
        """Run the prompt with every layer measured."""

        def measuring(line: str) -> None:
            tell(f"measures the attention of every layer: {line}")

        observed = Observed(method=pruner)
        given, _ = self._run(question, observed, 1, stop, measuring, lambda text: None)
        return tuple(probe for probe in given.stats.probes if probe.text_to_visual is not None)

    def _run(
        self,
        question: Question,
        pruner: Pruner,
        max_new_tokens: int,
        stop: Event,
        tell: Tell,
        say: Callable[[str], None],
    ) -> tuple[Answer, Words]:
        self._stop = stop
        if stop.is_set():
            raise Stopped
        self.vlm.set_pruner(pruner)
        upload = question.upload
        request = Request(question.text, upload.images, upload.is_video, upload.seconds)
        words = Words(self.vlm.tokenizer, say, stop)
        with watching(self.vlm.model, self.vlm.decoder.layers, words, tell, stop):
            (given,) = self.vlm.answer(
                [request],
                max_new_tokens=max_new_tokens,
                timed=True,
                streamer=words,
                stopping_criteria=StoppingCriteriaList([words]),
            )
        return given, words


def has_budget(method: str) -> bool:
    """Return whether a method takes a share of tokens; the unpruned model does not."""
    return method.partition("+")[0] != "vanilla"
