"""The CLIP vision tower: patch features and, on request, what single layers compute.

Symbols: V views, P patches per view, W width of the tower, H heads, E head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava_todre.errors import TodreError

# Views that go through the tower at once; bounds the memory of long videos. A CPU is fastest while
# the activations fit its cache: eight images (40 views of 577 tokens, width 96) take 1.5x longer
# as one batch than in pieces of 2 to 16 views.
MAX_VIEWS = 64
MAX_VIEWS_CPU = 8


@dataclass(frozen=True)
class ViewFeatures:
    """What the tower makes of a batch of views."""

    patches: Tensor
    """(V, P, W)."""
    cls: Tensor
    """(V, W) the [CLS] token, of the same layer."""
    measured: dict[tuple[str, int | float], Tensor]
    """(V, P, ...) for each (quantity, layer) wanted."""


class VisionTower(nn.Module):
    """CLIP as LLaVA uses it: ``mm_vision_select_layer`` chooses whose output is read.

    Layers after the one that is read are run only if something is measured there. Attention keeps
    the implementation that the model was loaded with: the query of [CLS] is computed separately.
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
            raise TodreError(f"mm_vision_select_feature must be 'patch', got {select_feature!r}.")
        config = CLIPVisionConfig(**vision_config)
        config._attn_implementation = attn_implementation
        self.vision_tower = CLIPVisionModel(config)
        self.config = self.vision_tower.config
        num_states = self.config.num_hidden_layers + 1
        if not -num_states <= select_layer < num_states:
            raise TodreError(
                f"mm_vision_select_layer must be from {-num_states} to {num_states - 1}, "
                f"got {select_layer}."
            )
        self.num_run = select_layer % num_states
        self.image_processor: Any = None

    @property
    def side(self) -> int:
        """Patches per row and column of a view."""
        return self.config.image_size // self.config.patch_size

    def forward(
        self, pixels: Tensor, wanted: Iterable[tuple[str, int | float]] = ()
    ) -> ViewFeatures:
        """Encode views.

        Args:
            pixels: (V, 3, height, width); position embeddings are interpolated when that is not
                the size the tower was trained at.
            wanted: (quantity, layer) pairs, see :data:`llava_todre.pruners.base.VISION_NEEDS`.
        """
        needs = list(wanted)
        layers = [layer_index(*need, self.config.num_hidden_layers) for need in needs]
        at_once = MAX_VIEWS_CPU if pixels.device.type == "cpu" else MAX_VIEWS
        chunks = [self._encode(chunk, needs, layers) for chunk in pixels.split(at_once)]
        if len(chunks) == 1:
            return chunks[0]
        return ViewFeatures(
            torch.cat([chunk.patches for chunk in chunks]),
            torch.cat([chunk.cls for chunk in chunks]),
            {need: torch.cat([chunk.measured[need] for chunk in chunks]) for need in needs},
        )

    def _encode(
        self, pixels: Tensor, needs: Sequence[tuple[str, int | float]], wanted: Sequence[int]
    ) -> ViewFeatures:
        tower = self.vision_tower
        measured: dict[tuple[str, int | float], Tensor] = {}
        trained = (self.config.image_size, self.config.image_size)
        embedded = tower.embeddings(
            pixels.to(tower.dtype), interpolate_pos_encoding=tuple(pixels.shape[2:]) != trained
        )
        hidden = tower.pre_layrnorm(embedded)  # (V, 1 + P, W)
        features = hidden
        for index, layer in enumerate(tower.encoder.layers):
            for need, where in zip(needs, wanted, strict=True):
                if where == index:
                    measured[need] = QUANTITIES[need[0]](layer, hidden)
            if index >= self.num_run and len(measured) == len(needs):
                break
            hidden = layer(hidden, attention_mask=None)
            if index + 1 == self.num_run:
                features = hidden
        return ViewFeatures(features[:, 1:], features[:, 0], measured)


def layer_index(quantity: str, layer: int | float, num_layers: int) -> int:
    """Return the number of a layer of the tower, from 0.

    Args:
        quantity: what is measured there, for messages.
        layer: -1 is the last, 0.5 the one half-way up.
        num_layers: of the tower.

    Raises:
        TodreError: there is no such layer.
    """
    if isinstance(layer, float) and 0 < layer < 1:
        return math.floor(layer * num_layers)
    if not isinstance(layer, int) or not -num_layers <= layer < num_layers:
        raise TodreError(
            f"vision layer of {quantity} must be from {-num_layers} to {num_layers - 1}, or a "
            f"depth between 0 and 1, got {layer}."
        )
    return layer % num_layers


# What can be measured at one encoder layer: each function takes the layer and its input
# (V, 1 + P, W), and leaves the attention implementation of the tower alone.


def cls_logits(layer: Any, hidden: Tensor) -> Tensor:
    """Return (V, P) scaled products of [CLS] with the patches, mean over heads."""
    return _cls_logits(layer, hidden)[..., 1:].mean(dim=1)


def cls_attention(layer: Any, hidden: Tensor) -> Tensor:
    """Return the attention of [CLS] to the patches in one encoder layer (ToDRE Eq. 3).

    Returns:
        (V, P) float32, softmax over all tokens, mean over heads, [CLS]'s own share left out.
    """
    return _cls_logits(layer, hidden).softmax(dim=-1)[..., 1:].mean(dim=1)


def cls_attention_unsplit(layer: Any, hidden: Tensor) -> Tensor:
    """Return (V, P) attention of [CLS], with queries and keys not split into heads (PruMerge)."""
    attention, states = layer.self_attn, layer.layer_norm1(hidden)
    query, keys = _cls_query(attention, states).float(), attention.k_proj(states).float()
    logits = torch.einsum("vw,vpw->vp", query, keys) * query.shape[-1] ** -0.5  # (V, 1 + P)
    return logits.softmax(dim=-1)[:, 1:]


def received_attention(layer: Any, hidden: Tensor) -> Tensor:
    """Return (V, P) attention that patches receive, mean over heads and all queries."""
    return attention_received(layer, hidden)[:, 1:]


def attention_received(layer: Any, hidden: Tensor) -> Tensor:
    """Return (V, tokens) attention that the tokens of ``hidden`` (V, tokens, W) receive.

    Mean over heads and all queries.
    """
    queries, keys = _heads(layer, hidden, "q_proj"), _heads(layer, hidden, "k_proj")
    scale = queries.shape[-1] ** -0.5
    maps = (  # view by view: a whole map is H x 577 x 577 for CLIP-L
        (query @ key.transpose(1, 2) * scale).softmax(dim=-1).mean(dim=(0, 1))
        for query, key in zip(queries, keys, strict=True)
    )
    return torch.stack(list(maps))


def keys(layer: Any, hidden: Tensor) -> Tensor:
    """Return (V, P, H, E) keys of the patches."""
    return _heads(layer, hidden, "k_proj")[:, :, 1:].transpose(1, 2)


QUANTITIES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    function.__name__: function
    for function in (cls_attention, cls_logits, cls_attention_unsplit, received_attention, keys)
}


def _heads(layer: Any, hidden: Tensor, projection: str) -> Tensor:
    """Return (V, H, tokens, E) float32 queries or keys of the tokens of ``hidden``."""
    attention = layer.self_attn
    states = getattr(attention, projection)(layer.layer_norm1(hidden))
    return states.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2).float()


def _cls_logits(layer: Any, hidden: Tensor) -> Tensor:
    """Return (V, H, 1 + P) float32 scaled products of [CLS] with every token.

    A single query is cheaper carried back through the key projection than all keys forward: with
    k = K x + b, the product q k is (q K) x + q b, and q K is one row per head.
    """
    attention = layer.self_attn
    heads, projection = attention.num_heads, attention.k_proj
    states = layer.layer_norm1(hidden)  # (V, 1 + P, W)
    query = _cls_query(attention, states).float().unflatten(-1, (heads, -1))  # (V, H, E)
    query = query * query.shape[-1] ** -0.5
    if not is_plain(projection):
        keys = projection(states).float().unflatten(-1, (heads, -1))  # (V, 1 + P, H, E)
        return torch.einsum("vhe,vphe->vhp", query, keys)
    weight = projection.weight.float().unflatten(0, (heads, -1))  # (H, E, W)
    carried = torch.einsum("vhe,hew->vhw", query, weight)
    logits = carried @ states.float().transpose(1, 2)
    if projection.bias is None:
        return logits
    bias = projection.bias.float().unflatten(0, (heads, -1))  # (H, E)
    return logits + torch.einsum("vhe,he->vh", query, bias)[..., None]


def _cls_query(attention: Any, states: Tensor) -> Tensor:
    """Return (V, W) the query of [CLS], from the normalised input (V, 1 + P, W) of a layer."""
    if is_plain(attention.q_proj):
        return attention.q_proj(states[:, 0])
    return attention.q_proj(states)[:, 0]  # what LLM.int8 makes of a row depends on the others


def is_plain(projection: Any) -> bool:
    """Return whether a projection is W x + b, with a W that can be read without running it.

    Not so where the weights are quantised (bitsandbytes, torchao, quanto, ...), where an adapter, a
    norm or a hook changes the output, or where accelerate fetches the weights for each call.
    """
    return (
        type(projection) is nn.Linear
        and type(projection.weight) in (nn.Parameter, Tensor)
        and projection.weight.is_floating_point()
        and not projection.weight.is_meta
        and "forward" not in vars(projection)
        and not (projection._forward_hooks or projection._forward_pre_hooks)
    )
