"""Tokens that methods keep over the frames of a video."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from PIL import Image

from eval.figures.canvas import panel, write_line
from eval.figures.pictures import (
    MAX_NEW_TOKENS,
    cell,
    frame_of,
    method_at,
    verdict,
)
from eval.figures.sources import Data, Sources, opened
from eval.figures.style import PAGE, TEXT, new_figure
from eval.mini import TEST_SEED
from eval.mini.render import Renderer
from eval.mini.scenes import TILE_SIDE, Scene, SceneObject, SeedFamily, Sign, stream
from llava_todre.vlm import Request, answer

METHODS = ("fastervlm", "divprune", "todre")
RATIO = 0.10
FRAMES = 8
QUESTION, EXPECTED = "What color is the ring?", "red"
_NUM_BACKGROUNDS = 4


def frames() -> list[Image.Image]:
    """Return a video: a ring crosses the picture, a star rises, everything else stands still."""
    still = Scene(
        TILE_SIDE,
        (
            SceneObject("red", "ring", 4, 40, 24),
            SceneObject("blue", "star", 84, 84, 22),
            SceneObject("green", "square", 36, 82, 22),
        ),
        Sign(56, 6, (4, 0, 7)),
    )
    renderer = Renderer(stream(SeedFamily.TEST, TEST_SEED, 2), _NUM_BACKGROUNDS)
    made = []
    for index in range(FRAMES):
        ring, star, square = still.objects
        moved = (replace(ring, left=4 + 11 * index), replace(star, top=84 - 2 * index), square)
        scene = replace(still, objects=moved)
        # The same stream for each frame: the same background, shades and noise.
        pixels, _ = renderer.render(stream(SeedFamily.TEST, TEST_SEED, 3), scene)
        made.append(Image.fromarray(pixels))
    return made


def gather(sources: Sources) -> Data:
    """Return what each method keeps of the frames, and the answer it leads to."""
    tokenizer, model = opened(sources.model)
    shown = frames()
    rows, per_frame, side = [], 0, 0
    for method in ("vanilla", *METHODS):
        model.set_pruner(method_at(method, 1.0 if method == "vanilla" else RATIO, 0))
        asked = [Request(QUESTION, shown, is_video=True)]
        given = answer(model, tokenizer, asked, max_new_tokens=MAX_NEW_TOKENS)[0]
        stats = given.stats.images[0]
        side, per_frame = stats.side, stats.num_tokens // len(shown)
        rows.append(cell(method, given, EXPECTED))
    return {
        "question": QUESTION,
        "expected": EXPECTED,
        "side": side,
        "per_frame": per_frame,
        "ratio": RATIO,
        "rows": rows,
        "note": f"{sources.whose()}, which never saw a video in training; {FRAMES} drawn frames,"
        f" the renderer's test stock, seed {TEST_SEED}. {RATIO:.0%} of the tokens of all frames"
        " together are kept (bright); below each frame: how many of its tokens.",
    }


HEIGHT, SIDE, PITCH = 3.95, 0.74, 0.765
_LEFT, _TOP, _ROW = 0.86, 0.36, 0.835


def draw(data: Data) -> Any:
    """Return the figure: a row per method, a column per frame."""
    figure = new_figure(PAGE, HEIGHT, data["note"])
    figure.set_layout_engine("none")
    pictures = frames()

    write = partial(write_line, figure)
    write(0.06, 0.15, f"{data['question']} ({data['expected']})", fontsize=TEXT)
    for row, given in enumerate(data["rows"]):
        top = _TOP + row * _ROW
        name = "unpruned" if given["method"] == "vanilla" else given["method"]
        words, colour = verdict(given)
        write(0.06, top + 0.3, name, weight="bold", fontsize=TEXT)
        write(0.06, top + 0.43, f"{len(given['keep_idx'])} tokens")
        write(0.06, top + 0.56, words, colour=colour, weight="bold")
        for column, picture in enumerate(pictures):
            first = column * data["per_frame"]
            kept = [i - first for i in given["keep_idx"] if first <= i < first + data["per_frame"]]
            left = _LEFT + column * PITCH
            panel(figure, left, top, SIDE, frame_of(picture, data["side"], kept))
            write(left + SIDE / 2, top + SIDE + 0.078, f"{len(kept)}", ha="center", fontsize=5.5)
            if row == 0:
                write(left + SIDE / 2, top - 0.04, f"frame {column + 1}", ha="center")
    return figure
