"""Weights in fewer bits: what ``load_8bit`` and ``load_4bit`` mean, and which packages it takes.

Quantising is done by ``transformers`` while it loads, with the package that its configuration
names. Methods never read weights, they run the modules that hold them, so any of these will do.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig
from transformers.quantizers.auto import AutoQuantizationConfig

from llava_todre.errors import TodreError
from llava_todre.model.checkpoint import first_line
from llava_todre.model.placement import DTYPES

# Tower and projector stay as they are, as in the original, which loads its tower by itself: they
# are a small part of the memory, and what is kept is decided by their features.
_KEPT = (
    "lm_head",
    "model.vision_tower",
    "model.visual",
    "model.mm_projector",
    "model.multi_modal_projector",
)
_PACKAGES = {  # method -> (module, what to install)
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"),
    "torchao": ("torchao", "torchao"),
    "quanto": ("optimum.quanto", "optimum-quanto"),
}


def quantisation(
    load_8bit: bool, load_4bit: bool, quantization_config: Any, dtype: torch.dtype | None
) -> Any:
    """Return the quantisation that these arguments of a loader ask for, or None.

    Args:
        load_8bit: LLM.int8 of bitsandbytes for the decoder.
        load_4bit: NF4 of bitsandbytes for the decoder, quantised twice, as the original.
        quantization_config: any of ``transformers``, or its dictionary, instead of both; it
            decides which modules it covers.
        dtype: in which 4-bit weights are multiplied; None for that of the configuration.

    Raises:
        TodreError: more than one was given, or a package is missing.
    """
    given = {"load_8bit": load_8bit, "load_4bit": load_4bit}
    given = {key: value for key, value in given.items() if value}
    if quantization_config is not None:
        given["quantization_config"] = quantization_config
    if not given:
        return None
    if len(given) > 1:
        raise TodreError(f"{' and '.join(given)} were both given; give one.")
    if quantization_config is not None:
        return _checked(quantization_config)
    require("bitsandbytes")
    if load_8bit:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(_KEPT))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=dtype or torch.float16,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=list(_KEPT),
    )


def _checked(config: Any) -> Any:
    """Return a configuration whose packages are there."""
    if isinstance(config, dict):
        try:
            config = AutoQuantizationConfig.from_dict(config)
        except (ValueError, TypeError, ImportError) as error:
            raise TodreError(f"quantization_config is not usable: {first_line(error)}") from error
    method = getattr(config, "quant_method", None)
    if method is None:
        raise TodreError(
            "quantization_config must be one of transformers, such as BitsAndBytesConfig, or its "
            f"dictionary, got {type(config).__name__}."
        )
    require(getattr(method, "value", str(method)))
    return config


def require(method: str) -> None:
    """Raise a TodreError unless the package for a ``quant_method`` is installed."""
    module, package = _PACKAGES.get(method, (None, None))
    for needed, install in ((module, package), ("accelerate", "accelerate")):
        if needed is not None and not _exists(needed):
            raise TodreError(f"quantisation by {method} needs {install}: pip install {install}.")


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that should hold it is not there
        return False


def stated_method(raw: dict[str, Any]) -> str | None:
    """Return how the weights of a checkpoint are quantised by its config.json; None if not."""
    stated = raw.get("quantization_config")
    if not isinstance(stated, dict) or not stated:
        return None
    return str(stated.get("quant_method", "unknown"))


def check_unquantised(folder: Path, raw: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Raise where a config.json says that the weights are quantised, true or not."""
    method = stated_method(raw)
    if method is None:
        return
    says = f"{folder / 'config.json'} has a quantization_config of {method!r}"
    if all(tensor.dtype in DTYPES.values() for tensor in tensors.values()):
        raise TodreError(f"{says}, but the weights are not quantised; remove that key.")
    raise TodreError(
        f"{says}; give unquantised weights, with load_8bit or load_4bit, or where the checkpoint "
        "has the layout of llava-hf use transformers' own class (--backend transformers)."
    )
