"""``todre demo``, and ``python -m eval demo`` with the same options."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eval.demo.run import run_demo
from eval.mini import NUM_IMAGES
from eval.tables.demo import as_text


def compare(
    model_path: str | None,
    methods: Sequence[str],
    ratios: Sequence[float],
    num_images: int,
    out: Path,
    fresh: bool,
) -> None:
    """Run the comparison and print its table; takes what :func:`run_demo` takes."""
    print(as_text(run_demo(model_path, methods, ratios, num_images, out, fresh)))
    if num_images < NUM_IMAGES:
        print(
            f"\nA first look, at {num_images} pictures: make demo IMAGES={NUM_IMAGES}, or"
            f" --num-images {NUM_IMAGES}, has narrower intervals and takes some minutes."
        )
    print(f"\nResults, table and pictures are in {out}.")
