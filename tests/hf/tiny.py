"""Tiny random models of transformers, and prompts for them.

A sample is a list of pieces: a number of text tokens, the (height, width) of an image, or "video".
What a piece becomes is the family's affair: crops, tiles, or a grid of cells.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers
from conftest import PINPOINTS, randomise
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import CLIPVisionConfig, SiglipVisionConfig

IMAGE_ID, VIDEO_ID, START_ID, END_ID, PAD, FRAMES = 299, 298, 297, 296, 0, 3
PATCH = 14
TILE = 8 * PATCH
"""Pixels per side of a tile of InternVL, of 4 x 4 tokens."""
VIDEO_GRID = (FRAMES, 4, 6)
"""Of a video of Qwen: temporal groups, and patches per column and row."""
Sample = list[Any]

ONE: list[Sample] = [[3, (112, 100), 9]]
SMALL: list[Sample] = [[3, (30, 112), 5]]
TWO_IMAGES: list[Sample] = [[2, (56, 112), 4, (112, 112), 6]]
BATCH: list[Sample] = [[3, (112, 100), 9], [2, (50, 112), 3, (112, 40), 5], [7]]
THREE: list[Sample] = [*ONE, [2, (50, 112), 3, (112, 40), 8], [4, (56, 112), 7]]
VIDEO: list[Sample] = [[3, "video", 6]]
VIDEO_BATCH: list[Sample] = [[2, (112, 100), 4, "video", 5], [3, "video", 7], [4, (56, 112), 3]]

DECODERS = {"llama": "LlamaConfig", "mistral": "MistralConfig", "qwen2": "Qwen2Config"}
USUAL_DECODER = {
    "llava": "llama",
    "llava_next": "mistral",
    "llava_next_video": "llama",
    "llava_onevision": "qwen2",
}
"""Of the LLaVA families."""
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
FAMILIES = (*USUAL_DECODER, *QWEN, "internvl")
_TEXT = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": PAD,
    "tie_word_embeddings": False,
}
_MODELS = {
    "llava": "Llava",
    "llava_next": "LlavaNext",
    "llava_next_video": "LlavaNextVideo",
    "llava_onevision": "LlavaOnevision",
    "qwen2_vl": "Qwen2VL",
    "qwen2_5_vl": "Qwen2_5_VL",
    "qwen3_vl": "Qwen3VL",
    "internvl": "InternVL",
}


# ---------------------------------------------------------------- models


def tile(family: str) -> int:
    """Pixels per side of a view; OneVision gets a side that does not halve."""
    return 70 if family == "llava_onevision" else 56


def build(
    family: str,
    decoder: str | None = None,
    attention: str = "sdpa",
    seed: int = 0,
    vision: dict[str, Any] | None = None,
    **text: Any,
) -> Any:
    """Return a random model; the same for every implementation of attention."""
    if family in QWEN:
        config = _qwen(family, vision or {}, text)
    elif family == "internvl":
        config = _internvl(vision or {}, text)
    else:
        config = _llava(family, decoder or "llama", text)
    name = _MODELS[family]
    model_class = getattr(transformers, f"{name}ForConditionalGeneration")
    whole = getattr(transformers, f"{name}Config")(**config, tie_word_embeddings=False)
    model = model_class(whole).eval()
    model.set_attn_implementation(attention)
    randomise(model, seed)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


@functools.cache
def model_of(family: str, attention: str = "sdpa", decoder: str | None = None) -> Any:
    """Return the model that tests share; attaching leaves no trace on it."""
    return build(family, decoder or USUAL_DECODER.get(family), attention)


def _llava(family: str, decoder: str, text: dict[str, Any]) -> dict[str, Any]:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": tile(family),
        "patch_size": PATCH,
    }
    if decoder == "mistral":
        text = {"sliding_window": None} | text
    config: dict[str, Any] = {
        "text_config": getattr(transformers, DECODERS[decoder])(**(_TEXT | text)),
        "vision_config": CLIPVisionConfig(**vision, projection_dim=32),
        "image_token_index": IMAGE_ID,
    }
    if family != "llava":
        scale = tile(family) / 56
        pinpoints = [[int(height * scale), int(width * scale)] for width, height in PINPOINTS]
        config["image_grid_pinpoints"] = pinpoints
    if family in ("llava_next_video", "llava_onevision"):
        config["video_token_index"] = VIDEO_ID
    if family == "llava_onevision":
        config["vision_config"] = SiglipVisionConfig(**vision, vision_use_head=False)
        config["vision_aspect_ratio"] = "anyres_max_2"
    return config


def _qwen(family: str, changes: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    vision: dict[str, Any] = {
        "depth": 4,
        "num_heads": 4,
        "patch_size": PATCH,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": 10_000.0,
        "mrope_section": [2, 3, 3],
    }
    text = _TEXT | {"rope_parameters": rope} | text
    if family == "qwen2_vl":
        vision |= {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    else:
        vision |= {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64}
    if family == "qwen2_5_vl":  # windows of 2 x 2 tokens
        vision |= {"fullatt_block_indexes": [1, 3], "window_size": 4 * PATCH}
    if family == "qwen3_vl":
        vision |= {"deepstack_visual_indexes": [0, 2], "num_position_embeddings": 64}
        text["head_dim"] = 16
        rope["mrope_interleaved"] = True
    return {
        "vision_config": vision | changes,
        "text_config": text,
        "image_token_id": IMAGE_ID,
        "video_token_id": VIDEO_ID,
        "vision_start_token_id": START_ID,
        "vision_end_token_id": END_ID,
    }


def _internvl(changes: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": [TILE, TILE],
        "patch_size": [PATCH, PATCH],
    }
    return {
        "vision_config": vision | changes,
        "text_config": transformers.Qwen2Config(**(_TEXT | text)),
        "image_token_id": IMAGE_ID,
    }


# ---------------------------------------------------------------- prompts


def grid(size: tuple[int, int]) -> tuple[int, int, int]:
    """Return what Qwen makes of an image: frames, and patches per column and row, twice as many."""
    return 1, size[0] // PATCH * 2, size[1] // PATCH * 2


def tiles(piece: Any) -> int:
    """Return into how many tiles InternVL cuts an image; of a video, one per frame."""
    return FRAMES if piece == "video" else max(1, piece[0] // 56) * max(1, piece[1] // 50)


def inputs_for(model: Any, samples: Sequence[Sample], side: str = "left") -> dict[str, Any]:
    """Return arguments of ``generate``; images and texts are random but always the same."""
    family = model.config.model_type
    draw = torch.Generator().manual_seed(5)

    def text(count: int) -> Tensor:
        return torch.randint(2, 290, (count,), generator=draw)

    inputs = _pixels(family, samples, draw)
    features = {} if family == "internvl" else visual_features(model, inputs)
    rows = []
    for sample in samples:
        row = [torch.tensor([1])]
        for piece in sample:
            if isinstance(piece, int):
                row.append(text(piece))
                continue
            is_video = piece == "video"
            token = VIDEO_ID if is_video and family != "internvl" else IMAGE_ID
            count = len(next(features[token])) if features else 16 * tiles(piece)
            if family in USUAL_DECODER:
                row.append(torch.full((count,), token))
                continue
            # Some write the time, or the number, of each frame.
            frames = FRAMES if is_video and family in ("qwen3_vl", "internvl") else 1
            for _ in range(frames):
                row.append(text(2 if frames > 1 else 0))
                row.append(torch.tensor([START_ID, *[token] * (count // frames), END_ID]))
        rows.append(torch.cat(row))
    inputs["input_ids"] = pad_sequence(rows, True, PAD, padding_side=side)
    lengths = [torch.ones(len(row), dtype=torch.int64) for row in rows]
    inputs["attention_mask"] = pad_sequence(lengths, True, 0, padding_side=side)
    return with_ids(model, inputs, inputs["input_ids"])


def with_ids(model: Any, inputs: dict[str, Any], ids: Tensor) -> dict[str, Any]:
    """Return the inputs with other ids; whatever is longer than before is read too."""
    longer = ids.shape[1] - inputs["attention_mask"].shape[1]
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, longer), value=1)
    inputs = inputs | {"input_ids": ids, "attention_mask": mask}
    if model.config.model_type in QWEN:
        inputs["mm_token_type_ids"] = (ids == IMAGE_ID).int() + 2 * (ids == VIDEO_ID).int()
    return inputs


def _pixels(family: str, samples: Sequence[Sample], draw: torch.Generator) -> dict[str, Any]:
    """Return all arguments that show something."""
    shown = [piece for sample in samples for piece in sample if not isinstance(piece, int)]
    sizes = [piece for piece in shown if piece != "video"]
    num_videos, inputs = len(shown) - len(sizes), {}

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    if family == "internvl":
        if shown:
            inputs["pixel_values"] = randn(sum(map(tiles, shown)), 3, TILE, TILE)
        return inputs
    if family in QWEN:
        for grids, pixel_key, grid_key in (
            ([grid(size) for size in sizes], "pixel_values", "image_grid_thw"),
            ([VIDEO_GRID] * num_videos, "pixel_values_videos", "video_grid_thw"),
        ):
            if grids:
                inputs[grid_key] = torch.tensor(grids)
                patches = int(inputs[grid_key].prod(dim=1).sum())
                inputs[pixel_key] = randn(patches, 3 * 2 * PATCH * PATCH)
        if num_videos and family == "qwen2_5_vl":
            inputs["second_per_grid_ts"] = torch.full((num_videos,), 0.5)
        return inputs
    pixels = tile(family)
    if sizes:
        views = () if family == "llava" else (5,)
        inputs["pixel_values"] = randn(len(sizes), *views, 3, pixels, pixels)
    if sizes and family != "llava":
        inputs["image_sizes"] = torch.tensor(sizes) * pixels // 56
    if sizes and family == "llava_onevision":
        counts = [sum(isinstance(piece, tuple) for piece in sample) for sample in samples]
        inputs["batch_num_images"] = torch.tensor(counts)
    if num_videos:
        inputs["pixel_values_videos"] = randn(num_videos, FRAMES, 3, pixels, pixels)
    return inputs


@torch.no_grad()
def visual_features(model: Any, inputs: dict[str, Any]) -> dict[int, Iterator[Tensor]]:
    """Return what the decoder reads of every image and video, (S, D) each, by placeholder id."""
    images, videos = [], []
    family, known = model.config.model_type, ("image_sizes", "batch_num_images", "image_grid_thw")
    if "pixel_values" in inputs:
        given = {key: inputs[key] for key in known if key in inputs}
        found = model.model.get_image_features(inputs["pixel_values"], **given, return_dict=True)
        images = list(found.pooler_output)
    if family == "internvl":  # tiles, of which those in a row are an image
        shown = inputs["input_ids"] == IMAGE_ID
        runs = [row.unique_consecutive(return_counts=True) for row in shown]
        lengths = [length for is_run, lengths in runs for length in lengths[is_run].tolist()]
        images = list(torch.cat(images).split(lengths)) if images else []
    if "pixel_values_videos" in inputs:
        given = {"video_grid_thw": inputs["video_grid_thw"]} if family in QWEN else {}
        pixels = inputs["pixel_values_videos"]
        found = model.model.get_video_features(pixels, **given, return_dict=True).pooler_output
        videos = [video.reshape(-1, video.shape[-1]) for video in found]
        if family == "llava_onevision" and len(videos[0]) % FRAMES == 0:
            # Before transformers 5.23 the newline was put there later.
            newline = model.model.image_newline[None]
            videos = [torch.cat([video, newline]) for video in videos]
    return {IMAGE_ID: iter(images), VIDEO_ID: iter(videos)}
