"""What a device cannot beat: its arithmetic or its memory, whichever takes longer. Pure functions.

An estimate from data sheets, never a measurement. Real kernels reach a part of it; the ratio of two
bounds is nearer to the truth than either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llava_todre.flops import DecoderShape, decoder_decode_flops, decoder_prefill_flops


@dataclass(frozen=True)
class Device:
    """Peaks of a GPU from its data sheet."""

    name: str
    flops_per_s: float
    """Dense 16-bit matrix products with float32 accumulation, which is what PyTorch asks for."""
    bytes_per_s: float
    """Of its memory."""
    source: str


DEVICES = (
    Device("RTX 3090", 71e12, 936e9, "NVIDIA Ampere GA102 architecture whitepaper v2, appendix A"),
    Device(
        "H200 SXM",
        1979e12 / 2,
        4.8e12,
        "NVIDIA H200 data sheet; its 1,979 TFLOP/s are with sparsity, half of it without",
    ),
)


@dataclass(frozen=True)
class Bound:
    """Shortest possible times of one prompt on one device, batch 1."""

    prefill_s: float
    token_s: float
    """Per decoded token."""


def bound(
    device: Device, shape: DecoderShape, prompt_tokens_per_layer: Sequence[int], itemsize: int = 2
) -> Bound:
    """Return the bounds of prefill and of the first decoding step."""
    work = decoder_prefill_flops(shape, prompt_tokens_per_layer, causal=True)
    moved = weight_bytes(shape, itemsize) + kv_bytes(shape, prompt_tokens_per_layer, itemsize)
    step = decoder_decode_flops(shape, prompt_tokens_per_layer, 1)
    return Bound(
        prefill_s=_longest(device, work, moved),
        token_s=_longest(device, step, step_bytes(shape, prompt_tokens_per_layer, itemsize)),
    )


def _longest(device: Device, flops: float, moved: float) -> float:
    return max(flops / device.flops_per_s, moved / device.bytes_per_s)


def weight_bytes(shape: DecoderShape, itemsize: int) -> int:
    """Return the bytes of the decoder's matrices and of its head; embeddings are only looked up."""
    layers = sum(shape.weights(layer) for layer in range(shape.layers))
    return itemsize * (layers + shape.width * shape.vocab)


def kv_bytes(shape: DecoderShape, tokens_per_layer: Sequence[int], itemsize: int) -> int:
    """Return the bytes of one sample's keys and values."""
    return 2 * itemsize * shape.kv_width * sum(tokens_per_layer)


def step_bytes(shape: DecoderShape, tokens_per_layer: Sequence[int], itemsize: int) -> int:
    """Return the bytes one decoding step must read: its weights, and the layer's cache once."""
    met = sum(shape.weights(layer, per_token=True) for layer in range(shape.layers))
    head = shape.width * shape.vocab
    return itemsize * (met + head) + kv_bytes(shape, tokens_per_layer, itemsize)
