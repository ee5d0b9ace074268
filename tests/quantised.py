"""Quantised models and their twins: the same weights, as plain ``nn.Linear`` holds them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn


def _bitsandbytes(**options: Any) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**options, llm_int8_skip_modules=["lm_head"])


def _torchao(name: str) -> Any:
    from transformers import TorchAoConfig

    return TorchAoConfig(getattr(import_module("torchao.quantization"), name)())


def _quanto(weights: str) -> Any:
    from optimum.quanto.library.extensions.cpp import ext
    from transformers import QuantoConfig

    # The package's own, in C++, is compiled when it is first used, which takes a minute.
    ext._lib = SimpleNamespace(
        unpack=lambda packed, bits: torch.cat(
            [packed >> shift & 2**bits - 1 for shift in range(0, 8, bits)]
        )
    )
    return QuantoConfig(weights=weights)


@dataclass(frozen=True)
class Format:
    """A way to quantise every linear layer, of decoder, tower and projector, but the last."""

    package: str
    config: Callable[[], Any]
    rounds_inputs: bool = False
    """Whether what enters a layer is rounded too: then no plain layer computes the same."""


FORMATS = {
    "bitsandbytes-8bit": Format(
        "bitsandbytes", lambda: _bitsandbytes(load_in_8bit=True), rounds_inputs=True
    ),
    "bitsandbytes-nf4": Format(
        "bitsandbytes",
        lambda: _bitsandbytes(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
    ),
    "bitsandbytes-fp4": Format(
        "bitsandbytes",
        lambda: _bitsandbytes(
            load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=torch.float32
        ),
    ),
    "torchao-int8": Format("torchao", lambda: _torchao("Int8WeightOnlyConfig")),
    "torchao-int8-both": Format(
        "torchao", lambda: _torchao("Int8DynamicActivationInt8WeightConfig"), rounds_inputs=True
    ),
    "torchao-float8": Format("torchao", lambda: _torchao("Float8WeightOnlyConfig")),
    "quanto-int8": Format("optimum.quanto", lambda: _quanto("int8")),
    "quanto-int4": Format("optimum.quanto", lambda: _quanto("int4")),
    "quanto-int2": Format("optimum.quanto", lambda: _quanto("int2")),
    "quanto-float8": Format("optimum.quanto", lambda: _quanto("float8")),
}
MAIN = ("bitsandbytes-8bit", "bitsandbytes-nf4", "torchao-int8", "quanto-int8")
"""One of each package and width, on which every method is compared."""


def configuration(name: str) -> Any:
    """Return a format's configuration; the test is skipped where its package is missing."""
    pytest.importorskip(FORMATS[name].package)
    return FORMATS[name].config()


def weight_of(module: nn.Module) -> Tensor:
    """Return the weight of a quantised layer in float32, as its package dequantises it."""
    weight: Any = module.weight
    if type(module).__name__ == "Linear8bitLt":
        return weight.CB.float() * weight.SCB.float()[:, None] / 127
    if type(module).__name__ == "Linear4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state).float()
    return weight.dequantize().float()


class Through(nn.Module):
    """The layer's own forward, in a module whose weight nobody finds."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._run = layer.forward

    def forward(self, states: Tensor) -> Tensor:
        return self._run(states)


def make_twin(quantised: nn.Module, twin: nn.Module, rounds_inputs: bool) -> int:
    """Give ``twin`` the weights of ``quantised``, or its forwards; returns how many layers had.

    Args:
        quantised: the model.
        twin: the same model before it was quantised.
        rounds_inputs: see :class:`Format`.
    """
    count = 0
    for name, module in quantised.named_modules():
        plain = type(module) is nn.Linear and type(module.weight) is nn.Parameter
        if plain or not isinstance(module, nn.Linear):
            continue
        count += 1
        if type(module).__name__ == "Linear4bit":
            # CPUs with bfloat16 would pack the weights anew, in blocks these are too small for.
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        if rounds_inputs:
            parent, _, last = name.rpartition(".")
            setattr(twin.get_submodule(parent), last, Through(module))
        else:
            with torch.no_grad():
                weight: Any = twin.get_submodule(name).weight
                weight.copy_(weight_of(module))
    return count
