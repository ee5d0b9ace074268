"""Count the work of a LLaVA model: by the papers' formulas, and exactly.

Two kinds of number live here; never compare one with the other.

* ``paper_*``: ToDRE's Eq. 1 and 2, as printed. They count one per multiply-add and a
  feed-forward block of two matrices. Use them for the papers' *ratios*.
* the rest: FLOPs, two per multiply-add, of every matrix product that a decoder, CLIP tower or
  projector does. Norms, activations, softmax, rotary embeddings, biases and additions are left out:
  together well below 1 % of a 7B prefill.

Exact means: what ``torch.utils.flop_counter`` reports for eager attention, which computes all n^2
query-key pairs, and for experts run one by one. The counter does not know PyTorch's fused attention
on a CPU nor ``grouped_mm``, and reports less there; the work is the same. A decoder whose products
are not known is refused by name (:meth:`DecoderShape.of`).

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
from dataclasses import asdict, dataclass, fields
from typing import Any

from llava_todre.errors import TodreError

_GATED = frozenset(
    "gemma llama llava_llama llava_mistral mistral phi3 qwen2 qwen2_5_vl_text qwen2_vl_text qwen3 "
    "qwen3_vl_text".split()
)
_EXPERTS = frozenset("mixtral qwen2_moe qwen3_moe qwen3_vl_moe_text".split())
KNOWN = _GATED | _EXPERTS
"""``model_type`` of the decoders whose matrix products are known; all have gated MLPs."""


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: gated MLPs, of which a router picks a few for every token.

    Attributes:
        count: experts of a layer, all of them scored by the router.
        per_token: experts that a token passes through.
        width: intermediate size of one expert.
        shared_width: intermediate size of an expert that all tokens pass through, which has a gate
            of one number (Qwen2-MoE); 0 without one.
    """

    count: int
    per_token: int
    width: int
    shared_width: int = 0

    def weights(self, hidden: int, per_token: bool) -> int:
        """Return the numbers in the matrices; only those that one token meets if ``per_token``."""
        used = self.per_token if per_token else self.count
        shared = 3 * hidden * self.shared_width + (hidden if self.shared_width else 0)
        return hidden * self.count + 3 * hidden * self.width * used + shared


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of a Llama-like decoder that decide its cost.

    Attributes:
        layers: number of decoder layers.
        width: hidden size d.
        mlp_width: intermediate size m of the gated feed-forward block.
        heads: query heads.
        kv_heads: key/value heads (equal to ``heads`` without grouped-query attention).
        vocab: rows of the output head.
        head_dim: size of a head; None is ``width / heads``.
        experts: what stands in place of the feed-forward block, if anything does.
        dense_layers: layers that have the block in spite of that.
        window: positions that attention looks back (sliding window), None for all. Prompts that
            are longer are refused.
    """

    layers: int
    width: int
    mlp_width: int
    heads: int
    kv_heads: int
    vocab: int
    head_dim: int | None = None
    experts: Experts | None = None
    dense_layers: tuple[int, ...] = ()
    window: int | None = None

    def __post_init__(self) -> None:
        """Refuse sizes that no decoder has."""
        if self.heads < 1 or (self.head_dim is None and self.width % self.heads):
            raise TodreError(f"width {self.width} is not divisible by heads {self.heads}.")
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise TodreError(f"heads {self.heads} is not divisible by kv_heads {self.kv_heads}.")

    @classmethod
    def of(cls, config: Any) -> DecoderShape:
        """Return the sizes in a config of transformers: of a decoder, or of a model that has one.

        Raises:
            TodreError: FLOPs of such a decoder are not known, as with linear attention, latent
                attention or another kind of MLP.
        """
        config = config.get_text_config()
        if config.model_type not in KNOWN:
            raise TodreError(
                f"FLOPs of a decoder of type {config.model_type!r} are not known; allowed: "
                f"{', '.join(sorted(KNOWN))}."
            )
        has_experts = config.model_type in _EXPERTS and getattr(config, "num_experts", 1) > 0
        width, heads = config.hidden_size, config.num_attention_heads
        head_dim = getattr(config, "head_dim", None)
        return cls(
            layers=config.num_hidden_layers,
            width=width,
            mlp_width=config.intermediate_size,
            heads=heads,
            kv_heads=config.num_key_value_heads,
            vocab=config.vocab_size,
            head_dim=None if head_dim == width / heads else head_dim,
            experts=_experts(config) if has_experts else None,
            dense_layers=_dense_layers(config) if has_experts else (),
            window=_window(config),
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the sizes for JSON; of those that have a default, the ones that differ."""
        usual = {each.name: each.default for each in fields(self)}
        return {key: value for key, value in asdict(self).items() if value != usual[key]}

    @property
    def query_width(self) -> int:
        """Width of the queries of all heads together."""
        return self.heads * (self.head_dim or self.width // self.heads)

    @property
    def kv_width(self) -> int:
        """Width of the keys of all heads together, and of the values."""
        return self.query_width // self.heads * self.kv_heads

    def weights(self, layer: int, *, per_token: bool = False) -> int:
        """Return the numbers in the matrices of a layer: q, k, v, o and gate, up, down.

        Args:
            layer: 0-based.
            per_token: count only the experts that one token meets.
        """
        attention = 2 * self.width * (self.query_width + self.kv_width)
        if self.experts is None or layer in self.dense_layers:
            return attention + 3 * self.width * self.mlp_width
        return attention + self.experts.weights(self.width, per_token)


def _experts(config: Any) -> Experts:
    if config.model_type == "mixtral":
        return Experts(
            config.num_local_experts, config.num_experts_per_tok, config.intermediate_size
        )
    return Experts(
        config.num_experts,
        config.num_experts_per_tok,
        config.moe_intermediate_size,
        getattr(config, "shared_expert_intermediate_size", 0),
    )


def _dense_layers(config: Any) -> tuple[int, ...]:
    """Return the layers of Qwen's mixtures that have one MLP."""
    step, dense = getattr(config, "decoder_sparse_step", 1), getattr(config, "mlp_only_layers", ())
    layers = range(config.num_hidden_layers)
    return tuple(layer for layer in layers if layer in dense or (layer + 1) % step)


def _window(config: Any) -> int | None:
    """Return the sliding window of those layers that have one."""
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    window = getattr(config, "sliding_window", None)
    return window or None if "sliding_attention" in kinds else None


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
    _check_paper(shape)
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
    _check_paper(shape)
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
    _check_window(shape, prompt_tokens_per_layer)
    matrices = sum(
        tokens * _token_flops(shape, layer) for layer, tokens in enumerate(prompt_tokens_per_layer)
    )
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
    _check_window(shape, [n + steps for n in prompt_tokens_per_layer])
    matrices = steps * sum(_token_flops(shape, layer) for layer in range(shape.layers))
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


def _token_flops(shape: DecoderShape, layer: int) -> int:
    """FLOPs of one layer's weight matrices for one token."""
    return 2 * shape.weights(layer, per_token=True)


def _pair_flops(shape: DecoderShape) -> int:
    """FLOPs of one query-key pair over all heads of one layer: its score and its value product."""
    return 2 * 2 * shape.query_width


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


def _check_paper(shape: DecoderShape | TowerShape) -> None:
    if isinstance(shape, DecoderShape) and shape.experts is not None:
        raise TodreError(
            "Eq. 1 and 2 of the paper know one feed-forward block per layer, this decoder has "
            f"{shape.experts.count} experts; allowed: the exact counts."
        )


def _check_window(shape: DecoderShape, tokens_per_layer: Sequence[int]) -> None:
    longest = max(tokens_per_layer, default=0)
    if shape.window is not None and longest > shape.window:
        raise TodreError(
            f"FLOPs of {longest} tokens under a sliding window of {shape.window} are not known; "
            f"allowed: up to {shape.window} tokens."
        )


def _check_count(key: str, value: int) -> None:
    if value < 0:
        raise TodreError(f"{key} {value} is negative; allowed: 0 or more.")
