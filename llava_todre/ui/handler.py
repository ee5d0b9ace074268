"""One visitor's question to both methods, as news for the parts of the page.

News are dictionaries from the id of a part, like ``status`` or ``left-answer``, to what it shows.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from llava_todre.errors import TodreError
from llava_todre.ui import summary as facts
from llava_todre.ui.drawing import kept_picture
from llava_todre.ui.progress import Stopped
from llava_todre.ui.session import Outcome, Question, Step, Studio
from llava_todre.ui.uploads import Upload, read_upload

SIDES = ("Left", "Right")
RESULTS = ("answer", "kept", "facts", "chart")
"""What there is of each side; the id of a part is, for example, ``left-kept``."""
_LOG = logging.getLogger(__name__)

News = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What the visitor has set."""

    path: str | Path | None
    """The file to look at."""
    question: str
    max_new_tokens: int
    num_frames: int
    """Of a video."""
    every_layer: bool
    wanted: Sequence[tuple[str, float]]
    """Method and share of tokens of each side."""


def part(side: str, name: str) -> str:
    """Return the id of one of the :data:`RESULTS` of a side."""
    return f"{side.lower()}-{name}"


def visit(studio: Studio, settings: Settings, stop: Event) -> Iterator[News]:
    """Yield news until both sides have answered, one has failed, or ``stop`` is set.

    Nothing is raised: what goes wrong is news, too.
    """
    try:
        yield {"status": facts.progress("Reads the file.")}
        if settings.path is None:
            raise TodreError("There is nothing to look at: upload a file, or pick an example.")
        upload = read_upload(settings.path, settings.num_frames)
        question = Question(
            upload, settings.question, settings.max_new_tokens, settings.every_layer
        )
        for side, (method, ratio) in zip(SIDES, settings.wanted, strict=True):
            for news in studio.answer(question, method, ratio, stop):
                yield (
                    _step(side, method, news)
                    if isinstance(news, Step)
                    else _outcome(studio, side, upload, news)
                )
        yield {"status": facts.progress("Stopped." if stop.is_set() else "Done.")}
    except Stopped:
        yield {"status": facts.progress("Stopped.")}
    except Exception as error:
        yield {"status": facts.alert(reason(error))}


def reason(error: Exception) -> str:
    """Return one line for the visitor; what nobody foresaw goes to the log as well."""
    if isinstance(error, TodreError):
        return str(error)
    _LOG.error("the demo page failed", exc_info=error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _step(side: str, method: str, step: Step) -> News:
    line = facts.progress(f"{side}, {method}: {step.line}.")
    return {"status": line, part(side, "answer"): step.text}


def _outcome(studio: Studio, side: str, upload: Upload, outcome: Outcome) -> News:
    vlm = studio.vlm
    shown = {
        "answer": outcome.text,
        "kept": kept_picture(upload, outcome.stats, vlm.model) if vlm.draws_tokens else None,
        "facts": facts.facts(outcome, vlm),
        "chart": facts.chart(outcome, len(outcome.stats.prompt_tokens_per_layer)),
    }
    return {part(side, name): value for name, value in shown.items()}
