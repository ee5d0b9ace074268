"""One visitor's question to both methods, as updates of the page.

An update maps the id of a part, such as ``status`` or ``left-answer``, to its new content.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from llava_todre.errors import TodreError
from llava_todre.ui import summary
from llava_todre.ui.drawing import kept_picture
from llava_todre.ui.progress import Stopped
from llava_todre.ui.session import Outcome, Question, Step, Studio
from llava_todre.ui.uploads import Upload, read_upload

SIDES = ("Left", "Right")
RESULTS = ("answer", "kept", "facts", "chart")
"""Parts of each side; the id of one is, for example, ``left-kept``."""
_LOG = logging.getLogger(__name__)

Update = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """The visitor's choices."""

    path: str | Path | None
    """The image or video."""
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


def visit(studio: Studio, settings: Settings, stop: Event) -> Iterator[Update]:
    """Yield updates until both sides have answered, one has failed, or ``stop`` is set.

    Nothing is raised: errors are updates, too.
    """
    try:
        yield {"status": summary.progress("Reads the file.")}
        if settings.path is None:
            raise TodreError("There is no image yet: upload a file, or pick an example.")
        upload = read_upload(settings.path, settings.num_frames)
        question = Question(
            upload, settings.question, settings.max_new_tokens, settings.every_layer
        )
        for side, (method, ratio) in zip(SIDES, settings.wanted, strict=True):
            for update in studio.answer(question, method, ratio, stop):
                yield (
                    _step(side, method, update)
                    if isinstance(update, Step)
                    else _outcome(studio, side, upload, update)
                )
        yield {"status": summary.progress("Stopped." if stop.is_set() else "Done.")}
    except Stopped:
        yield {"status": summary.progress("Stopped.")}
    except Exception as error:
        yield {"status": summary.alert(reason(error))}


def reason(error: Exception) -> str:
    """Return one line for the visitor; unexpected errors go to the log as well."""
    if isinstance(error, TodreError):
        return str(error)
    _LOG.error("the demo page failed", exc_info=error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _step(side: str, method: str, step: Step) -> Update:
    line = summary.progress(f"{side}, {method}: {step.line}.")
    return {"status": line, part(side, "answer"): step.text}


def _outcome(studio: Studio, side: str, upload: Upload, outcome: Outcome) -> Update:
    vlm = studio.vlm
    shown = {
        "answer": outcome.text,
        "kept": kept_picture(upload, outcome.stats, vlm.model) if vlm.draws_tokens else None,
        "facts": summary.facts_table(outcome, vlm),
        "chart": summary.chart(outcome, len(outcome.stats.prompt_tokens_per_layer)),
    }
    return {part(side, name): value for name, value in shown.items()}
