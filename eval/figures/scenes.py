"""Attention against diversity on several images and questions (paper: Figure 7)."""

from __future__ import annotations

import textwrap
from functools import partial
from typing import Any

from eval.figures.canvas import panel, write_line
from eval.figures.pictures import (
    MAX_NEW_TOKENS,
    cell,
    geometry,
    method_at,
    verdict,
    views_of,
)
from eval.figures.sources import Data, Sources, opened
from eval.figures.style import PAGE, TEXT, new_figure
from eval.mini import TEST_SEED, held_out
from llava_todre.vlm import Request, answer

METHODS = ("fastervlm", "todre")
ROWS = {"fastervlm": "[CLS] attention\n(fastervlm)", "todre": "diversity\n(todre)"}
RATIO = 0.10
TASKS = ("exist", "count", "where", "relation", "read")
"""One per picture, in the order of the held-out pictures."""


def gather(sources: Sources) -> Data:
    """Return what an attention-driven and a diversity-driven method keep of the first pictures."""
    tokenizer, model = opened(sources.model)
    columns = []
    for picture, (sample, task) in enumerate(zip(held_out(len(TASKS)), TASKS, strict=True)):
        question = next(each for each in sample.questions if each.task == task)
        cells = []
        for method in ("vanilla", *METHODS):
            model.set_pruner(method_at(method, 1.0 if method == "vanilla" else RATIO, picture))
            asked = [Request(question.text, [sample.image])]
            given = answer(model, tokenizer, asked, max_new_tokens=MAX_NEW_TOKENS)[0]
            cells.append(cell(method, given, question.answer))
            if method == "vanilla":
                place = geometry(model, given.stats.images[0])
        columns.append({"question": question.text, "geometry": place, "cells": cells})
    return {
        "columns": columns,
        "ratio": RATIO,
        "note": f"{sources.whose()}; the first {len(TASKS)} held-out pictures, seed {TEST_SEED},"
        f" one task each. {RATIO:.0%} of the tokens of thumbnail and crops are kept. Large: the"
        " crops put together; small: the thumbnail; bright squares are kept tokens.",
    }


HEIGHT, SIDE, PITCH = 5.8, 1.18, 1.25
_LEFT, _TOP = 0.74, 0.43
_ROWS = (0.0, 1.37, 3.24)
"""Inches: of the figure, of a picture, between columns; of the first corner; rows below it."""


def draw(data: Data) -> Any:
    """Return the figure: a column per picture; unpruned, by attention, by diversity."""
    figure = new_figure(PAGE, HEIGHT, data["note"])
    figure.set_layout_engine("none")
    images = [sample.image for sample in held_out(len(data["columns"]))]

    write = partial(write_line, figure)
    for down, given in zip(_ROWS, data["columns"][0]["cells"], strict=True):
        name = ROWS.get(given["method"], "unpruned")
        middle = _TOP + down + SIDE / 2
        write(0.33, middle, name, fontsize=TEXT, rotation=90, ha="center", va="center")
    for column, shown in enumerate(data["columns"]):
        left = _LEFT + column * PITCH
        asked = textwrap.wrap(shown["question"], 25)
        for line, text in enumerate(asked):
            write(left, _TOP - 0.05 - 0.11 * (len(asked) - 1 - line), text)
        for down, given in zip(_ROWS, shown["cells"], strict=True):
            top = _TOP + down
            small, large = views_of(images[column], shown["geometry"], given["keep_idx"])
            panel(figure, left, top, SIDE, large or small)
            words, colour = verdict(given)
            if down == 0:
                write(left, top + SIDE + 0.1, words, colour=colour, weight="bold")
                continue
            panel(figure, left, top + SIDE + 0.03, SIDE / 2 - 0.02, small)
            for line, text in enumerate(textwrap.wrap(words, 10)):
                place = left + SIDE / 2 + 0.03, top + SIDE + 0.13 + 0.11 * line
                write(*place, text, colour=colour, weight="bold")
    return figure
