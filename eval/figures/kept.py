"""Tokens that several methods keep of one image, at two ratios (paper: Figure 1)."""

from __future__ import annotations

import textwrap
from typing import Any

from PIL import Image

from eval.figures.canvas import panel, write_line
from eval.figures.pictures import (
    MAX_NEW_TOKENS,
    cell,
    counts,
    geometry,
    method_at,
    verdict,
    views_of,
)
from eval.figures.sources import Data, Sources, opened
from eval.figures.style import DARK, PAGE, TEXT, new_figure
from eval.mini import TEST_SEED, held_out
from llava_todre.vlm import Request, answer

METHODS = ("random", "fastervlm", "divprune", "todre_v1", "todre")
GOES_BY = {
    "random": "chance",
    "fastervlm": "[CLS] attention",
    "divprune": "diversity",
    "todre_v1": "diversity, k-center",
    "todre": "diversity, max-sum",
}
RATIOS = (0.25, 0.10)
PICTURE, TASK = 0, "read"


def gather(sources: Sources) -> Data:
    """Return what each method keeps of the first held-out picture, and the answer it leads to."""
    tokenizer, model = opened(sources.model)
    sample = held_out(PICTURE + 1)[PICTURE]
    question = next(each for each in sample.questions if each.task == TASK)

    def ask(method: str, ratio: float) -> Any:
        model.set_pruner(method_at(method, ratio, PICTURE))
        asked = [Request(question.text, [sample.image])]
        return answer(model, tokenizer, asked, max_new_tokens=MAX_NEW_TOKENS)[0]

    full = ask("vanilla", 1.0)
    rows = [
        [cell(method, ask(method, ratio), question.answer) for method in METHODS]
        for ratio in RATIOS
    ]
    return {
        "picture": PICTURE,
        "question": question.text,
        "expected": question.answer,
        "geometry": geometry(model, full.stats.images[0]),
        "unpruned": cell("unpruned", full, question.answer),
        "ratios": list(RATIOS),
        "rows": rows,
        "note": f"{sources.whose()}; the first held-out picture, seed {TEST_SEED}. Large: the crops"
        " put together; small: the thumbnail of the whole picture. Every bright square is a token"
        " that enters the decoder; dimmed ones are dropped before it. Counted: tokens of the crops,"
        " plus those of the thumbnail.",
    }


HEIGHT, SIDE, PITCH = 4.02, 1.075, 1.154
_LEFT, _TOP, _ROW = 0.06, 0.33, 1.72
"""Inches: of the figure, of a picture, between columns; of the first corner, between rows."""


def draw(data: Data) -> Any:
    """Return the figure: a column per method, a row per ratio."""
    place = data["geometry"]
    image = held_out(data["picture"] + 1)[data["picture"]].image
    figure = new_figure(PAGE, HEIGHT, data["note"])
    figure.set_layout_engine("none")
    _column_title(figure, 0, "unpruned", "every token")
    _cell(figure, image, place, data["unpruned"], (0, 0), "100% kept")
    _question(figure, data)
    for row, (ratio, cells) in enumerate(zip(data["ratios"], data["rows"], strict=True)):
        for column, given in enumerate(cells, 1):
            if row == 0:
                _column_title(figure, column, given["method"], GOES_BY.get(given["method"], ""))
            _cell(figure, image, place, given, (column, row), f"{ratio:.0%} kept")
    return figure


def _cell(
    figure: Any, image: Image.Image, place: Data, given: Data, at: tuple[int, int], kept: str
) -> None:
    """Draw crops, thumbnail and answer of one method."""
    left, top = _LEFT + at[0] * PITCH, _TOP + at[1] * _ROW
    small, large = views_of(image, place, given["keep_idx"])
    panel(figure, left, top, SIDE, large or small)
    panel(figure, left, top + SIDE + 0.04, SIDE / 2 - 0.02, small)
    few, of_few, many, of_many = counts(place, given["keep_idx"])
    words, colour = verdict(given)
    for line, (text, style) in enumerate(
        (
            (kept, {}),
            (words, {"colour": colour, "weight": "bold"}),
            (f"{many} of {of_many}", {"colour": DARK}),
            (f"+ {few} of {of_few}", {"colour": DARK}),
        )
    ):
        write_line(figure, left + SIDE / 2 + 0.05, top + SIDE + 0.135 + 0.12 * line, text, **style)


def _column_title(figure: Any, column: int, name: str, goes_by: str) -> None:
    left = _LEFT + column * PITCH
    write_line(figure, left, _TOP - 0.165, name, weight="bold", fontsize=TEXT)
    write_line(figure, left, _TOP - 0.05, goes_by, colour=DARK)


def _question(figure: Any, data: Data) -> None:
    """Write what was asked where the unpruned model would stand a second time."""
    lines = [*textwrap.wrap(data["question"], 16), "", "right answer:", data["expected"]]
    for line, text in enumerate(lines):
        write_line(figure, _LEFT, _TOP + _ROW + 0.3 + 0.145 * line, text, fontsize=TEXT)
