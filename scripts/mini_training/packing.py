"""Many questions about one image in one sequence.

B images, T text tokens. A question's tokens are its prompt and its answer; `</s>` is only ever a
target. See `network.py` for how the segments keep the questions apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eval.mini.questions import Question
from scripts.mini_training.network import PackedText
from scripts.mini_training.tokenizer import PromptEncoder

NO_TARGET = -100


@dataclass(frozen=True)
class PackedQuestions:
    """`targets`: int64 (B, T), the next token where it belongs to an answer, else -100."""

    text: PackedText
    targets: Tensor


def pack_questions(
    questions: Sequence[Sequence[Question]], encoder: PromptEncoder
) -> PackedQuestions:
    """Pack the questions of each image; shorter sequences are padded on the right."""
    rows: list[tuple[list[int], list[int], list[int], list[int]]] = []
    for asked in questions:
        ids: list[int] = []
        segments: list[int] = []
        offsets: list[int] = []
        targets: list[int] = []
        for segment, question in enumerate(asked):
            prompt, answer = encoder.prompt(question), encoder.answer(question)
            ids += [*prompt, *answer]
            segments += [segment] * (len(prompt) + len(answer))
            offsets += range(len(prompt) + len(answer))
            targets += [NO_TARGET] * (len(prompt) - 1) + [*answer, encoder.eos]
        rows.append((ids, segments, offsets, targets))
    longest = max(len(row[0]) for row in rows)
    padded = [
        torch.tensor([row[i] + [fill] * (longest - len(row[i])) for row in rows])
        for i, fill in enumerate((0, -1, 0, NO_TARGET))
    ]
    return PackedQuestions(PackedText(*padded[:3]), padded[3])
