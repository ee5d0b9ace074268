"""Save a model of ours in the layout of transformers' own LLaVA classes, as ``llava-hf/*`` are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

from llava_todre.errors import TodreError
from llava_todre.model.convert import TOWER_PREFIX
from llava_todre.model.llava import LlavaLlamaForCausalLM
from llava_todre.model.prompt import DEFAULT_IMAGE_TOKEN, build_prompt

_NAMES = (
    (TOWER_PREFIX, "model.vision_tower."),
    ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
    ("model.image_newline", "model.image_newline"),
    ("model.", "model.language_model."),
    ("lm_head.", "lm_head."),
)
_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


def save_as_hf(
    model: LlavaLlamaForCausalLM, tokenizer: Any, folder: Path, template: str = "vicuna_v1"
) -> None:
    """Write model and processor so that ``AutoModelForImageTextToText`` reads them.

    Where the vocabulary has no row for ``<image>``, it grows by one with the weights of the padding
    token, which no answer contains.

    Args:
        model: with anyres and newlines (becomes LLaVA-NeXT), or with one view (LLaVA-1.5).
        tokenizer: of the model; it gets the new token.
        folder: new or empty.
        template: conversation template, written as the processor's chat template.

    Raises:
        TodreError: a model that has no counterpart in transformers, or a folder that is in use.
    """
    config = _config(model)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise TodreError(f"out {str(folder)!r} is not empty; allowed: a new or an empty folder.")
    tokenizer.add_tokens([DEFAULT_IMAGE_TOKEN], special_tokens=True)
    image_id = tokenizer.convert_tokens_to_ids(DEFAULT_IMAGE_TOKEN)
    config.image_token_index = config.image_token_id = image_id
    rows = max(image_id + 1, model.config.vocab_size)
    config.text_config.vocab_size = rows
    is_next = isinstance(config, LlavaNextConfig)
    kind = LlavaNextForConditionalGeneration if is_next else LlavaForConditionalGeneration
    with torch.device("meta"):
        other: Any = kind(config)
    other.load_state_dict(_weights(model, rows), assign=True)
    other.generation_config = model.generation_config
    other.save_pretrained(folder)
    _processor(model, tokenizer, config, template).save_pretrained(folder)


def _config(model: LlavaLlamaForCausalLM) -> Any:
    ours = model.config
    tower = model.get_vision_tower()
    is_next = ours.mm_patch_merge_type == "spatial_unpad" and ours.image_aspect_ratio == "anyres"
    is_first = ours.mm_patch_merge_type == "flat" and ours.image_aspect_ratio == "pad"
    if ours.mm_projector_type != "mlp2x_gelu" or not (is_next or is_first):
        raise TodreError(
            f"model with mm_projector_type {ours.mm_projector_type!r}, mm_patch_merge_type "
            f"{ours.mm_patch_merge_type!r} and image_aspect_ratio {ours.image_aspect_ratio!r} has "
            "no class in transformers; allowed: mlp2x_gelu with spatial_unpad and anyres, or with "
            "flat and pad."
        )
    settings = {**ours.to_dict(), "model_type": "llama"}
    known = LlamaConfig().to_dict()
    common: dict[str, Any] = {
        "text_config": LlamaConfig(**{key: settings[key] for key in known if key in settings}),
        "vision_config": CLIPVisionConfig(**tower.config.to_dict()),
        "vision_feature_layer": ours.mm_vision_select_layer,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": ours.tie_word_embeddings,
    }
    if is_first:
        return LlavaConfig(**common)
    pinpoints = [[height, width] for width, height in ours.image_grid_pinpoints]
    return LlavaNextConfig(**common, image_grid_pinpoints=pinpoints)


def _weights(model: LlavaLlamaForCausalLM, rows: int) -> dict[str, Tensor]:
    pad = model.config.pad_token_id or 0
    weights = {}
    for name, weight in model.state_dict().items():
        if name in _VOCABULARY:
            weight = torch.cat([weight, weight[pad].expand(rows - len(weight), -1)])
        ours, theirs = next(pair for pair in _NAMES if name.startswith(pair[0]))
        weights[theirs + name.removeprefix(ours)] = weight.detach().clone()
    return weights


def _processor(model: LlavaLlamaForCausalLM, tokenizer: Any, config: Any, template: str) -> Any:
    from transformers import LlavaNextProcessor, LlavaProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil,
    )

    ours = model.get_vision_tower().image_processor
    is_next = isinstance(config, LlavaNextConfig)
    images: Any = ours
    if is_next:
        images = LlavaNextImageProcessorPil(
            size=dict(ours.size),
            crop_size=dict(ours.crop_size),
            resample=ours.resample,
            image_mean=list(ours.image_mean),
            image_std=list(ours.image_std),
            image_grid_pinpoints=config.image_grid_pinpoints,
        )
    return (LlavaNextProcessor if is_next else LlavaProcessor)(
        images,
        tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=DEFAULT_IMAGE_TOKEN,
        chat_template=_chat_template(template),
    )


def _chat_template(name: str) -> str:
    """Return a template for one question in the notation of transformers, images before text."""
    mark = "QUESTION"
    before, after = (json.dumps(part) for part in build_prompt(mark, 0, name).split(mark))
    image = json.dumps(DEFAULT_IMAGE_TOKEN)
    return (
        "{%- set content = messages[0]['content'] -%}"
        f"{{{{- {before} -}}}}"
        "{%- for item in content if item['type'] == 'image' -%}"
        f"{{{{- {image} + ('\\n' if loop.last else ' ') -}}}}"
        "{%- endfor -%}"
        "{%- for item in content if item['type'] == 'text' -%}{{- item['text'] -}}{%- endfor -%}"
        f"{{{{- {after} -}}}}"
    )
