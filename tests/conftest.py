"""Tiny models built in code: 8 decoder layers of width 64; a tower of 4 layers, 4 x 4 patches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from llava_todre.model.llava import LlavaConfig, LlavaLlamaForCausalLM
from llava_todre.pruners import LayerView, Pruner
from llava_todre.spans import Kind

# Matrices this small are faster without handing work to a second thread.
torch.set_num_threads(1)

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
    "projection_dim": 32,
}
PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]


def randomise(model: nn.Module, seed: int) -> None:
    """Draw weights at which attention is far from uniform and every layer matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim > 1 and "embed" not in name:
                gain = 1.5 if "q_proj" in name or "k_proj" in name else 1.0
                noise *= gain * weight[0].numel() ** -0.5
            elif "norm" in name and name.endswith("weight"):
                noise = 1 + 0.1 * noise
            elif name.endswith("bias"):
                noise *= 0.1
            weight.copy_(noise)


@pytest.fixture(scope="session")
def tiny_llava() -> Callable[..., LlavaLlamaForCausalLM]:
    """Build a random LLaVA-NeXT: ``tiny_llava(attention, seed=0, **config)``."""

    def build(attention: str = "sdpa", seed: int = 0, **config: Any) -> LlavaLlamaForCausalLM:
        options = {
            "vocab_size": 300,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 1,
            "eos_token_id": None,
            "pad_token_id": 0,
            "tie_word_embeddings": False,
            "mm_projector_type": "mlp2x_gelu",
            "mm_hidden_size": 32,
            "mm_patch_merge_type": "spatial_unpad",
            "image_aspect_ratio": "anyres",
            "image_grid_pinpoints": PINPOINTS,
            "vision_config": VISION,
        }
        model = LlavaLlamaForCausalLM(LlavaConfig(**(options | config))).eval()
        model.config._attn_implementation = attention
        randomise(model, seed)
        return model

    return build


@pytest.fixture(params=["eager", "sdpa"])
def attention(request: pytest.FixtureRequest) -> str:
    """Run the test under both exact attention implementations."""
    return request.param


@pytest.fixture
def draw() -> torch.Generator:
    """A generator with a fixed seed."""
    return torch.Generator().manual_seed(0)


@dataclass(frozen=True, kw_only=True)
class MeasureAll(Pruner):
    """Measures Eq. 7 after every layer and never drops anything."""

    retain_ratio: float = 1.0
    all_text: bool = False

    def probe_layers(self, num_layers: int) -> tuple[int, ...]:
        return tuple(range(num_layers))

    def at_layer(self, view: LayerView) -> None:
        is_text = view.kinds != Kind.VISUAL if self.all_text else view.kinds == Kind.TEXT
        view.attention_ratios(is_text)
