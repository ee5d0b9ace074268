"""Count the work of a LLaVA model: by the papers' formulas, and exactly.

Two kinds of number live here; never compare one with the other.

* ``paper_*``: ToDRE's Eq. 1 and 2, as printed. They count one per multiply-add and a
  feed-forward block of two matrices. Use them for the papers' *ratios*.
* the rest: FLOPs, two per multiply-add, of every matrix product a real Llama decoder (gated MLP,
  grouped-query attention), CLIP tower or projector does. Norms, activations, softmax, rotary
  embeddings, biases and additions are left out: together well below 1 % of a 7B prefill.

A pruned prompt has a different length in each layer, so lengths are given per layer:
``prompt_tokens_per_layer[l]`` is how many prompt tokens (system + visual + text) layer l processed,
which is also how many of them its KV cache holds afterwards. Everything is per sample and an exact
``int``.

What reproduces of the published numbers: the growth of prefill and decoding from 7B to 13B, and
their ratio to each other (Section 3.1). What does not: its encoder share (it needs 804 tower
tokens; CLIP-L/336 has 577), and Table 3 (31.4 T unpruned, 6.0 T at 10 %). No definition above
gives 31.4 T at 2,880 visual tokens: Eq. 1 gives 16.7 T, the exact count 41.7 T, both without any
text. The exact count reaches 31.4 T at 2,224 prompt tokens, about what an *unpadded* photo has, but
6.0 T then needs 455. ``tests/test_flops.py`` holds each of these statements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llava_todre.errors import TodreError


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of a Llama decoder that decide its cost.

    Attributes:
        layers: number of decoder layers.
        width: hidden size d.
        mlp_width: intermediate size m of the (gated) feed-forward block.
        heads: query heads; ``width`` is divisible by it.
        kv_heads: key/value heads (equal to ``heads`` without grouped-query attention).
        vocab: rows of the output head.
    """

    layers: int
    width: int
    mlp_width: int
    heads: int
    kv_heads: int
    vocab: int

    def __post_init__(self) -> None:
        """Refuse sizes that no decoder has."""
        if self.heads < 1 or self.width % self.heads:
            raise TodreError(f"width {self.width} is not divisible by heads {self.heads}.")
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise TodreError(f"heads {self.heads} is not divisible by kv_heads {self.kv_heads}.")

    @classmethod
    def of(cls, config: Any) -> DecoderShape:
        """Return the sizes in the config of a decoder, as transformers has it."""
        return cls(
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            mlp_width=config.intermediate_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            vocab=config.vocab_size,
        )


@dataclass(frozen=True)
class TowerShape:
    """The sizes of a CLIP-like vision tower that decide its cost.

    Attributes:
        layers: layers that are *run*: LLaVA reads layer -2, so it needs one less than CLIP has.
        width: hidden size.
        mlp_width: intermediate size of the (plain, two-matrix) feed-forward block.
        image_size: side of the square input view, pixels.
        patch_size: side of a patch, pixels.
        extra_tokens: tokens beside the patches: 1 for CLIP's [CLS], 0 for SigLIP.
        channels: colour channels.
    """

    layers: int
    width: int
    mlp_width: int
    image_size: int
    patch_size: int
    extra_tokens: int = 1
    channels: int = 3

    @property
    def patches(self) -> int:
        """Patch tokens of one view."""
        return (self.image_size // self.patch_size) ** 2


def paper_prefill_flops(
    shape: DecoderShape | TowerShape, prompt_tokens_per_layer: Sequence[int]
) -> int:
    """Prefill cost by ToDRE Eq. 1: ``4nd^2 + 2n^2 d + 2ndm``, summed over the layers.

    The paper uses one n for all T layers and the same formula for encoding; n may differ here.

    Returns:
        The papers' "FLOPs": one per multiply-add, two feed-forward matrices, no vocabulary head.
    """
    _check_tokens(shape.layers, prompt_tokens_per_layer)
    d, m = shape.width, shape.mlp_width
    return sum(4 * n * d * d + 2 * n * n * d + 2 * n * d * m for n in prompt_tokens_per_layer)


def paper_decode_flops(
    shape: DecoderShape, prompt_tokens_per_layer: Sequence[int], new_tokens: int
) -> int:
    """Decoding cost by ToDRE Eq. 2: ``4Ld^2 + 2Ldm + dL(2n + L - 1)``, summed over the layers.

    Args:
        shape: the decoder.
        prompt_tokens_per_layer: n of each layer, as left in its cache.
        new_tokens: L, the length of the answer.

    Returns:
        The papers' "FLOPs": one per multiply-add, two feed-forward matrices, no vocabulary head.
    """
    _check_tokens(shape.layers, prompt_tokens_per_layer)
    _check_count("new_tokens", new_tokens)
    d, m, length = shape.width, shape.mlp_width, new_tokens
    return sum(
        4 * length * d * d + 2 * length * d * m + d * length * (2 * n + length - 1)
        for n in prompt_tokens_per_layer
    )


def decoder_prefill_flops(
    shape: DecoderShape, prompt_tokens_per_layer: Sequence[int], *, causal: bool = False
) -> int:
    """Exact FLOPs of one prefill, with the vocabulary head on the last position only.

    Args:
        shape: the decoder.
        prompt_tokens_per_layer: tokens each layer processes; they fall where Stage 2 withdraws.
        causal: count only the n(n + 1)/2 query-key pairs a causal mask allows. The default counts
            all n^2, which is what eager attention computes and PyTorch's FLOP counter reports.
    """
    _check_tokens(shape.layers, prompt_tokens_per_layer)
    matrices = sum(prompt_tokens_per_layer) * _token_flops(shape)
    pairs = sum(n * (n + 1) // 2 if causal else n * n for n in prompt_tokens_per_layer)
    return matrices + pairs * _pair_flops(shape) + _head_flops(shape)


def decoder_decode_flops(
    shape: DecoderShape, prompt_tokens_per_layer: Sequence[int], steps: int
) -> int:
    """Exact FLOPs of ``steps`` cached decoding steps of one token each, heads included.

    Step t = 1..steps attends to the layer's cached prompt and t generated tokens, itself included.
    An answer of L tokens takes L - 1 steps: its first token comes out of the prefill. (Eq. 2
    counts L steps, and step t without the token's own key.)

    Args:
        shape: the decoder.
        prompt_tokens_per_layer: prompt tokens in each layer's cache.
        steps: forward passes after the prefill.
    """
    _check_tokens(shape.layers, prompt_tokens_per_layer)
    _check_count("steps", steps)
    matrices = steps * shape.layers * _token_flops(shape)
    pairs = sum(steps * n + steps * (steps + 1) // 2 for n in prompt_tokens_per_layer)
    return matrices + pairs * _pair_flops(shape) + steps * _head_flops(shape)


def tower_flops(shape: TowerShape, views: int) -> int:
    """Exact FLOPs of a CLIP-like tower on ``views`` square views (AnyRes: thumbnail + crops)."""
    _check_count("views", views)
    d, m = shape.width, shape.mlp_width
    tokens = shape.patches + shape.extra_tokens
    embedding = 2 * shape.patches * shape.channels * shape.patch_size**2 * d
    layer = 2 * tokens * (4 * d * d + 2 * d * m) + 4 * tokens * tokens * d
    return views * (embedding + shape.layers * layer)


def projector_flops(vision_width: int, width: int, tokens: int) -> int:
    """Exact FLOPs of LLaVA's two-layer projector (``mlp2x_gelu``) on ``tokens`` visual tokens."""
    _check_count("tokens", tokens)
    return 2 * tokens * (vision_width * width + width * width)


def _token_flops(shape: DecoderShape) -> int:
    """FLOPs of one layer's weight matrices for one token: q, k, v, o and gate, up, down."""
    kv_width = shape.width // shape.heads * shape.kv_heads
    attention = 2 * shape.width * shape.width + 2 * shape.width * kv_width
    return 2 * (attention + 3 * shape.width * shape.mlp_width)


def _pair_flops(shape: DecoderShape) -> int:
    """FLOPs of one query-key pair over all heads of one layer: its score and its value product."""
    return 2 * 2 * shape.width


def _head_flops(shape: DecoderShape) -> int:
    """FLOPs of the vocabulary head at one position."""
    return 2 * shape.width * shape.vocab


def _check_tokens(layers: int, prompt_tokens_per_layer: Sequence[int]) -> None:
    if len(prompt_tokens_per_layer) != layers:
        raise TodreError(
            f"prompt_tokens_per_layer has {len(prompt_tokens_per_layer)} entries; "
            f"this model has {layers} layers."
        )
    for count in prompt_tokens_per_layer:
        _check_count("prompt_tokens_per_layer", count)


def _check_count(key: str, value: int) -> None:
    if value < 0:
        raise TodreError(f"{key} {value} is negative; allowed: 0 or more.")
