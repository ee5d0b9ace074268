"""Train the bundled model from scratch: tower, one tile, AnyRes twice, then export.

    python -m scripts.mini_training.train --out runs/mini --checkpoint checkpoints/mini

About an hour and a half on two CPU cores with avx512_bf16. It may be killed at any moment; the same
command continues from the last minute. Finished phases are kept as `<out>/<phase>.pt`.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from pathlib import Path

import torch

from scripts.mini_training.decoder import PHASE_A, PHASE_B, PHASE_C, DecoderPhase
from scripts.mini_training.export import export_run
from scripts.mini_training.loop import Run
from scripts.mini_training.network import DecoderConfig, MiniDecoder
from scripts.mini_training.tokenizer import PromptEncoder
from scripts.mini_training.tower import TowerConfig, TowerPhase
from scripts.mini_training.vision import VisionConfig


@dataclasses.dataclass(frozen=True)
class Steps:
    """Length of each phase in updates."""

    tower: int = TowerConfig.num_steps
    tile: int = PHASE_A.num_steps
    anyres: int = PHASE_B.num_steps
    polish: int = PHASE_C.num_steps


def train(run: Run, steps: Steps) -> None:
    """Run all phases in order, continuing wherever an earlier call stopped."""
    tower_phase = TowerPhase(TowerConfig(num_steps=steps.tower), VisionConfig())
    run.train(tower_phase, validate_every=250)
    tower = tower_phase.tower
    torch.manual_seed(1)
    encoder = PromptEncoder()
    decoder = MiniDecoder(DecoderConfig(encoder.vocabulary_size))
    config_a = dataclasses.replace(PHASE_A, num_steps=steps.tile)
    phase_a = DecoderPhase(config_a, tower, decoder, encoder)
    decoder.fit_projector(phase_a.batch(0).features)
    run.train(phase_a)
    for config, num_steps in ((PHASE_B, steps.anyres), (PHASE_C, steps.polish)):
        scaled = dataclasses.replace(config, num_steps=num_steps)
        run.train(DecoderPhase(scaled, tower, decoder, encoder), validate_every=200)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of the training."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("runs/mini"), help="working directory")
    parser.add_argument(
        "--checkpoint", type=Path, default=Path("checkpoints/mini"), help="where the result goes"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    for field in dataclasses.fields(Steps):
        parser.add_argument(
            f"--{field.name}-steps",
            type=int,
            default=field.default,
            help=f"updates of the {field.name} phase",
        )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Train and export."""
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    steps = Steps(args.tower_steps, args.tile_steps, args.anyres_steps, args.polish_steps)
    train(Run(args.out), steps)
    export_run(args.out, args.checkpoint)


if __name__ == "__main__":
    main()
