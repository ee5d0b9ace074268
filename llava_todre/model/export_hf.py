"""Save a model of ours in the layout of transformers' own LLaVA classes, as ``llava-hf/*`` are."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaNextConfig

from llava_todre.errors import TodreError
from llava_todre.model.chat_template import find_template, writes_bos
from llava_todre.model.convert import TOWER_PREFIX
from llava_todre.model.export_template import as_jinja
from llava_todre.model.export_tokenizer import with_image_token
from llava_todre.model.llava import LlavaLlamaForCausalLM
from llava_todre.model.prompt import AUTO, DEFAULT_IMAGE_TOKEN, Template, build_prompt

# The names of llava-hf/*, which all versions of transformers and the servers know.
_NAMES = (
    (TOWER_PREFIX, "vision_tower.vision_model."),
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.image_newline", "image_newline"),
    ("model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


def save_as_hf(
    model: LlavaLlamaForCausalLM, tokenizer: Any, folder: Path, template: str | Template = AUTO
) -> None:
    """Write model and processor so that ``AutoModelForImageTextToText`` reads them.

    Prompts get the token ids, and images the pixels, that they have with our class. Where the
    vocabulary has no row for ``<image>``, it grows by one: the mean of all rows, whose logit is
    never the largest.

    Args:
        model: with anyres and newlines (becomes LLaVA-NeXT), or with one padded view (LLaVA-1.5).
        tokenizer: of the model.
        folder: new or empty. It is there when all of it is.
        template: conversation template, written as the processor's chat template, with BOS; a name,
            a template, or auto, see :func:`~llava_todre.model.chat_template.find_template`.

    Raises:
        TodreError: a model that has no counterpart in transformers, or a folder that is in use or
            cannot be written.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        raise TodreError(
            "model must be loaded without load_8bit, load_4bit and quantization_config to be saved "
            "for transformers, got a quantised one."
        )
    config = _config(model)
    conversation = find_template(template, model, tokenizer)
    tokens = with_image_token(tokenizer)
    image_id = tokens.convert_tokens_to_ids(DEFAULT_IMAGE_TOKEN)
    config.image_token_index = config.image_token_id = image_id
    rows = max(image_id + 1, model.config.vocab_size)
    config.text_config.vocab_size = rows
    config.pad_token_id = config.text_config.pad_token_id = tokens.pad_token_id
    tokens.chat_template = as_jinja(conversation, _begin(tokens, conversation))
    with new_folder(folder) as unfinished:
        save_torch_state_dict(_weights(model, rows), unfinished)
        config.save_pretrained(unfinished)
        # As it was published, though transformers would now refuse to write some of that.
        generation = _generation(model, tokens, conversation)
        generation.to_json_file(unfinished / "generation_config.json", use_diff=True)
        _processor(model, tokens, config).save_pretrained(unfinished)


def check_new(folder: Path) -> None:
    """Raise unless a folder is new or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise TodreError(f"out must be a new or an empty folder, got {str(folder)!r}.")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give a folder to write into, which becomes ``folder`` if all goes well, and goes if not."""
    check_new(folder)
    folder = folder.resolve()
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)
    except (OSError, SafetensorError) as error:
        raise TodreError(f"out {str(folder)!r} cannot be written: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _config(model: LlavaLlamaForCausalLM) -> Any:
    ours = model.config
    tower = model.get_vision_tower()
    is_next = ours.mm_patch_merge_type == "spatial_unpad" and ours.image_aspect_ratio == "anyres"
    is_first = ours.mm_patch_merge_type == "flat" and ours.image_aspect_ratio == "pad"
    if ours.mm_projector_type != "mlp2x_gelu" or not (is_next or is_first):
        raise TodreError(
            "model must have mm_projector_type mlp2x_gelu, with mm_patch_merge_type spatial_unpad "
            "and image_aspect_ratio anyres, or with flat and pad, to be saved for transformers, "
            f"got {ours.mm_projector_type!r}, {ours.mm_patch_merge_type!r} and "
            f"{ours.image_aspect_ratio!r}."
        )
    settings = {**ours.to_dict(), "model_type": "llama"}
    known = [key for key in LlamaConfig().to_dict() if key in settings and key[0] != "_"]
    common: dict[str, Any] = {
        "text_config": LlamaConfig(**{key: settings[key] for key in known}),
        "vision_config": CLIPVisionConfig(**tower.config.to_dict()),
        "vision_feature_layer": ours.mm_vision_select_layer,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": ours.tie_word_embeddings,
        "image_seq_length": (tower.config.image_size // tower.config.patch_size) ** 2,
        "dtype": model.dtype,
    }
    if is_first:
        return LlavaConfig(**common, architectures=["LlavaForConditionalGeneration"])
    pinpoints = [[height, width] for width, height in ours.image_grid_pinpoints]
    return LlavaNextConfig(
        **common,
        architectures=["LlavaNextForConditionalGeneration"],
        image_grid_pinpoints=pinpoints,
    )


def _weights(model: LlavaLlamaForCausalLM, rows: int) -> dict[str, Tensor]:
    weights = {}
    for name, weight in model.state_dict().items():
        if name in _VOCABULARY and rows > len(weight):
            mean = weight.mean(dim=0, dtype=torch.float32).to(weight.dtype)
            weight = torch.cat([weight, mean.expand(rows - len(weight), -1)])
        ours, theirs = next(pair for pair in _NAMES if name.startswith(pair[0]))
        weights[theirs + name.removeprefix(ours)] = weight.detach().contiguous()
    return weights


def _generation(model: LlavaLlamaForCausalLM, tokens: Any, template: Template) -> Any:
    """Return the generation settings, with the padding token and all that ends an answer."""
    settings = copy.deepcopy(model.generation_config)
    settings.pad_token_id = tokens.pad_token_id
    if template.stop in tokens.get_vocab():
        ends = settings.eos_token_id
        ends = [*ends] if isinstance(ends, list) else [ends] * (ends is not None)
        stop = tokens.convert_tokens_to_ids(template.stop)
        settings.eos_token_id = ends if stop in ends else [*ends, stop]
    return settings


def _begin(tokens: Any, template: Template) -> str:
    """Return in Jinja what begins a prompt: BOS, and the space with which it gives our ids."""
    if not writes_bos(tokens):
        return "''"
    prompt = build_prompt("x", 1, template)
    for space in ("", " "):
        written = tokens(f"{tokens.bos_token}{space}{prompt}", add_special_tokens=False)
        if written.input_ids == tokens(prompt).input_ids:
            return f"bos_token + {space!r}" if space else "bos_token"
    raise TodreError(
        f"the tokenizer makes something else of {tokens.bos_token!r} in a prompt than of the "
        "one that it writes itself; such a checkpoint cannot be converted."
    )


def _processor(model: LlavaLlamaForCausalLM, tokens: Any, config: Any) -> Any:
    from transformers import LlavaNextProcessor, LlavaProcessor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil,
    )

    known: dict[str, Any] = model.get_vision_tower().image_processor.to_dict() | {"do_pad": True}
    known.pop("image_processor_type")
    is_next = isinstance(config, LlavaNextConfig)
    images: Any = (
        LlavaNextImageProcessorPil(**known, image_grid_pinpoints=config.image_grid_pinpoints)
        if is_next
        else LlavaImageProcessorPil(**known)
    )
    return (LlavaNextProcessor if is_next else LlavaProcessor)(
        images,
        tokens,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=DEFAULT_IMAGE_TOKEN,
        chat_template=tokens.chat_template,
    )
