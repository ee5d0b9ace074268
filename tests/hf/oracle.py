"""What a stock model must answer when it reads only the tokens that stay: slow, and plain.

Its decoder is that of ``reference``: float64, one sample at a time, no cache, no padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from reference import LlamaReference
from tiny import IMAGE_ID, VIDEO_ID, visual_features
from torch import Tensor

Stage = tuple[int, list[set[int]]]
"""(first layer, patch tokens of each image that it and the later ones hold)."""


class DecoderReference(LlamaReference):
    """Llama, Mistral and Qwen2: the same but for the biases."""

    def __init__(self, model: Any) -> None:
        self.config = model.config.text_config
        self.weights = {
            name.replace("model.language_model.", "model."): weight.double()
            for name, weight in model.state_dict().items()
            if "language_model" in name or "lm_head" in name
        }
        self.embedding = self.weights["model.embed_tokens.weight"]

    def _linear(self, state: Tensor, name: str) -> Tensor:
        return super()._linear(state, name) + self.weights.get(name + ".bias", 0.0)


def stays(is_newline: Sequence[bool], kept: set[int], thumbnail: int) -> list[bool]:
    """Return which tokens of an image stay: kept patches, and newlines of rows that keep one.

    Args:
        is_newline: one per token of the image.
        kept: patch tokens, newlines not counted.
        thumbnail: tokens in front of the first row that has a newline.
    """
    if len(kept) == len(is_newline) - sum(is_newline):
        return [True] * len(is_newline)
    result: list[bool] = []
    row_has_token, patch = False, 0
    for place, newline in enumerate(is_newline):
        if newline:
            result.append(row_has_token)
            row_has_token = False
            continue
        result.append(patch in kept)
        row_has_token |= patch in kept and place >= thumbnail
        patch += 1
    return result


class Oracle:
    """One model and one batch."""

    def __init__(self, model: Any, inputs: dict[str, Any]) -> None:
        self.decoder = DecoderReference(model)
        self.num_layers = model.config.text_config.num_hidden_layers
        vision = model.config.vision_config
        self.thumbnail = (vision.image_size // vision.patch_size) ** 2
        newline = getattr(model.model, "image_newline", None)
        features = visual_features(model, inputs)
        self.samples: list[tuple[list[int], list[Tensor], list[list[bool]]]] = []
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            ids = ids[mask.bool()].tolist()
            visuals, place = [], 0
            while place < len(ids):
                if ids[place] in (IMAGE_ID, VIDEO_ID):
                    visuals.append(next(features[ids[place]]))
                    place += len(visuals[-1]) - 1
                place += 1
            ends = [
                [newline is not None and torch.equal(token, newline) for token in visual]
                for visual in visuals
            ]
            self.samples.append((ids, visuals, ends))

    def held(self, sample: int, kept: list[set[int]]) -> Tensor:
        """Return (L,) bool, the tokens of a prompt that stay when these patch tokens do."""
        ids, _, ends = self.samples[sample]
        result, image, place = [], 0, 0
        while place < len(ids):
            if ids[place] not in (IMAGE_ID, VIDEO_ID):
                result.append(True)
                place += 1
                continue
            tiled = ids[place] == IMAGE_ID and sum(ends[image]) > 1
            result += stays(ends[image], kept[image], self.thumbnail if tiled else 0)
            place += len(ends[image])
            image += 1
        return torch.tensor(result)

    def embeds(self, sample: int) -> Tensor:
        """Return (L, D) of the whole prompt."""
        ids, visuals, _ = self.samples[sample]
        embeds = self.decoder.embedding[torch.tensor(ids)].clone()
        is_visual = torch.tensor([token in (IMAGE_ID, VIDEO_ID) for token in ids])
        if visuals:
            embeds[is_visual] = torch.cat(visuals).double()
        return embeds

    def greedy(self, sample: int, stages: list[Stage], steps: int) -> tuple[list[int], Tensor]:
        """Return the answer, and (steps, V) logits."""
        entering, present = self.presence(sample, stages)
        return self.decoder.greedy(self.embeds(sample)[entering], steps, present)

    def presence(self, sample: int, stages: list[Stage]) -> tuple[Tensor, Tensor]:
        """Return (L,) bool, what enters the decoder, and of that (layers, M) what each holds."""
        entering = self.held(sample, stages[0][1])
        present = torch.ones(self.num_layers, int(entering.sum()), dtype=torch.bool)
        for layer, kept in stages[1:]:
            present[layer:] &= self.held(sample, kept)[entering]
        return entering, present


def stages_of(stats: Any) -> list[Stage]:
    """Return what a method did that withdraws all visual tokens or none."""
    kept = [set(image.keep_idx.tolist()) for image in stats.images]
    gone = [(probe.layer + 1, [set[int]()] * len(kept)) for probe in stats.probes if probe.dropped]
    return [(0, kept), *gone]
