"""Our model's weights in transformers' own LLaVA classes.

The names are mapped here, independently of llava_todre.model.convert.
"""

from __future__ import annotations

from typing import Any

import torch
from conftest import PINPOINTS, VISION
from reference import IMAGE
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

from llava_todre.model.llava import LlavaLlamaForCausalLM

IMAGE_ID = 299
PREFIXES = {
    "model.vision_tower.vision_tower.": "model.vision_tower.",
    "model.mm_projector.0.": "model.multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "model.multi_modal_projector.linear_2.",
    "model.image_newline": "model.image_newline",
    "model.": "model.language_model.",
    "lm_head.": "lm_head.",
}


def stock(model: LlavaLlamaForCausalLM) -> nn.Module:
    """Return transformers' class with the weights of our model."""
    is_next = model.model.image_newline is not None
    text = LlamaConfig(**{**model.config.to_dict(), "model_type": "llama"})
    common: dict[str, Any] = {
        "text_config": text,
        "vision_config": CLIPVisionConfig(**VISION),
        "image_token_index": IMAGE_ID,
        "image_token_id": IMAGE_ID,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
    }
    if is_next:
        pinpoints = [[height, width] for width, height in PINPOINTS]
        other = LlavaNextForConditionalGeneration(
            LlavaNextConfig(**common, image_grid_pinpoints=pinpoints)
        )
    else:
        other = LlavaForConditionalGeneration(LlavaConfig(**common))
    other.set_attn_implementation(model.config._attn_implementation)
    weights = {}
    for name, weight in model.state_dict().items():
        ours = next(prefix for prefix in PREFIXES if name.startswith(prefix))
        weights[PREFIXES[ours] + name.removeprefix(ours)] = weight
    other.load_state_dict(weights)
    return other.eval()


def prompt_for(ids: list[int], num_visual: list[int]) -> Tensor:
    """Return ids in which every image is as many placeholder ids as it has tokens."""
    counts = iter(num_visual)
    expanded = [[IMAGE_ID] * next(counts) if token == IMAGE else [token] for token in ids]
    return torch.tensor([sum(expanded, [])])
