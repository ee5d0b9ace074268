"""Whether stored tensors are those of a model, checked before the model is built."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor

from llava_todre.errors import TodreError
from llava_todre.model.convert import TOWER_PREFIX, built
from llava_todre.model.llava import LlavaConfig, LlavaLlamaForCausalLM

_SHOWN = 3  # tensors named in a message


def _expected(what: str, config: LlavaConfig) -> dict[str, torch.Size]:
    """Return the shapes of the model's tensors, of which only one layer is built, without data."""
    one = copy.deepcopy(config)
    one.num_hidden_layers, one.mm_vision_select_layer = 1, 0
    one.vision_config = config.vision_config | {"num_hidden_layers": 1}
    with torch.device("meta"):
        model = built(what, LlavaLlamaForCausalLM, one)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    expected = {}
    for name, shape in shapes.items():
        of_tower = name.startswith(TOWER_PREFIX)
        layers = (config.vision_config if of_tower else vars(config))["num_hidden_layers"]
        for index in range(layers if ".layers.0." in name else 1):
            expected[name.replace(".layers.0.", f".layers.{index}.")] = shape
    return expected


def matched(folder: Path, config: LlavaConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors the model has; an error when any is missing, unexpected or misshapen."""
    expected = _expected(str(folder / "config.json"), config)
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
        "of wrong type": [
            f"{name} {str(tensor.dtype).removeprefix('torch.')}"
            for name, tensor in tensors.items()
            if name in expected and not (tensor.is_floating_point() and tensor.itemsize > 1)
        ],
    }
    if any(wrong.values()):
        parts = [f"{len(names)} {kind} ({_some(names)})" for kind, names in wrong.items() if names]
        raise TodreError(f"the weights in {folder} do not fit its config: {', '.join(parts)}.")
    return tensors


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
