"""Search the layer at which VTW withdraws, on calibration questions (VTW, section 3.3)."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from eval.mini import TEST_SEED, held_out
from llava_todre.errors import TodreError
from llava_todre.files import JSON_BYTES, read_text
from llava_todre.model.chat_template import find_template
from llava_todre.model.checkpoint import bundled_checkpoint
from llava_todre.model.images import load_image, process_images
from llava_todre.model.load import load_pretrained_model
from llava_todre.model.prompt import AUTO, build_prompt, tokenizer_image_token
from llava_todre.pruners.vtw import VTW, search_layer
from llava_todre.settings import whole

CALIBRATION_SEED = TEST_SEED + 2
"""Scenes that no figure is measured on."""


@torch.inference_mode()
def find_layer(
    model_path: str | None, samples: Path | None, num_samples: int, eta: float, first: int
) -> dict[str, Any]:
    """Run the search, print a line per layer and the JSON last.

    Args:
        model_path: a checkpoint; the bundled one when None.
        samples: JSON lines with the keys ``image`` (a file) and ``question``; bundled scenes when
            None.
        num_samples: how many of them; the authors take about 20.
        eta: bound on the mean divergence, in nats.
        first: first layer to try.
    """
    whole("num_samples", num_samples, 1)
    questions = _bundled(num_samples) if samples is None else _read(samples, num_samples)
    tokenizer, model, processor, _ = load_pretrained_model(model_path or bundled_checkpoint())
    template = find_template(AUTO, model, tokenizer)
    prompts = []
    for image, question in questions:
        ids = tokenizer_image_token(build_prompt(question, 1, template), tokenizer)
        pixels = process_images([image], processor, model.config)[0].to(model.device)
        encoded = model.encode_images([pixels], [image.size])  # serves every layer tried
        prompts.append((torch.tensor([ids], device=model.device), encoded))
    num_layers = model.config.num_hidden_layers

    def logits_at(layer: int | None) -> list[Tensor]:
        if layer is None:
            model.set_pruner("vanilla")
        else:
            model.set_pruner(VTW(layer=layer))
        return [
            model(input_ids=ids, images=images, logits_to_keep=1).logits[0, -1]
            for ids, images in tqdm(prompts, desc=f"layer {layer}", leave=False)
        ]

    layer, divergences = search_layer(logits_at, num_layers, eta, first)
    for tried, divergence in divergences.items():
        print(f"withdrawal at layer {tried:2}: KL {divergence:.5f}")
    found = {"layer": layer, "num_layers": num_layers, "eta": eta, "samples": len(prompts)}
    print(json.dumps(found | {"divergence": divergences}))
    return found | {"divergence": divergences}


def add_parser(commands: Any) -> None:
    """Add ``vtw-layer`` to the commands of ``python -m eval``."""
    search = commands.add_parser("vtw-layer", help="search the layer at which VTW withdraws")
    search.add_argument("--model", help="checkpoint (default: the bundled one)")
    search.add_argument("--samples", type=Path, help="JSON lines with the keys image and question")
    search.add_argument("--num-samples", type=int, default=20)
    search.add_argument("--eta", type=float, default=0.003, help="bound on the divergence, in nats")
    search.add_argument("--first", type=int, default=5, help="first layer to try")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    find_layer(options.model, options.samples, options.num_samples, options.eta, options.first)
    return 0


def _bundled(count: int) -> list[tuple[Image.Image, str]]:
    scenes = held_out(count, seed=CALIBRATION_SEED)
    return [
        (scene.image, scene.questions[index % len(scene.questions)].text)
        for index, scene in enumerate(scenes)
    ]


def _read(file: Path, count: int) -> Sequence[tuple[Image.Image, str]]:
    text = read_text(file, "samples", JSON_BYTES)
    try:
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        pairs = [(row["image"], row["question"]) for row in rows[:count]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise TodreError(
            f"samples {str(file)!r} has a line that does not fit ({error}); allowed: JSON objects "
            "with the keys image and question."
        ) from None
    if not pairs:
        raise TodreError(f"samples {str(file)!r} holds no questions.")
    return [(load_image(file.parent / image), question) for image, question in pairs]
