"""From a training run to `checkpoints/mini`: weights, curve, examples, evaluation, model card.

    python -m scripts.mini_training.export --out runs/mini --checkpoint checkpoints/mini

exports whatever the run has reached so far. `<out>/notes.md`, where it exists, goes into the card:
what a reader should know about this particular run. The test seeds are looked at only when the last
phase has finished, so that nothing can be tuned on them.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from pathlib import Path

import torch

from eval.mini.heldout import TEST_SEED, held_out
from scripts.mini_training.card import model_card
from scripts.mini_training.checkpoint import load_checkpoint, save_checkpoint
from scripts.mini_training.decoder import PHASE_C
from scripts.mini_training.evaluate import evaluate
from scripts.mini_training.network import DecoderConfig, MiniDecoder
from scripts.mini_training.tokenizer import PromptEncoder
from scripts.mini_training.vision import VisionConfig, VisionTower

logger = logging.getLogger(__name__)

NUM_TEST_IMAGES = 200
NUM_EXAMPLES = 3
EXAMPLE_SEED = TEST_SEED + 1
"""Examples are drawn from the test family, but are not among the images reported on."""


def load_run(out: Path) -> tuple[VisionTower, MiniDecoder, bool]:
    """Tower, decoder, and whether the run is finished."""
    tower = VisionTower(VisionConfig())
    tower.load_state_dict(torch.load(out / "tower.pt", weights_only=True)["tower"])
    decoder = MiniDecoder(DecoderConfig(PromptEncoder().vocabulary_size))
    finished = (out / f"{PHASE_C.name}.pt").exists()
    if finished:
        state = torch.load(out / f"{PHASE_C.name}.pt", weights_only=True)
    else:
        state = torch.load(out / "state.pt", weights_only=True)["content"]
    decoder.load_state_dict(state["decoder"])
    return tower, decoder, finished


def save_examples(directory: Path) -> None:
    """A few pictures with questions and answers, for commands to try."""
    directory.mkdir(parents=True, exist_ok=True)
    entries = []
    for index, sample in enumerate(held_out(NUM_EXAMPLES, EXAMPLE_SEED)):
        name = f"scene_{index}.png"
        sample.image.save(directory / name, optimize=True)
        entries += [
            {"image": name, "task": q.task, "question": q.text, "answer": q.answer}
            for q in sample.questions
        ]
    (directory / "examples.json").write_text(json.dumps(entries, indent=2) + "\n")


def evaluate_checkpoint(checkpoint: Path) -> None:
    """Answer the test questions with the exported half-precision weights, in float32."""
    tower, decoder = load_checkpoint(checkpoint)
    samples = held_out(NUM_TEST_IMAGES)
    result = evaluate(tower, decoder, samples, PromptEncoder(), torch.float32)
    content = {
        "family": "test",
        "seed": TEST_SEED,
        "num_images": NUM_TEST_IMAGES,
        "questions_per_task": 1,
        "num_parameters": sum(p.numel() for p in (*tower.parameters(), *decoder.parameters())),
        "accuracy": result.accuracy,
        "text_to_visual_mass": result.masses,
    }
    (checkpoint / "evaluation.json").write_text(json.dumps(content, indent=2) + "\n")


def export_run(out: Path, checkpoint: Path) -> None:
    """Write everything that belongs into the checkpoint directory."""
    tower, decoder, finished = load_run(out)
    save_checkpoint(checkpoint, tower, decoder)
    shutil.copyfile(out / "training_curve.jsonl", checkpoint / "training_curve.jsonl")
    save_examples(checkpoint / "examples")
    if finished:
        evaluate_checkpoint(checkpoint)
        notes = out / "notes.md"
        text = notes.read_text().strip() if notes.exists() else ""
        (checkpoint / "README.md").write_text(model_card(checkpoint, text))
    logger.info("exported %s run to %s", "finished" if finished else "unfinished", checkpoint)


def main(argv: list[str] | None = None) -> None:
    """Export a run from the command line."""
    parser = argparse.ArgumentParser(description="export a training run")
    parser.add_argument("--out", type=Path, default=Path("runs/mini"), help="training run")
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/mini"))
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    export_run(args.out, args.checkpoint)


if __name__ == "__main__":
    main()
