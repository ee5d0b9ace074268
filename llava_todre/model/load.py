"""Load a published LLaVA checkpoint into our model.

config.json -> our config; shards -> one dictionary under our names, compared with the model by
name and shape before anything is loaded; then tokenizer, image processor, generation settings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava_todre.errors import TodreError, unknown
from llava_todre.model import convert
from llava_todre.model.chat_template import suggested_template
from llava_todre.model.checkpoint import find_checkpoint, first_line, read_json, read_weights
from llava_todre.model.llava import LlavaConfig, LlavaLlamaForCausalLM
from llava_todre.model.placement import (
    DTYPES,
    check_attention,
    check_split,
    check_spread,
    parse_dtype,
    spreads,
    target_device,
    tensor_parallel,
)

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_PROCESSOR_KEYS = (
    "do_resize size resample do_center_crop crop_size do_rescale rescale_factor do_normalize "
    "image_mean image_std do_convert_rgb"
).split()
_SHOWN = 3  # tensors named in a message


def load_pretrained_model(
    model_path: str | Path,
    model_base: str | None = None,
    model_name: str | None = None,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    device_map: Any = None,
    tp_plan: str | None = None,
    attn_implementation: str = "sdpa",
    protocol: str = "native",
) -> tuple[Any, LlavaLlamaForCausalLM, CLIPImageProcessorPil, int]:
    """Load tokenizer, model and image processor of a LLaVA checkpoint.

    Args:
        model_path: a directory or a hub id, in the original layout or that of llava-hf.
        model_base: for LoRA checkpoints in the original; not supported, merge them first.
        model_name: instead of the last part of ``model_path``, where the conversation template
            goes by the name; what kind of model the checkpoint is, its config says.
        revision: branch, tag or commit on the hub.
        dtype: float32, float16, bfloat16, or auto: the checkpoint's own on a GPU; float32 on a CPU,
            where half precision is slow and inexact.
        device: where the model goes; auto is the GPU if there is one.
        device_map: instead of ``device``, to spread one model ("auto", or module name -> device);
            needs accelerate.
        tp_plan: "auto" instead of both, to split the heads and the MLP of every decoder layer over
            all processes that torchrun started, one per GPU, or on the CPU where there is none.
            All of them must be asked the same.
        attn_implementation: eager, sdpa or flash_attention_2.
        protocol: native, or paper: see :func:`llava_todre.model.convert.with_protocol`.

    Returns:
        (tokenizer, model in eval mode, image processor, context length in tokens). The image
        processor is also ``model.get_vision_tower().image_processor``.

    Raises:
        TodreError: one line saying what about the arguments or the checkpoint is wrong.
    """
    if model_base is not None:
        raise TodreError(
            f"model_base {str(model_base)!r} is not supported; merge LoRA weights into the model "
            "first and give the merged checkpoint as model_path."
        )
    if protocol not in convert.PROTOCOLS:
        raise unknown("protocol", protocol, convert.PROTOCOLS)
    parallel = tensor_parallel(tp_plan, device, device_map)
    target = target_device(device, device_map)
    check_attention(attn_implementation, target)
    wanted = parse_dtype(dtype)

    folder = find_checkpoint("model_path", str(model_path), revision)
    settings, tensors, processor = _read(folder, protocol)
    stored = DTYPES.get(settings.pop("dtype", None), torch.float16)
    config = convert.built(str(folder / "config.json"), LlavaConfig, **settings)
    tokenizer = _load_tokenizer(folder)
    if parallel is not None:
        check_split(config, parallel.tp_size)
    tensors = _matched(folder, config, tensors)
    model = LlavaLlamaForCausalLM.from_pretrained(
        None,
        config=config,
        state_dict=tensors,
        dtype=wanted or (torch.float32 if target.type == "cpu" else stored),
        device_map=device_map if spreads(device_map) else None,
        distributed_config=parallel,
        attn_implementation=attn_implementation,
    )
    if spreads(device_map):
        check_spread(getattr(model, "hf_device_map", {}))
    elif parallel is None:
        model.to(target)
    model.get_vision_tower().image_processor = processor
    model.name_or_path = str(model_path)
    model.suggested_template = suggested_template(
        model_name or str(model_path), read_json(folder / "config.json"), tokenizer.get_vocab()
    )
    if (folder / "generation_config.json").is_file():
        read_json(folder / "generation_config.json")  # or an error of one line
        # Unlike from_dict it remembers what was published, so that it can be saved as it is.
        model.generation_config = convert.built(
            str(folder / "generation_config.json"), GenerationConfig.from_pretrained, folder
        )
    return tokenizer, model.eval(), processor, _context_length(config)


# ---------------------------------------------------------------------- what the files hold


def _read(folder: Path, protocol: str) -> tuple[dict[str, Any], dict[str, Tensor], Any]:
    """Return settings for the config, tensors under our names, and the image processor."""
    raw = read_json(folder / "config.json")
    layout = convert.detect_layout(raw)
    if layout == "hf":
        settings = convert.with_protocol(convert.from_hf(raw), protocol)
        tensors = _renamed(read_weights(folder), layout)
        return settings, tensors, _load_processor([folder], settings)
    tensors = _renamed(read_weights(folder), layout)
    embedded = any(name.startswith(convert.TOWER_PREFIX) for name in tensors)
    if embedded and "vision_config" in raw and (folder / "preprocessor_config.json").is_file():
        folders, tower = [folder], raw["vision_config"]  # nothing beside it is needed
    else:
        beside = _find_tower(raw["mm_vision_tower"], folder, weights=not embedded)
        folders, tower = [beside, folder], read_json(beside / "config.json")
        if not embedded:
            tensors |= _renamed(read_weights(beside), "tower")
    settings = convert.from_original(raw, convert.vision_config(tower))
    settings = convert.with_protocol(settings, protocol)
    return settings, tensors, _load_processor(folders, settings)


def _find_tower(name: str, folder: Path, weights: bool) -> Path:
    """Return the tower's folder: relative to the checkpoint, absolute, or from the hub."""
    beside = folder / name
    path = str(beside) if beside.is_dir() else name
    return find_checkpoint("mm_vision_tower", path, weights=weights)


def _renamed(tensors: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    pairs = ((convert.rename(name, layout), tensor) for name, tensor in tensors.items())
    return {name: tensor for name, tensor in pairs if name is not None}


def _load_processor(folders: list[Path], settings: dict[str, Any]) -> CLIPImageProcessorPil:
    """Return the image processor of the first folder that has one, always on the PIL back end.

    transformers prefers torchvision's where it is installed; its resizing differs in the second
    decimal of a pixel, and the original used PIL.
    """
    for folder in folders:
        for name in ("preprocessor_config.json", "processor_config.json"):
            if not (folder / name).is_file():
                continue
            raw = read_json(folder / name)
            raw = raw.get("image_processor", raw)
            known = {key: raw[key] for key in _PROCESSOR_KEYS if key in raw}
            processor = convert.built(str(folder / name), CLIPImageProcessorPil, **known)
            return _checked_processor(processor, folder / name, settings)
    places = " or ".join(str(folder) for folder in folders)
    raise TodreError(f"no preprocessor_config.json in {places}; copy it from the vision tower.")


def _checked_processor(processor: Any, path: Path, settings: dict[str, Any]) -> Any:
    crop, side = processor.crop_size, settings["vision_config"]["image_size"]
    if (crop["height"], crop["width"]) != (side, side) or not processor.size["shortest_edge"]:
        raise TodreError(
            f"{path} has size {dict(processor.size)} and crop_size {dict(crop)}; the vision tower "
            f"needs a shortest_edge and a crop of {side} x {side}."
        )
    return processor


def _load_tokenizer(folder: Path) -> Any:
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise TodreError(f"{folder} has no tokenizer; one of: {', '.join(_TOKENIZER_FILES)}.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, config=LlamaConfig())
    except Exception as error:  # every tokenizer library has its own errors
        raise TodreError(
            f"the tokenizer in {folder} does not load: {first_line(error)} "
            "(a tokenizer.model needs sentencepiece and protobuf)."
        ) from error
    if not tokenizer.chat_template and (folder / "chat_template.json").is_file():
        # Where older processors of llava-hf have it.
        tokenizer.chat_template = read_json(folder / "chat_template.json").get("chat_template")
    return tokenizer


# ---------------------------------------------------------------------- the model


def _matched(folder: Path, config: LlavaConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors the model has; an error when any is missing, unexpected or misshapen."""
    with torch.device("meta"):
        expected = {k: v.shape for k, v in LlavaLlamaForCausalLM(config).state_dict().items()}
    if "unpad" not in config.mm_patch_merge_type:
        tensors = {k: v for k, v in tensors.items() if k != "model.image_newline"}
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    wrong = {
        "missing": sorted(set(expected) - set(tensors) - tied),
        "unexpected": sorted(set(tensors) - set(expected)),
        "of wrong shape": [
            f"{name} {tuple(tensors[name].shape)} instead of {tuple(shape)}"
            for name, shape in expected.items()
            if name in tensors and tensors[name].shape != shape
        ],
    }
    if any(wrong.values()):
        parts = [f"{len(names)} {kind} ({_some(names)})" for kind, names in wrong.items() if names]
        raise TodreError(f"the weights in {folder} do not fit its config: {', '.join(parts)}.")
    return tensors


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _context_length(config: LlavaConfig) -> int:
    """Return how many tokens a prompt may have, visual ones included."""
    for key in ("max_sequence_length", "tokenizer_model_max_length"):
        if getattr(config, key, None):
            return int(getattr(config, key))
    return config.max_position_embeddings
