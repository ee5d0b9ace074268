"""How ToDRE works, drawn with the numbers of one real question (paper: Figure 4; our own drawing).

Places are in inches from the lower left corner.
"""

from __future__ import annotations

import textwrap
from typing import Any

from PIL import Image

from eval.figures.attention import ratios
from eval.figures.canvas import arrow, box, place_image, write
from eval.figures.pictures import (
    MAX_NEW_TOKENS,
    geometry,
    views_of,
)
from eval.figures.sources import Data, Sources, opened
from eval.figures.style import (
    BLACK,
    BLUE,
    DARK,
    GREY,
    ORANGE,
    PAGE,
    PALE,
    TEXT,
    VERMILION,
    new_figure,
    some,
)
from eval.mini import TEST_SEED, held_out
from llava_todre.pruners import Combined, LayerView, Observed, create_pruner
from llava_todre.pruners.todre import Todre
from llava_todre.spans import TokenType
from llava_todre.vlm import Request, answer

RATIO = 0.10
PICTURE, TASK = 0, "read"
HEIGHT = 3.25
_KINDS = {
    "system": ("system prompt", GREY, ""),
    "visual": ("visual tokens", ORANGE, "////"),
    "text": ("question", BLUE, ""),
}


def gather(sources: Sources) -> Data:
    """Return what both stages did to one held-out question."""
    tokenizer, model = opened(sources.model)
    sample = held_out(PICTURE + 1)[PICTURE]
    question = next(each for each in sample.questions if each.task == TASK)
    asked = [Request(question.text, [sample.image])]
    model.set_pruner("todre", retain_tokens=1, probe_depths=())
    first_of_all = answer(model, tokenizer, asked, max_new_tokens=1)[0].stats.images[0]
    (pivot,) = first_of_all.keep_idx.tolist()
    kinds: dict[str, int] = {}
    shares: list[float] = []

    def look(view: LayerView) -> None:
        for name, kind in (("system", TokenType.SYSTEM), ("text", TokenType.TEXT)):
            kinds[name] = int((view.kinds == kind).sum())
        shares.append(max(ratios(view)["after_image"]))

    first = create_pruner("todre", retain_ratio=RATIO, probe_depths=())
    model.set_pruner(Combined(before=first, inside=Observed(look=look)))
    answer(model, tokenizer, asked, max_new_tokens=1)
    model.set_pruner("todre", retain_ratio=RATIO)
    given = answer(model, tokenizer, asked, max_new_tokens=MAX_NEW_TOKENS)[0]
    stats = given.stats
    return {
        "picture": PICTURE,
        "question": question.text,
        "answer": given.text,
        "geometry": geometry(model, stats.images[0]),
        "keep_idx": stats.images[0].keep_idx.tolist(),
        "pivot": pivot,
        "kinds": kinds,
        "visual_per_layer": list(stats.visual_tokens_per_layer),
        "shares": shares,
        "probes": [{"layer": probe.layer, "dropped": probe.dropped} for probe in stats.probes],
        "tau": Todre().tau,
        "note": f"{sources.whose()}, the first held-out picture, seed {TEST_SEED};"
        f" todre (version 2 of the paper) at {RATIO:.0%}. Pictures, kept tokens, bars and shares"
        " are those of this question. Visual tokens in the decoder: patch and newline tokens.",
    }


def draw(data: Data) -> Any:
    """Return the drawing."""
    figure = new_figure(PAGE, HEIGHT, data["note"])
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, PAGE), ylim=(0, HEIGHT))
    axes.set_axis_off()
    image = held_out(data["picture"] + 1)[data["picture"]].image
    _inputs(axes, data, image)
    _encoder(axes, data)
    _stage_one(axes, data, image)
    _stage_two(axes, data)
    return figure


def _inputs(axes: Any, data: Data, image: Image.Image) -> None:
    """Draw the image, its views and the question."""
    everything = list(range(len(data["geometry"]["patches"])))
    small, large = views_of(image, data["geometry"], everything)
    _title(axes, 0.08, "Input")
    place_image(axes, large or small, (0.08, 1.83), 0.84)
    write(axes, 0.5, 1.71, "image", ha="center")
    arrow(axes, (0.95, 2.25), (1.08, 2.25))
    place_image(axes, small, (1.26, 2.52), 0.36)
    if large is not None:
        half = large.width // 2
        for row in range(2):
            for column in range(2):
                part = column * half, row * half, (column + 1) * half, (row + 1) * half
                corner = 1.1 + 0.355 * column, 2.12 - 0.355 * row
                place_image(axes, large.crop(part), corner, 0.33)
    write(axes, 1.44, 1.63, "thumbnail\nand crops", ha="center", va="center")
    box(axes, (0.08, 0.42), (2.2, 0.46), "white")
    asked = textwrap.fill(f'"{data["question"]}"', 40)
    write(axes, 1.18, 0.65, f"question:\n{asked}", ha="center", va="center", linespacing=1.3)
    arrow(axes, (2.3, 0.55), (4.42, 0.55))


def _encoder(axes: Any, data: Data) -> None:
    """Draw vision tower and projector."""
    arrow(axes, (1.82, 2.25), (1.95, 2.25))
    for left, width, name in ((1.97, 0.24, "vision tower"), (2.26, 0.18, "projector")):
        box(axes, (left, 1.75), (width, 1.0), PALE)
        style = {"rotation": 90, "ha": "center", "va": "center", "fontsize": TEXT}
        write(axes, left + width / 2, 2.25, name, **style)
    arrow(axes, (2.46, 2.25), (2.66, 2.25))
    write(axes, 2.55, 2.33, str(len(data["geometry"]["patches"])), ha="center")


def _stage_one(axes: Any, data: Data, image: Image.Image) -> None:
    """Draw which tokens stay, and by what rule."""
    place = data["geometry"]
    box(axes, (2.68, 0.74), (1.52, 2.46), "#FFF7EC", edge=ORANGE)
    _title(axes, 2.75, "Stage 1: diversity")
    small, large = views_of(image, place, data["keep_idx"])
    place_image(axes, large or small, (3.21, 2.04), 0.92)
    place_image(axes, small, (2.75, 2.54), 0.42)
    side, pivot = place["side"], place["patches"][data["pivot"]]
    row, column = divmod(pivot % side**2, side)
    step = 0.42 / side
    corner = 2.75 + column * step, 2.96 - (row + 1) * step
    box(axes, corner, (step, step), "none", edge=VERMILION, width=1.2, rounded=False)
    arrow(axes, (2.88, 2.34), (corner[0] + step / 2, corner[1] - 0.01), colour=VERMILION)
    write(axes, 2.78, 2.24, "pivot", colour=VERMILION)
    rule = (
        "1. pivot: the thumbnail token to\n    which [CLS] attends most",
        "2. add the token whose similarity\n    to all chosen ones is least, in\n    sum"
        " (v1: in maximum)",
        f"3. stop at {len(data['keep_idx'])} of {len(place['patches'])} tokens; keep\n"
        "    the reading order",
    )
    for text, top in zip(rule, (1.9, 1.58, 1.15), strict=True):
        write(axes, 2.75, top, text, va="top", linespacing=1.25)
    arrow(axes, (4.22, 2.25), (4.42, 2.25))
    write(axes, 4.32, 2.33, str(len(data["keep_idx"])), ha="center")


def _stage_two(axes: Any, data: Data) -> None:
    """Draw the decoder: a bar per layer, as long as its prompt."""
    layers, kinds = data["visual_per_layer"], data["kinds"]
    box(axes, (4.44, 0.3), (2.49, 2.9), "#EEF5FA", edge=BLUE)
    _title(axes, 4.52, "Stage 2: relevance, in the decoder")
    left, bottom, width = 4.8, 0.8, 1.0
    right = left + width + 0.07
    pitch = 1.98 / len(layers)
    thick = 0.72 * pitch
    scale = width / (kinds["system"] + max(layers) + kinds["text"])
    probed = [probe["layer"] for probe in data["probes"]]
    between = [
        layer
        for layer in some(range(len(layers)))
        if all(layer not in (p - 1, p + 1) for p in probed)
    ]
    named = {*probed, *(between if len(layers) > 12 else range(len(layers)))}
    for layer, visual in enumerate(layers):
        low = bottom + layer * pitch
        after = kinds["system"] + max(layers)  # the question keeps its place
        for kind, start, count in (
            ("system", 0, kinds["system"]),
            ("visual", kinds["system"], visual),
            ("text", after, kinds["text"]),
        ):
            _, colour, hatch = _KINDS[kind]
            corner, size = (left + start * scale, low), (count * scale, thick)
            box(axes, corner, size, colour, edge="white", rounded=False, hatch=hatch)
        if layer not in named:
            continue
        write(axes, left - 0.06, low + thick / 2, str(layer), ha="right", va="center")
        share = f"{data['shares'][layer]:.2f}" if visual else "-"
        write(axes, right, low + thick / 2, share, va="center")
    write(axes, left - 0.04, 0.66, "layer", ha="right")
    write(axes, left + width / 2, 0.66, "tokens of the prompt", ha="center")
    write(axes, right, 0.66, "share")
    for probe in data["probes"]:
        low = bottom + probe["layer"] * pitch
        size = width + 0.36, thick + 0.06
        box(axes, (left - 0.03, low - 0.03), size, "none", edge=BLACK, width=0.8)
        sign = "<" if probe["dropped"] else "$\\geq$"
        leaves = "all visual tokens\nleave" if probe["dropped"] else "nothing leaves"
        said = f"probe: share\n{sign} $\\tau$ = {data['tau']:.2f}, so\n{leaves}"
        style = {"va": "top", "linespacing": 1.25}
        write(axes, right + 0.33, low + thick, said, **style)
    explained = (
        "share: how much\nof its attention\nthe text pays to\nthe image, or the\nimage to the text"
    )
    write(axes, right + 0.33, 1.62, explained, va="top", colour=DARK, linespacing=1.25)
    write(axes, left + width / 2, 2.84, f"answer: {data['answer']}", ha="center", weight="bold")
    for start, (name, colour, hatch) in zip((4.56, 5.5, 6.33), _KINDS.values(), strict=True):
        box(axes, (start, 0.41), (0.14, 0.09), colour, edge="white", rounded=False, hatch=hatch)
        write(axes, start + 0.18, 0.42, name)


def _title(axes: Any, left: float, text: str) -> None:
    write(axes, left, HEIGHT - 0.21, text, weight="bold", fontsize=TEXT)
