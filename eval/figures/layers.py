"""Attention between text and visual tokens in each decoder layer of a prefill (paper: Figure 2)."""

from __future__ import annotations

from typing import Any

from eval.figures.attention import ratios
from eval.figures.sources import Data, Sources, held_out_note, middle, opened
from eval.figures.style import (
    BLACK,
    BLUE,
    COLUMN,
    GREY,
    ORANGE,
    PALE,
    SMALL,
    VERMILION,
    bands,
    legend_above,
    letter,
    new_figure,
    some,
)
from eval.mini import held_out
from llava_todre.pruners import Combined, LayerView, Observed, Pruner, create_pruner
from llava_todre.pruners.todre import Todre
from llava_todre.vlm import Request, answer

PICTURES = 12
RATIO = 0.10
_TRAINED_IN = " In this model the fall of text to visual was trained in."
SHOWN = {
    "after_image to visual": ("text after the image to visual", ORANGE, "o", "-"),
    "all to visual": ("all text to visual", VERMILION, "s", "--"),
    "visual to all": ("visual to all text", BLUE, "^", "-"),
    "visual to after_image": ("visual to text after the image", GREY, "v", ":"),
}


def gather(sources: Sources) -> Data:
    """Return both ratios of Eq. 8 per layer, over questions about held-out pictures."""
    tokenizer, model = opened(sources.model)
    pictures = sources.pictures(PICTURES)
    samples = held_out(pictures)
    stages: dict[str, Pruner | None] = {
        "all visual tokens": None,
        f"todre, {RATIO:.0%} of them": create_pruner("todre", retain_ratio=RATIO, probe_depths=()),
    }
    panels = {}
    for name, before in stages.items():
        seen: list[dict[str, list[float]]] = [
            {key: [] for key in SHOWN} for _ in range(model.config.num_hidden_layers)
        ]

        def look(view: LayerView, seen: list[dict[str, list[float]]] = seen) -> None:
            for text, (to_visual, to_text) in ratios(view).items():
                seen[view.layer][f"{text} to visual"].append(to_visual)
                seen[view.layer][f"visual to {text}"].append(to_text)

        observer = Observed(look=look)
        model.set_pruner(observer if before is None else Combined(before=before, inside=observer))
        for sample in samples:
            asked = [Request(question.text, [sample.image]) for question in sample.questions]
            answer(model, tokenizer, asked, max_new_tokens=1)
        panels[name] = {key: [middle(layer[key]) for layer in seen] for key in SHOWN}
    questions = sum(len(sample.questions) for sample in samples)
    todre = Todre()
    return {
        "panels": panels,
        "tau": todre.tau,
        "probe_layers": list(todre.probe_layers(model.config.num_hidden_layers)),
        "note": held_out_note(sources, pictures, questions)
        + " Mean over heads, tokens and questions; bands: 10th to 90th percentile of questions."
        " Visual tokens cannot see text after them: that share is 0."
        + (_TRAINED_IN if sources.model is None else ""),
    }


def draw(data: Data) -> Any:
    """Return the figure: a panel without pruning, a panel after Stage 1."""
    figure = new_figure(COLUMN, 4.0, data["note"])
    panels = figure.subplots(len(data["panels"]), 1, sharex=True, sharey=True)
    for axes, (name, series), mark in zip(panels, data["panels"].items(), "ab", strict=True):
        letter(axes, f"({mark}) {name}")
        layers = range(len(next(iter(series.values()))))
        for key, look in SHOWN.items():
            bands(axes, series[key], look, 0.18)
        axes.axhline(data["tau"], color=BLACK, linewidth=0.7, dashes=(4, 2))
        axes.text(
            0.69 * len(layers) - 0.65,
            data["tau"] + 0.03,
            rf"$\tau$ = {data['tau']:.2f}",
            fontsize=SMALL,
        )
        for probe in data["probe_layers"]:
            axes.axvspan(probe - 0.3, probe + 0.3, color=PALE, zorder=0, linewidth=0)
            axes.text(probe, 0.97, "probe", fontsize=SMALL, ha="center", va="top")
        axes.set(ylabel="share of attention", ylim=(-0.03, 1.0), xticks=some(layers))
    panels[-1].set_xlabel("decoder layer")
    legend_above(figure, panels[0], ncols=2, columnspacing=1.2)
    return figure
