"""What a stock model must answer when it reads only the tokens that stay: slow, and plain.

Its decoder is that of ``reference``: float64, one sample at a time, no cache, no padding. Families
differ in what is added to that: newlines (LLaVA), positions in space (Qwen), and features that
enter behind the first layers (Qwen3-VL).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from reference import LlamaReference
from tiny import IMAGE_ID, QWEN, VIDEO_ID, visual_features
from torch import Tensor

Stage = tuple[int, list[set[int]]]
"""(first layer, patch tokens of each image that it and the later ones hold)."""


class StockReference(LlamaReference):
    """The decoder of any family: weights and settings decide which."""

    positions: Tensor | None = None
    """(3, M) in time, height and width; None counts tokens."""
    deep: Tensor = torch.empty(0)
    """(layers, M, D) what is added behind the first layers; 0 for text."""

    def __init__(self, model: Any) -> None:
        self.config = model.config.text_config
        self.weights = {
            name.replace("model.language_model.", "model."): weight.double()
            for name, weight in model.state_dict().items()
            if "language_model" in name or "lm_head" in name
        }
        self.embedding = self.weights["model.embed_tokens.weight"]

    def at(self, positions: Tensor | None, deep: Tensor) -> StockReference:
        """Return the decoder for one prompt."""
        other = copy.copy(self)
        other.positions, other.deep = positions, deep
        return other

    def _linear(self, state: Tensor, name: str) -> Tensor:
        return super()._linear(state, name) + self.weights.get(name + ".bias", 0.0)

    def _layer(self, layer: int, hidden: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        hidden, maps = super()._layer(layer, hidden, visible)
        if layer < len(self.deep):
            hidden[: len(self.deep[layer])] += self.deep[layer]
        return hidden, maps

    def _heads(self, state: Tensor, name: str) -> Tensor:
        heads = super()._heads(state, name)
        norm = name.replace("_proj", "_norm")
        return self._norm(heads, norm) if norm + ".weight" in self.weights else heads

    def _rotate(self, heads: Tensor) -> Tensor:  # type: ignore[override]
        if self.positions is None:
            return super()._rotate(heads)
        rope = self.config.rope_parameters
        half, (_, height, width) = heads.shape[-1] // 2, rope["mrope_section"]
        if rope.get("mrope_interleaved"):
            limits = {1: 3 * height, 2: 3 * width}
            axis = [i % 3 if i < limits.get(i % 3, 0) else 0 for i in range(half)]
        else:
            axis = [0] * (half - height - width) + [1] * height + [2] * width
        num_new = heads.shape[1] - self.positions.shape[1]
        new = self.positions.max() + 1 + torch.arange(num_new)
        positions = torch.cat([self.positions, new.expand(3, -1)], dim=1).double()  # (3, N)
        steps = rope["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = positions[axis].T * steps
        first, second = heads[..., :half], heads[..., half:]
        cosines, sines = angles.cos(), angles.sin()
        return torch.cat(
            [first * cosines - second * sines, second * cosines + first * sines], dim=-1
        )


def stays(
    is_newline: Sequence[bool], kept: set[int], thumbnail: int, newlines: str, whole: bool
) -> list[bool]:
    """Return which tokens of an image stay: kept patches, and the newlines that go with them.

    Args:
        is_newline: one per token of the image.
        kept: patch tokens, newlines not counted.
        thumbnail: tokens in front of the first row that has a newline.
        newlines: "row", "all" or "none".
        whole: whether nothing has been dropped.
    """
    result: list[bool] = []
    row_has_token, patch = False, 0
    for place, newline in enumerate(is_newline):
        if newline:
            result.append(whole or newlines == "all" or (newlines == "row" and row_has_token))
            row_has_token = False
            continue
        result.append(patch in kept)
        row_has_token |= patch in kept and place >= thumbnail
        patch += 1
    return result


@dataclass
class Visual:
    """An image or a video in a prompt."""

    token: int
    """Its placeholder id."""
    columns: Tensor
    """(S,) where its tokens stand."""
    features: Tensor
    """(S, D)."""
    deep: Tensor
    """(layers, S, D)."""
    is_newline: list[bool]
    """One per token."""


@dataclass
class Prompt:
    """One sample, unpadded."""

    ids: Tensor
    """(L,)."""
    visuals: list[Visual]
    """In the order of their first tokens."""
    positions: Tensor | None
    """(3, L) in space."""


class Oracle:
    """One model and one batch."""

    @torch.no_grad()
    def __init__(self, model: Any, inputs: dict[str, Any], newlines: str = "row") -> None:
        self.reference, self.newlines = StockReference(model), newlines
        self.num_layers = model.config.text_config.num_hidden_layers
        newline = getattr(model.model, "image_newline", None)
        vision = model.config.vision_config
        self.thumbnail = 0 if newline is None else (vision.image_size // vision.patch_size) ** 2
        features, deep = visual_features(model, inputs), deep_features(model, inputs)
        grids = {key: iter(inputs[key]) for key in GRIDS if key in inputs}
        self.samples: list[Prompt] = []
        for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            ids, visuals = row[mask.bool()], []
            for token in (IMAGE_ID, VIDEO_ID):
                columns = (ids == token).nonzero()[:, 0]
                while len(columns):
                    read = next(features[token])
                    added = next(deep[token], torch.empty(0, *read.shape))
                    ends = [newline is not None and torch.equal(each, newline) for each in read]
                    visuals.append(Visual(token, columns[: len(read)], read, added, ends))
                    columns = columns[len(read) :]
            visuals.sort(key=lambda visual: int(visual.columns[0]))
            positions = None
            if model.config.model_type in QWEN:
                positions = positions_in_space(model, ids, visuals, grids)
            self.samples.append(Prompt(ids, visuals, positions))

    def held(self, row: int, kept: Sequence[set[int]], inside: bool = False) -> Tensor:
        """Return (L,) bool, the tokens of a prompt that stay when these patch tokens do.

        Args:
            row: number of the sample.
            kept: patch tokens of each image.
            inside: whether the decoder drops, which sees the images of a prompt as one.
        """
        sample = self.samples[row]
        result = torch.ones(len(sample.ids), dtype=torch.bool)
        is_whole = [
            len(of_visual) == len(visual.is_newline) - sum(visual.is_newline)
            for visual, of_visual in zip(sample.visuals, kept, strict=True)
        ]
        newlines = self.newlines if any(kept) else "none"
        for visual, of_visual, whole in zip(sample.visuals, kept, is_whole, strict=True):
            tiled = visual.token == IMAGE_ID and sum(visual.is_newline) > 1
            keep = stays(
                visual.is_newline,
                of_visual,
                self.thumbnail if tiled else 0,
                newlines,
                all(is_whole) if inside else whole,
            )
            result[visual.columns] = torch.tensor(keep)
        return result

    def embeds(self, row: int) -> Tensor:
        """Return (L, D) of the whole prompt."""
        sample = self.samples[row]
        embeds = self.reference.embedding[sample.ids].clone()
        for visual in sample.visuals:
            embeds[visual.columns] = visual.features.double()
        return embeds

    def presence(self, row: int, stages: Sequence[Stage]) -> tuple[Tensor, Tensor]:
        """Return (L,) bool, what enters the decoder, and of that (layers, M) what each holds."""
        entering = self.held(row, stages[0][1])
        present = torch.ones(self.num_layers, int(entering.sum()), dtype=torch.bool)
        for layer, kept in stages[1:]:
            present[layer:] &= self.held(row, kept, inside=True)[entering]
        return entering, present

    def pruned(self, row: int, stages: Sequence[Stage]) -> tuple[StockReference, Tensor, Tensor]:
        """Return the decoder for a pruned prompt, (M, D) that prompt, and (layers, M) presence."""
        sample = self.samples[row]
        entering, present = self.presence(row, stages)
        embeds = self.embeds(row)
        num_deep = len(sample.visuals[0].deep) if sample.visuals else 0
        deep = torch.zeros(num_deep, *embeds.shape, dtype=torch.float64)
        for visual in sample.visuals:
            deep[:, visual.columns] = visual.deep.double()
        positions = None if sample.positions is None else sample.positions[:, entering]
        decoder = self.reference.at(positions, deep[:, entering])
        return decoder, embeds[entering], present

    def logits(self, row: int, stages: Sequence[Stage], answer: Sequence[int]) -> Tensor:
        """Return (steps, V) logits that lead to each token of an answer, given those before it."""
        decoder, embeds, present = self.pruned(row, stages)
        embeds, held = decoder.extend(embeds, present, *answer[:-1])
        return decoder.run(embeds, held).logits[-len(answer) :]


GRIDS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")


def positions_in_space(
    model: Any, ids: Tensor, visuals: Sequence[Visual], grids: dict[str, Iterator[Tensor]]
) -> Tensor:
    """Return (3, L) of one prompt, as the model itself numbers it when it is alone."""
    own = {}
    for key, each in grids.items():
        token = IMAGE_ID if key == "image_grid_thw" else VIDEO_ID
        count = sum(visual.token == token for visual in visuals)
        own[key] = torch.stack([next(each) for _ in range(count)]) if count else None
    types = (ids == IMAGE_ID).int() + 2 * (ids == VIDEO_ID).int()
    return model.model.get_rope_index(ids[None], mm_token_type_ids=types[None], **own)[0][:, 0]


def deep_features(model: Any, inputs: dict[str, Any]) -> dict[int, Iterator[Tensor]]:
    """Return what is added behind the first layers, (layers, S, D) of each image and video."""
    parts: dict[int, Iterator[Tensor]] = {IMAGE_ID: iter(()), VIDEO_ID: iter(())}
    if model.config.model_type != "qwen3_vl":
        return parts
    for token, get_features, pixel_key, grid_key in (
        (IMAGE_ID, model.model.get_image_features, "pixel_values", "image_grid_thw"),
        (VIDEO_ID, model.model.get_video_features, "pixel_values_videos", "video_grid_thw"),
    ):
        if pixel_key in inputs:
            found = get_features(inputs[pixel_key], inputs[grid_key], return_dict=True)
            layers = [  # split by image since transformers 5.23
                each if isinstance(each, Tensor) else torch.cat(list(each))
                for each in found.deepstack_features
            ]
            lengths = [len(each) for each in found.pooler_output]
            parts[token] = iter(torch.stack(layers).split(lengths, dim=1))
    return parts


def stages_of(stats: Any) -> list[Stage]:
    """Return what a method did that withdraws all visual tokens or none."""
    kept = [set(image.keep_idx.tolist()) for image in stats.images]
    gone = [(probe.layer + 1, [set[int]()] * len(kept)) for probe in stats.probes if probe.dropped]
    return [(0, kept), *gone]
