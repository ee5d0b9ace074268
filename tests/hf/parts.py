"""Tiny checkpoints with processors made of transformers' own parts, as a hub would hold them.

Token ids are those of ``tiny``; text is read byte by byte. Chat templates have the form that the
families document.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import transformers
from conftest import PINPOINTS
from tiny import END_ID, FAMILIES, IMAGE_ID, PATCH, QWEN, START_ID, TILE, VIDEO_ID, build, tile
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None
WITHOUT_TORCHVISION = ("llava", "llava_next")
"""Families whose processors have no part that reads videos, which needs torchvision."""

_LLAVA_NAMES = {
    IMAGE_ID: "<image>",
    VIDEO_ID: "<video>",
    START_ID: "<unused0>",
    END_ID: "<unused1>",
}
_QWEN_NAMES = {
    IMAGE_ID: "<|image_pad|>",
    VIDEO_ID: "<|video_pad|>",
    START_ID: "<|vision_start|>",
    END_ID: "<|vision_end|>",
}
_INTERNVL_NAMES = {
    IMAGE_ID: "<IMG_CONTEXT>",
    VIDEO_ID: "<video>",
    START_ID: "<img>",
    END_ID: "</img>",
}
_INTERNVL_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}

_TURNS = """\
{%% for message in messages %%}%(begin)s{%% for part in message['content'] %%}\
{%% if part['type'] == 'image' %%}%(image)s{%% elif part['type'] == 'video' %%}%(video)s\
{%% else %%}{{ part['text'] }}{%% endif %%}{%% endfor %%}%(end)s{%% endfor %%}\
{%% if add_generation_prompt %%}%(answer)s{%% endif %%}"""
_CHATML = {
    "begin": "<|im_start|>{{ message['role'] }}\n",
    "end": "<|im_end|>\n",
    "answer": "<|im_start|>assistant\n",
}
_VICUNA = {
    "begin": "{{ message['role'].upper() }}: ",
    "image": "<image>\n",
    "video": "<video>\n",
    "end": " ",
    "answer": "ASSISTANT:",
}


def chat_template(family: str) -> str:
    """Return the template of a family: turns, and what stands for an image and a video."""
    if family in QWEN:
        words = {
            "image": "<|vision_start|><|image_pad|><|vision_end|>",
            "video": "<|vision_start|><|video_pad|><|vision_end|>",
        }
        return _TURNS % (_CHATML | words)
    if family == "internvl":
        return _TURNS % (_CHATML | {"image": "<IMG_CONTEXT>\n", "video": "<video>\n"})
    if family == "llava_onevision":
        return _TURNS % (_CHATML | {"image": "<image>\n", "video": "<video>\n"})
    return _TURNS % _VICUNA


def tokenizer_of(family: str) -> Any:
    """Return a tokenizer of 300 tokens: bytes, and what the family calls its special tokens."""
    names = _QWEN_NAMES if family in QWEN else _LLAVA_NAMES
    more: dict[str, Any] = {}
    if family == "internvl":
        names, more = _INTERNVL_NAMES, {"extra_special_tokens": _INTERNVL_TOKENS}
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    for number in range(len(vocabulary), min(names)):
        vocabulary[f"<reserved{number}>"] = number
    vocabulary |= {name: number for number, name in names.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>", *names.values()])
    if family not in QWEN:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", **more
    )


def processor_of(family: str) -> Any:
    """Return the family's processor, for the sizes of ``tiny``; needs torchvision for videos."""
    parts: dict[str, Any] = {
        "tokenizer": tokenizer_of(family),
        "chat_template": chat_template(family),
    }
    side = {"height": tile(family), "width": tile(family)}
    shortest = {"shortest_edge": tile(family)}
    scale = tile(family) / 56
    grids = [[int(height * scale), int(width * scale)] for width, height in PINPOINTS]
    views = {"size": shortest, "crop_size": side, "image_grid_pinpoints": grids}
    tower: dict[str, Any] = {
        "patch_size": PATCH,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    if family == "llava":
        images = transformers.CLIPImageProcessorPil(size=shortest, crop_size=side)
        return transformers.LlavaProcessor(image_processor=images, **tower, **parts)
    if family == "llava_next":
        images = transformers.LlavaNextImageProcessorPil(**views)
        return transformers.LlavaNextProcessor(image_processor=images, **tower, **parts)
    if family == "llava_next_video":
        return transformers.LlavaNextVideoProcessor(
            image_processor=transformers.LlavaNextImageProcessorPil(**views),
            video_processor=transformers.LlavaNextVideoVideoProcessor(
                size=shortest, crop_size=side
            ),
            **tower,
            **parts,
        )
    if family == "llava_onevision":
        return transformers.LlavaOnevisionProcessor(
            image_processor=transformers.LlavaOnevisionImageProcessorPil(
                size=side, image_grid_pinpoints=grids
            ),
            video_processor=transformers.LlavaOnevisionVideoProcessor(size=side),
            num_image_tokens=(tile(family) // PATCH) ** 2,
            vision_feature_select_strategy="full",
            vision_aspect_ratio="anyres_max_2",
            **parts,
        )
    if family == "internvl":
        square = {"height": TILE, "width": TILE}
        return transformers.InternVLProcessor(
            image_processor=transformers.GotOcr2ImageProcessorPil(size=square, max_patches=4),
            video_processor=transformers.InternVLVideoProcessor(size=square),
            image_seq_length=16,
            **parts,
        )
    cells = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2}
    limits = {"shortest_edge": 16 * PATCH**2, "longest_edge": 256 * PATCH**2}
    videos = "Qwen3VLVideoProcessor" if family == "qwen3_vl" else "Qwen2VLVideoProcessor"
    name = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[family]
    return getattr(transformers, f"{name}Processor")(
        image_processor=transformers.Qwen2VLImageProcessorPil(**cells, size=limits),
        video_processor=getattr(transformers, videos)(**cells, size=limits),
        **parts,
    )


def save_checkpoint(family: str, folder: Path) -> Path:
    """Save the tiny model of a family with its processor; returns the folder."""
    assert family in FAMILIES
    build(family).save_pretrained(folder)
    processor_of(family).save_pretrained(folder)
    return folder
