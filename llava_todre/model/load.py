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
from llava_todre.model.adapters import check_parts, laid_over, merged
from llava_todre.model.bounded import check_tokenizer
from llava_todre.model.chat_template import suggested_template
from llava_todre.model.checkpoint import find_checkpoint, first_line, read_json, read_weights
from llava_todre.model.config_check import (
    GENERATION,
    PROCESSOR,
    check_config,
    check_tokens,
    check_values,
)
from llava_todre.model.fit import matched
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
from llava_todre.model.quantised import check_unquantised, quantisation

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_PROCESSOR_KEYS = (
    "do_resize size resample do_center_crop crop_size do_rescale rescale_factor do_normalize "
    "image_mean image_std do_convert_rgb"
).split()


def load_pretrained_model(
    model_path: str | Path,
    model_base: str | None = None,
    model_name: str | None = None,
    load_8bit: bool = False,
    load_4bit: bool = False,
    *,
    quantization_config: Any = None,
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
        model_base: where ``model_path`` holds only a projector or a LoRA adapter: the model it was
            trained on, Vicuna or LLaVA, a directory or a hub id. Adapters are merged, with peft.
        model_name: instead of the last part of ``model_path``, where the conversation template
            goes by the name; what kind of model the checkpoint is, its config says.
        load_8bit: quantise the decoder by LLM.int8 of bitsandbytes; tower and projector stay.
        load_4bit: quantise the decoder to NF4 of bitsandbytes; tower and projector stay.
        quantization_config: instead of both, any that ``transformers`` has, such as
            ``BitsAndBytesConfig``, ``TorchAoConfig`` or ``QuantoConfig``; as they come, these
            quantise tower and projector, too.
        revision: branch, tag or commit on the hub.
        dtype: float32, float16, bfloat16, or auto: the checkpoint's own on a GPU; float32 on a CPU,
            where half precision is slow and inexact.
        device: where the model goes; auto is the GPU if there is one.
        device_map: instead of ``device``, to spread one model ("auto", or module name -> device);
            needs accelerate.
        tp_plan: "auto" instead of both, to split the heads and the MLP of every decoder layer over
            all processes that torchrun started, one per GPU, or on the CPU where there is none.
            All of them must make the same calls.
        attn_implementation: eager, sdpa or flash_attention_2.
        protocol: native, or paper: see :func:`llava_todre.model.convert.with_protocol`.

    Returns:
        (tokenizer, model in eval mode, image processor, context length in tokens). The image
        processor is also ``model.get_vision_tower().image_processor``.

    Raises:
        TodreError: one line saying what about the arguments or the checkpoint is wrong.
    """
    if protocol not in convert.PROTOCOLS:
        raise unknown("protocol", protocol, convert.PROTOCOLS)
    parallel = tensor_parallel(tp_plan, device, device_map)
    target = target_device(device, device_map)
    check_attention(attn_implementation, target)
    wanted = parse_dtype(dtype)

    folder = find_checkpoint("model_path", str(model_path), revision)
    check_parts(folder, has_base=model_base is not None)
    base = folder if model_base is None else find_checkpoint("model_base", str(model_base))
    settings, tensors, processor = _read(folder, base, protocol)
    stored = DTYPES.get(settings.pop("dtype", None), torch.float16)
    running = wanted or (torch.float32 if target.type == "cpu" else stored)
    quantised = quantisation(load_8bit, load_4bit, quantization_config, running)
    config = convert.built(str(folder / "config.json"), LlavaConfig, **settings)
    check_tokens(folder / "config.json", vars(config), config.vocab_size)
    tokenizer = _load_tokenizer(base)
    if parallel is not None:
        if quantised is not None:
            raise TodreError("tp_plan and quantisation were both given; give one.")
        check_split(config, parallel.tp_size)
    tensors = matched(base, config, tensors)
    how = {"config": config, "dtype": running, "attn_implementation": attn_implementation}
    if base != folder:
        tensors = merged(folder, _model(tensors, **how)).state_dict()
    spread = device_map if spreads(device_map) else None
    if quantised is not None:
        spread = spread or {"": target}  # each weight is quantised where it is to stay
    model = _model(
        tensors,
        **how,
        device_map=spread,
        distributed_config=parallel,
        quantization_config=quantised,
    )
    if spreads(device_map):
        check_spread(getattr(model, "hf_device_map", {}))
    elif parallel is None and quantised is None:
        model.to(target)
    model.get_vision_tower().image_processor = processor
    model.name_or_path = str(model_path)
    model.suggested_template = suggested_template(
        model_name or str(model_path), read_json(_config_of(folder, base)), tokenizer.get_vocab()
    )
    for place in (base, folder):  # a part's own, if it has one
        if (place / "generation_config.json").is_file():
            model.generation_config = _generation_config(place, config)
    return tokenizer, model.eval(), processor, _context_length(config)


# ---------------------------------------------------------------------- what the files hold


def _read(folder: Path, base: Path, protocol: str) -> tuple[dict[str, Any], dict[str, Tensor], Any]:
    """Return settings for the config, tensors under our names, and the image processor.

    Args:
        folder: the checkpoint.
        base: where the weights are on which a part is laid; the same where it is whole.
        protocol: native or paper.
    """
    raw = _read_config(_config_of(folder, base))
    layout = convert.detect_layout(raw)
    if layout == "hf":
        if base != folder:
            raise TodreError(
                f"model_base {str(base)!r} has the layout of llava-hf; its adapters are run by "
                "transformers' own class: --backend transformers."
            )
        settings = convert.with_protocol(convert.from_hf(raw), protocol)
        tensors = _renamed(read_weights(folder), layout)
        check_unquantised(folder, raw, tensors)
        return settings, tensors, _load_processor([folder], settings)
    of_base = "hf" if "text_config" in read_json(base / "config.json") else "original"
    tensors = _renamed(read_weights(base), of_base)
    check_unquantised(folder, raw, tensors)
    embedded = any(name.startswith(convert.TOWER_PREFIX) for name in tensors)
    if embedded and raw.get("vision_config") and (folder / "preprocessor_config.json").is_file():
        folders, tower = [folder], raw["vision_config"]  # nothing next to it is needed
    else:
        tower_folder = _find_tower(raw["mm_vision_tower"], [folder, base], weights=not embedded)
        folders, tower = [tower_folder, folder], _read_config(tower_folder / "config.json")
        if not embedded:
            tensors |= _renamed(read_weights(tower_folder), "tower")
    if base != folder:
        tensors |= _renamed(laid_over(folder), "original")
    settings = convert.from_original(raw, convert.vision_config(tower))
    settings = convert.with_protocol(settings, protocol)
    return settings, tensors, _load_processor(folders, settings)


def _config_of(folder: Path, base: Path) -> Path:
    """Return the config.json of a checkpoint; an adapter need not have one."""
    own = folder / "config.json"
    return own if own.exists() else base / "config.json"


def _read_config(path: Path) -> dict[str, Any]:
    raw = read_json(path)
    check_config(path, raw)
    return raw


def _generation_config(folder: Path, config: LlavaConfig) -> GenerationConfig:
    path = folder / "generation_config.json"
    raw = read_json(path)
    check_values(path, raw, GENERATION)
    check_tokens(path, raw, config.vocab_size)
    # Unlike from_dict it remembers what was published, so that it can be saved as it is.
    made: GenerationConfig = convert.built(str(path), GenerationConfig.from_pretrained, folder)
    return made


def _find_tower(name: str, folders: list[Path], weights: bool) -> Path:
    """Return the tower's folder: relative to the checkpoint, absolute, or from the hub."""
    found = next((folder / name for folder in folders if (folder / name).is_dir()), name)
    return find_checkpoint("mm_vision_tower", str(found), weights=weights)


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
            check_values(folder / name, raw, PROCESSOR)
            raw = raw.get("image_processor") or raw
            known = {key: raw[key] for key in _PROCESSOR_KEYS if raw.get(key) is not None}
            processor = convert.built(str(folder / name), CLIPImageProcessorPil, **known)
            return _checked_processor(processor, folder / name, settings)
    places = " or ".join(str(folder) for folder in folders)
    raise TodreError(f"no preprocessor_config.json in {places}; copy it from the vision tower.")


def _checked_processor(processor: Any, path: Path, settings: dict[str, Any]) -> Any:
    crop, side = processor.crop_size, settings["vision_config"]["image_size"]
    shortest = processor.size["shortest_edge"]
    if (crop["height"], crop["width"]) != (side, side) or not 1 <= (shortest or 0) <= 16 * side:
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
    check_tokenizer(str(folder), tokenizer)
    if not tokenizer.chat_template and (folder / "chat_template.json").is_file():
        # Where older processors of llava-hf have it.
        tokenizer.chat_template = read_json(folder / "chat_template.json").get("chat_template")
    return tokenizer


# ---------------------------------------------------------------------- the model


def _model(tensors: dict[str, Tensor], **how: Any) -> Any:
    """Return our model with these tensors."""
    quantised = how.get("quantization_config")
    try:
        return LlavaLlamaForCausalLM.from_pretrained(None, state_dict=tensors, **how)
    except (ImportError, ValueError, RuntimeError, TypeError, NotImplementedError) as error:
        if quantised is None:
            raise
        raise TodreError(
            f"quantization_config {type(quantised).__name__} does not work here: "
            f"{first_line(error)}"
        ) from error


def _context_length(config: LlavaConfig) -> int:
    """Return how many tokens a prompt may have, visual ones included."""
    for key in ("max_sequence_length", "tokenizer_model_max_length"):
        if getattr(config, key, None):
            return int(getattr(config, key))
    return config.max_position_embeddings
