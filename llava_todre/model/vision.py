"""The CLIP vision tower: patch features and, on request, one layer's [CLS] attention.

Symbols: V views, P patches per view, W width of the tower, H heads, E head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava_todre.errors import TodreError

# Views that go through the tower at once; bounds the memory of long videos.
MAX_VIEWS = 64


@dataclass(frozen=True)
class ViewFeatures:
    """What the tower makes of a batch of views."""

    patches: Tensor
    """(V, P, W)."""
    cls_attention: Tensor | None
    """(V, P) softmax attention of [CLS] over [CLS] and patches, mean over heads, patches only; sums
    to below one."""


class VisionTower(nn.Module):
    """CLIP as LLaVA uses it: ``mm_vision_select_layer`` chooses whose output is read.

    Layers beyond the one that is read are not run, and attention stays whatever implementation the
    model was loaded
    with: the one query row of [CLS] attention is computed on the side.
    """

    def __init__(
        self,
        vision_config: dict[str, Any],
        select_layer: int,
        select_feature: str,
        attn_implementation: str | None = None,
    ) -> None:
        """Build the tower without weights.

        Args:
            vision_config: keyword arguments of ``CLIPVisionConfig``.
            select_layer: index into the hidden states (0 is the embedding's output), e.g. -2.
            select_feature: ``"patch"``, which drops [CLS]; nothing else is supported.
            attn_implementation: the decoder's, e.g. ``"sdpa"``.
        """
        super().__init__()
        if select_feature != "patch":
            raise TodreError(
                f"mm_vision_select_feature {select_feature!r} is not supported; allowed: patch."
            )
        config = CLIPVisionConfig(**vision_config)
        config._attn_implementation = attn_implementation
        self.vision_tower = CLIPVisionModel(config)
        self.config = self.vision_tower.config
        num_states = self.config.num_hidden_layers + 1
        if not -num_states <= select_layer < num_states:
            raise TodreError(
                f"mm_vision_select_layer {select_layer} is out of range; "
                f"allowed: {-num_states} to {num_states - 1}."
            )
        self.num_run = select_layer % num_states
        self.image_processor: Any = None

    @property
    def side(self) -> int:
        """Patches per row and column of a view."""
        return self.config.image_size // self.config.patch_size

    def forward(self, pixels: Tensor, cls_layer: int | None = None) -> ViewFeatures:
        """Encode views.

        Args:
            pixels: (V, 3, S, S).
            cls_layer: vision layer whose [CLS] attention is wanted, negative counts from the last;
                None skips it.
        """
        num_layers = self.config.num_hidden_layers
        if cls_layer is not None and not -num_layers <= cls_layer < num_layers:
            raise TodreError(
                f"cls_layer {cls_layer} is out of range; "
                f"allowed: {-num_layers} to {num_layers - 1}."
            )
        chunks = [self._encode(chunk, cls_layer) for chunk in pixels.split(MAX_VIEWS)]
        if len(chunks) == 1:
            return chunks[0]
        attention = None if cls_layer is None else torch.cat([c.cls_attention for c in chunks])  # type: ignore[misc]
        return ViewFeatures(torch.cat([chunk.patches for chunk in chunks]), attention)

    def _encode(self, pixels: Tensor, cls_layer: int | None) -> ViewFeatures:
        tower = self.vision_tower
        layers = tower.encoder.layers
        wanted = None if cls_layer is None else range(len(layers))[cls_layer]
        attention = None
        hidden = tower.pre_layrnorm(tower.embeddings(pixels.to(tower.dtype)))  # (V, 1 + P, W)
        features = hidden
        for index, layer in enumerate(layers):
            if index == wanted:
                attention = cls_attention(layer, hidden)
            if index >= self.num_run and (wanted is None or index >= wanted):
                break
            hidden = layer(hidden, attention_mask=None)
            if index + 1 == self.num_run:
                features = hidden
        return ViewFeatures(features[:, 1:], attention)


def cls_attention(layer: Any, hidden: Tensor) -> Tensor:
    """Return the attention of [CLS] to the patches in one encoder layer (ToDRE Eq. 3).

    Args:
        layer: a CLIP encoder layer.
        hidden: (V, 1 + P, W) its input.

    Returns:
        (V, P) float32, softmax over all tokens, mean over heads, [CLS]'s own share left out.
    """
    attention = layer.self_attn
    states = layer.layer_norm1(hidden)

    def heads(projected: Tensor) -> Tensor:  # -> (V, H, tokens, E)
        return projected.view(*projected.shape[:2], attention.num_heads, -1).transpose(1, 2).float()

    query, keys = heads(attention.q_proj(states[:, :1])), heads(attention.k_proj(states))
    logits = query @ keys.transpose(2, 3) * query.shape[-1] ** -0.5  # (V, H, 1, 1 + P)
    return logits.softmax(dim=-1)[:, :, 0, 1:].mean(dim=1)
