"""Pictures of what the methods of the demo kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from eval.demo.measure import MAX_NEW_TOKENS, Ask
from eval.demo.plan import Run
from eval.mini import Sample
from llava_todre.model.llava import LlavaLlamaForCausalLM
from llava_todre.viz import contact_sheet, kept_picture

PICTURED_SCENES = 3
ROW_OF_PICTURES = 5
"""Pictures side by side, when there are more than fit on one sheet."""
_ONE_SHEET = 7
_PICTURE_SCALE = 2


def draw_sheets(
    runs: Sequence[Run],
    samples: Sequence[Sample],
    ask: Ask,
    model: LlavaLlamaForCausalLM,
    out: Path,
) -> None:
    """Draw the kept tokens of the first scenes, a row per ratio and a column per method.

    With more methods than fit into a row, each ratio gets a sheet of its own.
    """
    ratios = sorted({run.retain_ratio for run in runs if run.method != "vanilla"}, reverse=True)
    for scene, sample in enumerate(samples[:PICTURED_SCENES]):
        question = sample.questions[scene % len(sample.questions)]
        place = [sample.questions.index(question)]
        rows: list[list[tuple[str, Image.Image]]] = []
        for ratio in ratios or [1.0]:
            rows.append([])
            for run in runs:
                if run.draw > 0 or (run.method != "vanilla" and run.retain_ratio != ratio):
                    continue
                given = ask(sample, place, run.pruner(scene), max_new_tokens=MAX_NEW_TOKENS)[0]
                stats = given.stats.images[0]
                tokens = f"{len(stats.keep_idx)} in, {given.stats.mean_visual_tokens:.0f} per layer"
                picture = kept_picture(sample.image, stats, model, _PICTURE_SCALE)
                rows[-1].append((f"{run.method}, {tokens}: {given.text}", picture))
        caption = f"{question.text}  ({question.answer})"
        if max(map(len, rows)) <= _ONE_SHEET:
            contact_sheet(rows, caption).save(out / f"kept_{scene}.png")
            continue
        for ratio, cells in zip(ratios, rows, strict=True):
            sheet = contact_sheet(_wrapped(cells), f"{caption}  retain_ratio {ratio:g}")
            sheet.save(out / f"kept_{scene}_{ratio!r}.png")


def _wrapped(cells: list[tuple[str, Image.Image]]) -> list[list[tuple[str, Image.Image]]]:
    """Return the cells in rows of about the same length."""
    num_rows = math.ceil(len(cells) / ROW_OF_PICTURES)
    width = math.ceil(len(cells) / num_rows)
    return [cells[start : start + width] for start in range(0, len(cells), width)]
