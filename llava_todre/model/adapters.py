"""Folders that hold a part of a model, to be laid over a ``model_base``: projector, LoRA.

LLaVA's training leaves two kinds. After the first stage ``mm_projector.bin`` next to config.json;
with LoRA the adapter as ``peft`` writes it, and what else was trained in
``non_lora_trainables.bin``.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from llava_todre.errors import TodreError
from llava_todre.model.checkpoint import first_line, has_weights, read_json, read_tensors

ADAPTER = "adapter_config.json"
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_EXTRAS = ("mm_projector.bin", "non_lora_trainables.bin")
# What peft and DeepSpeed write before a name.
_WRAPPERS = re.compile(r"^(base_model\.)?(model\.)?(?=model\.|lm_head\.)")


def check_parts(folder: Path, has_base: bool) -> None:
    """Raise unless a folder holds a whole model, or a part of one and there is a base for it.

    Args:
        folder: the checkpoint.
        has_base: whether ``model_base`` was given.

    Raises:
        TodreError: what to give.
    """
    parts = [name for name in (ADAPTER, *_EXTRAS) if (folder / name).is_file()]
    is_whole = has_weights(folder)
    if has_base and not parts:
        raise TodreError(
            f"model_base was given, but {folder} holds neither an adapter nor a projector "
            f"({', '.join((ADAPTER, *_EXTRAS))}); leave model_base out."
        )
    if ADAPTER in parts and is_whole:
        raise TodreError(
            f"{folder} holds a whole model and {ADAPTER}; move one of them to another folder."
        )
    if parts and not is_whole and not has_base:
        known = read_json(folder / ADAPTER).get("base_model_name_or_path") if _adapts(folder) else 0
        named = f", {known!r} by its {ADAPTER}" if isinstance(known, str) and known else ""
        raise TodreError(
            f"{folder} holds only a part of a model ({', '.join(parts)}); give the model it was "
            f"trained on as model_base{named}."
        )


def _adapts(folder: Path) -> bool:
    return (folder / ADAPTER).is_file()


def laid_over(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a part that replace those of the base, by the original's names."""
    tensors: dict[str, Tensor] = {}
    for name in _EXTRAS:
        if (folder / name).is_file():
            tensors |= read_tensors(folder / name)
    return {_WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}


def merged(folder: Path, model: Any) -> Any:
    """Return a model with the adapter of a folder merged into its weights, if there is one.

    Args:
        folder: where :data:`ADAPTER` is, or not.
        model: with the weights of the base.

    Raises:
        TodreError: peft is missing, or the adapter does not fit the model.
    """
    if not _adapts(folder):
        return model
    if importlib.util.find_spec("peft") is None:
        raise TodreError(f"{folder} holds an adapter, which needs peft: pip install peft.")
    stored = next((folder / n for n in _ADAPTER_WEIGHTS if (folder / n).is_file()), None)
    if stored is None:
        raise TodreError(f"{folder} has no adapter; one of: {', '.join(_ADAPTER_WEIGHTS)}.")
    names = set(read_tensors(stored))
    read_json(folder / ADAPTER)
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict

    try:
        config = PeftConfig.from_pretrained(str(folder))
        if not any("vision_tower" in name for name in names):
            # Its projections have the same names; the original loads the tower afterwards.
            config.exclude_modules = r".*vision_tower.*"
        # On the meta device, so that nothing is drawn at random.
        wrapped = PeftModel.from_pretrained(
            model, str(folder), config=config, low_cpu_mem_usage=True
        )
        # Given, or peft looks on the hub whether the vocabulary has grown.
        words = any("embed_tokens" in name or "lm_head" in name for name in names)
        known = get_peft_model_state_dict(wrapped, save_embedding_layers=words)
        differing = names ^ set(known)
        if not differing:
            return wrapped.merge_and_unload(safe_merge=True)
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError, OSError) as error:
        raise TodreError(f"the adapter in {folder} does not merge: {first_line(error)}") from error
    raise TodreError(
        f"the adapter in {folder} does not fit the model: {len(differing)} tensors, such as "
        f"{min(differing)}, are only in one of the two."
    )


def unwrapped(model: Any) -> Any:
    """Return the model inside a ``PeftModel``; others as they are."""
    inner = getattr(model, "get_base_model", None)
    return model if inner is None else inner()
