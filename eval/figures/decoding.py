"""Where generated tokens look, by kind of token and decoder layer (paper: Figure 5)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from eval.figures.attention import received
from eval.figures.sources import Data, Sources, held_out_note, middle, opened
from eval.figures.style import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PAGE,
    bands,
    legend_above,
    letter,
    new_figure,
    some,
)
from eval.mini import held_out
from llava_todre.model.images import process_images
from llava_todre.model.prompt import build_prompt, tokenizer_image_token
from llava_todre.pruners import LayerView, Observed

PICTURES = 12
TASKS = ("exist", "count", "relation", "read")
"""Of the nine, those drawn: one per kind of answer."""
KINDS = {
    "system": ("system prompt", BLACK, "s", "--"),
    "visual": ("visual tokens", ORANGE, "o", "-"),
    "question": ("question", BLUE, "^", "-."),
    "generated": ("generated tokens", GREEN, "D", ":"),
}
_MAX_NEW_TOKENS = 8


@torch.inference_mode()
def gather(sources: Sources) -> Data:
    """Return how the attention of generated tokens is shared out, per task and layer.

    The answer is generated first; then prompt and answer run in one pass, which gives the generated
    tokens the attention they have in cached decoding. The last token of an answer is never fed
    back, so it does not count.
    """
    tokenizer, model = opened(sources.model)
    pictures = sources.pictures(PICTURES)
    samples = held_out(pictures)
    seen: dict[str, list[list[dict[str, float]]]] = {}
    processor = model.get_vision_tower().image_processor
    for sample in samples:
        pixels = process_images([sample.image], processor, model.config)[0].to(model.device)
        visual = model.encode_images([pixels], [sample.image.size])
        prompts = [
            torch.tensor(tokenizer_image_token(build_prompt(question.text, 1), tokenizer))
            for question in sample.questions
        ]
        model.set_pruner("vanilla")
        ids = pad_sequence(prompts, batch_first=True, padding_side="left").to(model.device)
        mask = pad_sequence([torch.ones_like(p) for p in prompts], True, 0, "left")
        new = model.generate(
            ids,
            images=visual * len(prompts),
            attention_mask=mask.to(model.device),
            do_sample=False,
            max_new_tokens=_MAX_NEW_TOKENS,
        )
        for question, prompt, row in zip(sample.questions, prompts, new, strict=True):
            fed = _fed_back(row, model.generation_config.eos_token_id)
            if len(fed) == 0:
                continue
            layers: list[dict[str, float]] = []

            def look(
                view: LayerView, into: list[dict[str, float]] = layers, count: int = len(fed)
            ) -> None:
                into.append(received(view, count))

            model.set_pruner(Observed(look=look))
            whole = torch.cat([prompt.to(fed.device), fed])[None]
            model(input_ids=whole, images=visual, logits_to_keep=1)
            seen.setdefault(question.task, []).append(layers)
    tasks = {
        task: {
            kind: [middle([each[kind] for each in layer]) for layer in zip(*answers, strict=True)]
            for kind in KINDS
        }
        for task, answers in seen.items()
    }
    questions = sum(len(answers) for answers in seen.values())
    return {
        "tasks": tasks,
        "note": held_out_note(sources, pictures, questions)
        + " Unpruned; queries are the tokens of the answer that are fed back; mean over heads,"
        " tokens and questions; bands: 10th to 90th percentile of questions.",
    }


def _fed_back(row: Tensor, ends: int | list[int] | None) -> Tensor:
    """Return the generated ids (M,) without the last one of the answer and what comes after it."""
    stops = torch.tensor([ends] if isinstance(ends, int) else ends or [], device=row.device)
    found = torch.isin(row, stops).nonzero()[:, 0]
    return row[: int(found[0]) if len(found) else len(row) - 1]


def draw(data: Data) -> Any:
    """Return the figure: a panel per task."""
    shown = [task for task in TASKS if task in data["tasks"]] or list(data["tasks"])[: len(TASKS)]
    figure = new_figure(PAGE, 2.25, data["note"])
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, task, mark in zip(panels, shown, "abcd", strict=False):
        letter(axes, f"({mark}) {task}")
        for kind, look in KINDS.items():
            bands(axes, data["tasks"][task][kind], look, 0.15, markersize=2.8)
        layers = range(len(data["tasks"][task]["visual"]))
        axes.set(xlabel="decoder layer", ylim=(-0.03, 1.0), xticks=some(layers))
    panels[0].set_ylabel("share of attention")
    legend_above(figure, panels[0])
    return figure
