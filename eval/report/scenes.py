"""The part of a report that shows single pictures: what was kept, what was asked and answered.

Kept tokens are found by asking again, with the methods of the stored runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from eval.mini import Sample
from eval.report.answers import Asked
from eval.report.page import Html, grid, heading, mark, paragraph, picture, table, text
from llava_todre.pruners import Pruner
from llava_todre.viz import kept_picture
from llava_todre.vlm import Request, answer

NUM_SCENES = 3
_WIDTH = 320
_LEGEND = (
    "Kept tokens show their pixels, dropped ones are dimmed; yellow frames are kept tokens of the "
    "thumbnail. Per layer: visual tokens that a decoder layer processes, newlines included, mean "
    "over the layers."
)


def with_pictures(
    model: Any,
    tokenizer: Any,
    samples: Sequence[Sample],
    pruners: Callable[[int], Mapping[str, Pruner]],
    asked: Sequence[Sequence[Asked]],
) -> list[Html]:
    """Return the pictures of the bundled model's questions, and the answers below each.

    Args:
        model: of our own class.
        tokenizer: of the model.
        samples: pictures with their questions.
        pruners: number of a picture -> label -> method.
        asked: of each picture; may be empty.
    """
    parts: list[Html] = []
    for index, (sample, questions) in enumerate(zip(samples, asked, strict=True)):
        question = sample.questions[index % len(sample.questions)].text
        image = sample.image.convert("RGB")
        cards = _kept(model, tokenizer, image, question, pruners(index))
        parts += [heading(f"Picture {index + 1}"), grid(cards, "cards"), *answers(questions)]
    return [*parts, paragraph(_LEGEND, "note")]


def answers(asked: Sequence[Asked]) -> list[Html]:
    """Return what was asked and answered as a table, right answers and wrong ones marked."""
    labels = list(dict.fromkeys(label for each in asked for label in each.given))
    rows = [
        [
            each.question,
            each.task,
            each.expected,
            *(mark(*each.given[label]) if label in each.given else "" for label in labels),
        ]
        for each in asked
    ]
    header = ["question", "task", "right answer", *labels]
    return [table(header, rows, left=len(header))] if labels else []


def _kept(
    model: Any, tokenizer: Any, image: Image.Image, question: str, pruners: Mapping[str, Pruner]
) -> list[Html]:
    """Return one picture per method; the model has its own method again afterwards."""
    before = model.pruner
    cards = []
    try:
        for label, pruner in pruners.items():
            model.set_pruner(pruner)
            (given,) = answer(model, tokenizer, [Request(question, [image])], max_new_tokens=8)
            stats = given.stats.images[0]
            drawn = kept_picture(image, stats, model, max(1.0, _WIDTH / image.width))
            entered = f"{len(stats.keep_idx)} of {stats.num_tokens} tokens enter the decoder"
            layers = f"{given.stats.mean_visual_tokens:.0f} per layer"
            caption = Html(f"<b>{text(label)}</b><br>{entered}, {layers}")
            cards.append(picture(drawn, caption, f"Visual tokens kept by {label}: {entered}"))
    finally:
        model.set_pruner(before)
    return cards
