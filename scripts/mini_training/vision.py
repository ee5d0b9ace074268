"""The CLIP vision tower of the mini model, in plain torch for training.

T tiles, N = 64 patches, D = 128 width. Parameter names are those of transformers 4.x
`CLIPVisionModel`, so a checkpoint of this module is a checkpoint of that one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class VisionConfig:
    """Sizes, with the key names of `CLIPVisionConfig`."""

    hidden_size: int = 128
    intermediate_size: int = 512
    num_hidden_layers: int = 5
    num_attention_heads: int = 4
    image_size: int = 112
    patch_size: int = 14
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch_size


class _Embeddings(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.patch_embedding = nn.Conv2d(3, width, patch, patch, bias=False)
        self.position_embedding = nn.Embedding(config.grid**2 + 1, width)
        nn.init.normal_(self.patch_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.02)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (T, N, D)
        first = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        return torch.cat([first, patches], 1) + self.position_embedding.weight


class _Attention(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        heads = (len(x), -1, self.num_heads, x.shape[-1] // self.num_heads)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (project(x).view(heads).transpose(1, 2) for project in projections)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        return self.fc2(hidden * torch.sigmoid(1.702 * hidden))


class _Layer(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.self_attn = _Attention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = _Mlp(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class _Encoder(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))


class _Transformer(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.encoder = _Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)


class VisionTower(nn.Module):
    """Tiles to patch features; LLaVA reads the layer before the last, without [CLS]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = _Transformer(config)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 and "position" not in name:
                nn.init.normal_(parameter, std=0.7 * parameter.shape[1] ** -0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def hidden(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(T, 3, 112, 112) to the last two hidden states, each (T, 1 + N, D)."""
        model = self.vision_model
        x = model.pre_layrnorm(model.embeddings(pixels))
        for layer in model.encoder.layers[:-1]:
            x = layer(x)
        return x, model.encoder.layers[-1](x)

    def features(self, pixels: Tensor) -> Tensor:
        """(T, 3, 112, 112) to `hidden_states[-2]` without [CLS], (T, N, D)."""
        model = self.vision_model
        x = model.pre_layrnorm(model.embeddings(pixels))
        for layer in model.encoder.layers[:-1]:
            x = layer(x)
        return x[:, 1:]


@torch.no_grad()
def start_positions(tower: VisionTower, pixels: Tensor, strength: float = 0.6) -> None:
    """Give the learnable position table a two-dimensional sine and cosine start.

    The usual start (std .02) is drowned by the patch embedding, and after thousands of steps
    neither quadrant nor digit order can be read from the features. `strength` is the table's
    standard deviation as a share of the patch embedding's on `pixels` (T, 3, 112, 112).
    """
    embeddings = tower.vision_model.embeddings
    grid, quarter = tower.config.grid, tower.config.hidden_size // 4
    frequency = 1.2 * torch.exp(-torch.arange(quarter) / quarter * math.log(20.0))
    y, x = torch.meshgrid(torch.arange(grid).float(), torch.arange(grid).float(), indexing="ij")
    waves = [f(v.reshape(-1, 1) * frequency) for v in (y, x) for f in (torch.sin, torch.cos)]
    table = torch.cat(waves, 1)
    spread = embeddings.patch_embedding(pixels).std()
    embeddings.position_embedding.weight[1:] = table / table.std() * spread * strength
