"""Tiny random models of transformers, and prompts for them.

A sample is a list of pieces: a number of text tokens, the (height, width) of an image, or "video".
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

IMAGE_ID, VIDEO_ID, PAD, FRAMES = 299, 298, 0, 3
Sample = list[Any]

ONE: list[Sample] = [[3, (112, 100), 9]]
SMALL: list[Sample] = [[3, (30, 112), 5]]
TWO_IMAGES: list[Sample] = [[2, (56, 112), 4, (112, 112), 6]]
BATCH: list[Sample] = [[3, (112, 100), 9], [2, (50, 112), 3, (112, 40), 5], [7]]
VIDEO: list[Sample] = [[3, "video", 6]]
VIDEO_BATCH: list[Sample] = [[2, (112, 100), 4, "video", 5], [3, "video", 7], [4, (56, 112), 3]]

DECODERS = {"llama": "LlamaConfig", "mistral": "MistralConfig", "qwen2": "Qwen2Config"}
USUAL_DECODER = {
    "llava": "llama",
    "llava_next": "mistral",
    "llava_next_video": "llama",
    "llava_onevision": "qwen2",
}
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
}


def tile(family: str) -> int:
    """Pixels per side of a view; OneVision gets a side that does not halve."""
    return 70 if family == "llava_onevision" else 56


def build(
    family: str, decoder: str = "llama", attention: str = "sdpa", seed: int = 0, **text: Any
) -> Any:
    """Return a random model."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": tile(family),
        "patch_size": 14,
    }
    if decoder == "mistral":
        text = {"sliding_window": None} | text
    config: dict[str, Any] = {
        "text_config": getattr(transformers, DECODERS[decoder])(**(_TEXT | text)),
        "vision_config": CLIPVisionConfig(**vision, projection_dim=32),
        "image_token_index": IMAGE_ID,
        "tie_word_embeddings": False,
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
    name = _MODELS[family]
    model_class = getattr(transformers, f"{name}ForConditionalGeneration")
    model = model_class(getattr(transformers, f"{name}Config")(**config)).eval()
    model.set_attn_implementation(attention)
    randomise(model, seed)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


def inputs_for(model: Any, samples: Sequence[Sample], side: str = "left") -> dict[str, Any]:
    """Return arguments of ``generate``; images and texts are random but always the same."""
    family = model.config.model_type
    draw = torch.Generator().manual_seed(5)
    pixels = tile(family)
    sizes = [piece for sample in samples for piece in sample if isinstance(piece, tuple)]
    videos = [piece for sample in samples for piece in sample if piece == "video"]
    inputs: dict[str, Any] = {}
    if sizes:
        views = () if family == "llava" else (5,)
        shape = (len(sizes), *views, 3, pixels, pixels)
        inputs["pixel_values"] = torch.randn(shape, generator=draw)
    if sizes and family != "llava":
        inputs["image_sizes"] = torch.tensor(sizes) * pixels // 56
    if sizes and family == "llava_onevision":
        counts = [sum(isinstance(piece, tuple) for piece in sample) for sample in samples]
        inputs["batch_num_images"] = torch.tensor(counts)
    if videos:
        shape = (len(videos), FRAMES, 3, pixels, pixels)
        inputs["pixel_values_videos"] = torch.randn(shape, generator=draw)
    features = visual_features(model, inputs)
    rows = []
    for sample in samples:
        row = [torch.tensor([1])]
        for piece in sample:
            if isinstance(piece, int):
                row.append(torch.randint(2, 290, (piece,), generator=draw))
            else:
                token = VIDEO_ID if piece == "video" else IMAGE_ID
                row.append(torch.full((len(next(features[token])),), token))
        rows.append(torch.cat(row))
    inputs["input_ids"] = pad_sequence(rows, True, PAD, padding_side=side)
    lengths = [torch.ones(len(row), dtype=torch.int64) for row in rows]
    inputs["attention_mask"] = pad_sequence(lengths, True, 0, padding_side=side)
    return inputs


@torch.no_grad()
def visual_features(model: Any, inputs: dict[str, Any]) -> dict[int, Iterator[Tensor]]:
    """Return what the decoder reads of every image and video, (S, D) each, by placeholder id."""
    images, videos = [], []
    if "pixel_values" in inputs:
        known = ("pixel_values", "image_sizes", "batch_num_images")
        given = {key: inputs[key] for key in known if key in inputs}
        images = list(model.model.get_image_features(**given).pooler_output)
    if "pixel_values_videos" in inputs:
        found = model.model.get_video_features(inputs["pixel_values_videos"]).pooler_output
        videos = [video.reshape(-1, video.shape[-1]) for video in found]
        if model.config.model_type == "llava_onevision" and len(videos[0]) % FRAMES == 0:
            # Before transformers 5.23 the newline was put there later.
            newline = model.model.image_newline[None]
            videos = [torch.cat([video, newline]) for video in videos]
    return {IMAGE_ID: iter(images), VIDEO_ID: iter(videos)}


@functools.cache
def model_of(family: str, attention: str = "sdpa", decoder: str | None = None) -> Any:
    """Return the model that tests share; attaching leaves no trace on it."""
    return build(family, decoder or USUAL_DECODER[family], attention)
