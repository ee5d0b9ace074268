"""Tiny random Qwen2-VL, Qwen2.5-VL and Qwen3-VL, prompts for them, and a slow reference.

A sample is a list of pieces: a number of text tokens, the (rows, columns) in patches of an image,
or the (frames, rows, columns) of a video, a frame being a temporal group.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers
from conftest import randomise
from reference import LlamaReference
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

IMAGE, VIDEO, START, END, PAD = 299, 298, 297, 296, 0
PATCH = 14
Sample = tuple[Any, ...]
Prompt = dict[str, Tensor]

MODELS = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}
ONE: Sample = (3, (8, 12), 6)
BATCH: tuple[Sample, ...] = (
    ONE,
    (2, (4, 10), 3, (8, 8), 5),
    (4, (6, 6), 2, (3, 4, 8), 7),
    (9,),
)


@cache
def build(family: str, attention: str = "sdpa") -> Any:
    """Return a random model; the same for every implementation of attention."""
    vision: dict[str, Any] = {
        "depth": 4,
        "num_heads": 4,
        "patch_size": PATCH,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    if family == "qwen2_vl":
        vision |= {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    else:
        vision |= {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64}
    if family == "qwen2_5_vl":  # windows of 2 x 2 tokens
        vision |= {"fullatt_block_indexes": [1, 3], "window_size": 4 * PATCH}
    if family == "qwen3_vl":
        vision |= {"deepstack_visual_indexes": [0, 2], "num_position_embeddings": 64}
    text: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": None,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "mrope_section": [2, 3, 3],
        },
        "tie_word_embeddings": False,
    }
    if family == "qwen3_vl":
        text["head_dim"] = 16
        text["rope_parameters"]["mrope_interleaved"] = True
    config = getattr(transformers, MODELS[family] + "Config")(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=False,
    )
    model = getattr(transformers, MODELS[family] + "ForConditionalGeneration")(config).eval()
    model.set_attn_implementation(attention)
    randomise(model, 0)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


@cache
def prompt(family: str, sample: Sample) -> Prompt:
    """Return one prompt, unpadded: ids (L,), and pixels and grids in the order of its pieces."""
    draw = torch.Generator().manual_seed(len(sample) + sum(hash(piece) for piece in sample) % 997)

    def text(count: int) -> Tensor:
        return torch.randint(2, 290, (count,), generator=draw)

    def pixels(*grid: int) -> Tensor:
        count = grid[0] * grid[1] * grid[2]
        return torch.randn(count, 3 * 2 * PATCH * PATCH, generator=draw)

    def run(token: int, count: int) -> list[Tensor]:
        return [torch.tensor([START]), torch.full((count,), token), torch.tensor([END])]

    row = [torch.tensor([1])]
    shown: dict[int, list[tuple[tuple[int, ...], Tensor]]] = {IMAGE: [], VIDEO: []}
    for piece in sample:
        if isinstance(piece, int):
            row.append(text(piece))
        elif len(piece) == 2:
            shown[IMAGE].append(((1, *piece), pixels(1, *piece)))
            row += run(IMAGE, piece[0] * piece[1] // 4)
        else:
            frames, height, width = piece
            shown[VIDEO].append((piece, pixels(*piece)))
            if family == "qwen3_vl":  # the time, then a frame
                for _ in range(frames):
                    row += [text(2), *run(VIDEO, height * width // 4)]
            else:
                row += run(VIDEO, frames * height * width // 4)
    ids = torch.cat(row)
    inputs = {
        "input_ids": ids,
        "mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int(),
    }
    for token, pixel_key, grid_key in (
        (IMAGE, "pixel_values", "image_grid_thw"),
        (VIDEO, "pixel_values_videos", "video_grid_thw"),
    ):
        if shown[token]:
            inputs[grid_key] = torch.tensor([grid for grid, _ in shown[token]])
            inputs[pixel_key] = torch.cat([each for _, each in shown[token]])
    if shown[VIDEO] and family == "qwen2_5_vl":
        inputs["second_per_grid_ts"] = torch.full((len(shown[VIDEO]),), 0.5)
    return inputs


def collate(prompts: list[Prompt], side: str = "left") -> Prompt:
    """Return arguments of ``generate``, padded."""
    batch = {}
    for key in ("input_ids", "mm_token_type_ids"):
        batch[key] = pad_sequence([each[key] for each in prompts], True, 0, side)
    ones = [torch.ones(len(each["input_ids"]), dtype=torch.int64) for each in prompts]
    batch["attention_mask"] = pad_sequence(ones, True, 0, side)
    for key in {key for each in prompts for key in each} - batch.keys():
        batch[key] = torch.cat([each[key] for each in prompts if key in each])
    return batch


def places(given: Prompt) -> list[Tensor]:
    """Return the columns of the tokens of each image and video, in the order of the prompt."""
    found = []
    for token, key in ((IMAGE, "image_grid_thw"), (VIDEO, "video_grid_thw")):
        columns = (given["input_ids"] == token).nonzero()[:, 0]
        counts = [int(grid.prod()) // 4 for grid in given.get(key, ())]
        found += list(columns.split(counts))
    return sorted(found, key=lambda columns: int(columns[0]))


class StockReference(LlamaReference):
    """The decoder of a stock model in float64, without cache or padding."""

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


class QwenReference(StockReference):
    """With positions in space, norms of queries and keys, and deep features."""

    def __init__(self, model: Any, positions: Tensor, deep: Tensor) -> None:
        """Set up for one pruned prompt.

        Args:
            model: of which the weights are.
            positions: (3, M) in time, height and width.
            deep: (layers, M, D) what is added behind the first layers; 0 for text.
        """
        super().__init__(model)
        self.positions, self.deep = positions.double(), deep.double()

    def _layer(self, layer: int, hidden: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        hidden, maps = super()._layer(layer, hidden, visible)
        if layer < len(self.deep):
            hidden[: self.deep.shape[1]] += self.deep[layer]
        return hidden, maps

    def _heads(self, state: Tensor, name: str) -> Tensor:
        heads = super()._heads(state, name)
        norm = name.replace("_proj", "_norm")
        return self._norm(heads, norm) if norm + ".weight" in self.weights else heads

    def _rotate(self, heads: Tensor) -> Tensor:  # type: ignore[override]
        rope = self.config.rope_parameters
        half, (_, height, width) = heads.shape[-1] // 2, rope["mrope_section"]
        if rope.get("mrope_interleaved"):
            limits = {1: 3 * height, 2: 3 * width}
            axis = [i % 3 if i < limits.get(i % 3, 0) else 0 for i in range(half)]
        else:
            axis = [0] * (half - height - width) + [1] * height + [2] * width
        num_new = heads.shape[1] - self.positions.shape[1]
        new = self.positions.max() + 1 + torch.arange(num_new)
        positions = torch.cat([self.positions, new.expand(3, -1)], dim=1)  # (3, N)
        steps = rope["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = positions[axis].T * steps
        first, second = heads[..., :half], heads[..., half:]
        cosines, sines = angles.cos(), angles.sin()
        return torch.cat(
            [first * cosines - second * sines, second * cosines + first * sines], dim=-1
        )


class Oracle:
    """One prompt of one model."""

    @torch.no_grad()
    def __init__(self, model: Any, given: Prompt) -> None:
        self.model, self.places = model, places(given)
        ids = given["input_ids"]
        known = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
        grids = {key: given[key] for key in known if key in given}
        self.positions = model.model.get_rope_index(
            ids[None], mm_token_type_ids=given["mm_token_type_ids"][None], **grids
        )[0][:, 0]
        self.embeds = model.get_input_embeddings()(ids).clone()
        num_deep = len(getattr(model.config.vision_config, "deepstack_visual_indexes", ()))
        self.deep = torch.zeros(num_deep, *self.embeds.shape)
        for token, get_features, pixel_key, grid_key in (
            (IMAGE, model.model.get_image_features, "pixel_values", "image_grid_thw"),
            (VIDEO, model.model.get_video_features, "pixel_values_videos", "video_grid_thw"),
        ):
            if pixel_key in given:
                found = get_features(given[pixel_key], given[grid_key], return_dict=True)
                self.embeds[ids == token] = torch.cat(list(found.pooler_output))
                for layer in range(num_deep):
                    features = found.deepstack_features[layer]  # split by image since 5.23
                    whole = features if isinstance(features, Tensor) else torch.cat(list(features))
                    self.deep[layer, ids == token] = whole
        self.num_layers = model.config.text_config.num_hidden_layers

    def held(self, kept: list[list[int]]) -> Tensor:
        """Return (L,) bool, the tokens that stay when these of each image do."""
        stays = torch.ones(len(self.embeds), dtype=torch.bool)
        for columns, indices in zip(self.places, kept, strict=True):
            stays[columns] = False
            stays[columns[indices]] = True
        return stays

    def decoder(self, kept: list[list[int]]) -> tuple[QwenReference, Tensor]:
        """Return the decoder for a pruned prompt, and (M, D) that prompt."""
        stays = self.held(kept)
        decoder = QwenReference(self.model, self.positions[:, stays], self.deep[:, stays])
        return decoder, self.embeds[stays]

    def greedy(
        self, kept: list[list[int]], steps: int, without: tuple[int, list[list[int]]] | None = None
    ) -> list[int]:
        """Return the answer when the decoder reads the ``kept`` tokens.

        Args:
            kept: by image.
            steps: tokens to generate.
            without: from this layer on only these of them are there.
        """
        decoder, embeds = self.decoder(kept)
        present = torch.ones(self.num_layers, len(embeds), dtype=torch.bool)
        if without is not None:
            layer, fewer = without
            present[layer:] = self.held(fewer)[self.held(kept)]
        return decoder.greedy(embeds, steps, present)[0]
