"""Loading stock models of transformers, and telling which checkpoints are theirs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from llava_todre.errors import TodreError, unknown
from llava_todre.hf.families import FAMILIES, family_named
from llava_todre.hf.stock import StockModel
from llava_todre.model.checkpoint import check_shard_names, first_line
from llava_todre.model.placement import (
    check_attention,
    check_spread,
    parse_dtype,
    spreads,
    target_device,
)

BACKENDS = ("auto", "llava", "transformers")
"""Which class runs a model: ours, the one of transformers, or whichever fits."""


def load_stock_model(
    path: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: Any = "auto",
    device_map: Any = None,
    attn_implementation: str = "sdpa",
) -> StockModel:
    """Load a model and its processor through transformers.

    Args:
        path: a folder or a hub id, such as ``llava-hf/llava-v1.6-mistral-7b-hf``.
        revision: branch, tag or commit on the hub.
        dtype: float32, float16, bfloat16, or auto: the checkpoint's own on a GPU, float32 on a CPU.
        device: where the model goes; auto is the GPU if there is one.
        device_map: instead of ``device``, to spread one model.
        attn_implementation: eager, sdpa or flash_attention_2.

    Raises:
        TodreError: one line saying what about the arguments or the checkpoint is wrong.
    """
    check_shard_names(Path(path).expanduser())
    target = target_device(device, device_map)
    check_attention(attn_implementation, target)
    wanted = parse_dtype(dtype) or (torch.float32 if target.type == "cpu" else "auto")
    try:
        raw, _ = PreTrainedConfig.get_config_dict(path, revision=revision)
        family_named(_stock_class(raw))  # before gigabytes are loaded
        model, told = AutoModelForImageTextToText.from_pretrained(
            path,
            revision=revision,
            dtype=wanted,
            device_map=device_map if spreads(device_map) else None,
            attn_implementation=attn_implementation,
            output_loading_info=True,
        )
        processor = AutoProcessor.from_pretrained(path, revision=revision)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        if "requires the Torchvision library" in str(error):
            raise TodreError(
                f"pretrained {path!r} has a processor that needs torchvision, also for images; "
                f"install the release that fits torch {torch.__version__}."
            ) from error
        raise TodreError(f"pretrained {path!r} does not load: {first_line(error)}") from error
    missing = sorted(told["missing_keys"])
    if missing:  # transformers draws them at random
        raise TodreError(
            f"pretrained {path!r} lacks {len(missing)} tensors of the model, such as {missing[0]}."
        )
    if spreads(device_map):
        check_spread(getattr(model, "hf_device_map", {}))
    else:
        model.to(target)
    return StockModel(model.eval(), processor)


def _stock_class(config: Mapping[str, Any]) -> str:
    """Return the class of transformers that a checkpoint goes to, or what it says it is."""
    kind = str(config.get("model_type"))
    return str(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(kind, kind))


def uses_stock(backend: str, path: str, revision: str | None = None) -> bool:
    """Return whether transformers' own class is to run a checkpoint.

    Args:
        backend: llava, transformers, or auto: :func:`runs_as_stock` decides.
        path: folder or hub id.
        revision: branch, tag or commit on the hub.

    Raises:
        TodreError: another backend.
    """
    if backend not in BACKENDS:
        raise unknown("backend", backend, BACKENDS)
    return backend == "transformers" or (backend == "auto" and runs_as_stock(path, revision))


def runs_as_stock(path: str, revision: str | None = None) -> bool:
    """Return whether a checkpoint is one that only transformers' own classes run.

    Our class runs LLaVA-1.5 and LLaVA-NeXT on Llama or Mistral decoders, in either layout.
    """
    try:
        raw, _ = PreTrainedConfig.get_config_dict(path, revision=revision)
    except (OSError, ValueError):
        return False  # ours says what is wrong
    decoder = raw.get("text_config", {}).get("model_type", "llama")
    is_ours = raw.get("model_type") in ("llava", "llava_next") and decoder in ("llama", "mistral")
    return not is_ours and any(_stock_class(raw) in family.models for family in FAMILIES)
