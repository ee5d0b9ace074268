"""The bundled model's held-out pictures and questions as a local data set for lmms-eval.

    python -m eval.mini.data [--num_images 96]

writes configs/tasks/mini/data/mini.parquet, where the task files next to it look for it from any
working directory: one row per picture, with the column ``image`` and, for every task,
``<task>_question`` and ``<task>_answer``. These are the pictures and questions of ``todre demo``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from eval import ROOT
from eval.mini import NUM_IMAGES, TASKS, TEST_SEED, held_out
from eval.mini.heldout import check_num_images
from llava_todre.errors import TodreError

DRAWN = "682a27b03c7362ed"
"""Names what is drawn; a new one for every change of a picture, question, answer or column."""
FOLDER = ROOT / "configs" / "tasks" / "mini" / "data"


def prepare(folder: Path = FOLDER, num_images: int = NUM_IMAGES) -> Path:
    """Write the data set unless it is there already, and return its file.

    Args:
        folder: where to write.
        num_images: rows. Row i is the same however many there are.

    Raises:
        TodreError: such a number, no package ``datasets``, or a folder that cannot be written.
    """
    check_num_images(num_images)
    file, claim = folder / "mini.parquet", folder / "mini.json"
    wanted = stamp(num_images)
    if file.is_file() and claim.is_file() and claim.read_text() == wanted:
        return file
    draft = folder / f"draft.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        claim.unlink(missing_ok=True)  # a kill between the two files leaves no wrong claim
        _write(draft, num_images)
        os.replace(draft, file)
        draft.write_text(wanted)
        os.replace(draft, claim)
    except OSError as error:
        reason = error.strerror or error
        raise TodreError(f"folder {str(folder)!r} cannot be written: {reason}.") from None
    finally:
        if draft.is_file():
            draft.unlink()
    return file


def stamp(num_images: int = NUM_IMAGES) -> str:
    """Return what the data depends on, as text."""
    return json.dumps({"num_images": num_images, "seed": TEST_SEED, "sources": DRAWN})


def _write(file: Path, num_images: int) -> None:
    try:
        import pyarrow.parquet
        from datasets import Dataset, Features, Image, Value
    except ImportError:
        raise TodreError(
            "the mini suite needs the package datasets: pip install 'llava-todre[eval]'."
        ) from None
    texts = [f"{task}_{part}" for task in TASKS for part in ("question", "answer")]
    columns: dict[str, list[Any]] = {name: [] for name in ("image", *texts)}
    for sample in held_out(num_images):
        columns["image"].append(sample.image)
        for question in sample.questions:
            columns[f"{question.task}_question"].append(question.text)
            columns[f"{question.task}_answer"].append(question.answer)
    features = Features({"image": Image(), **{name: Value("string") for name in texts}})
    # Not `to_parquet`, which shows a progress bar.
    pyarrow.parquet.write_table(Dataset.from_dict(columns, features=features).data.table, file)


def main() -> None:
    """Write the data set for the task files."""
    import argparse

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--num_images", type=int, default=NUM_IMAGES, help="pictures, default 96")
    try:
        print(prepare(num_images=parser.parse_args().num_images))
    except TodreError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
