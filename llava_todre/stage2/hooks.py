"""Stage 2 in a stock decoder: hooks around its layers let the withdrawal controller work.

The hooks are there while ``generate`` runs, and look for the controller on the KV cache of the call
they are in. So nothing is left behind, and calls cannot mix, not even one inside the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from llava_todre.errors import TodreError
from llava_todre.stage2 import DecoderPruning, LayerInputs

READABLE = {
    "LlamaAttention",
    "MistralAttention",
    "MixtralAttention",
    "Qwen2Attention",
    "Qwen2MoeAttention",
    "Qwen2VLAttention",
    "Qwen2_5_VLAttention",
    "Qwen3Attention",
    "Qwen3MoeAttention",
    "Qwen3VLTextAttention",
}
"""What :mod:`llava_todre.stage2.probe` can read: projections and halves rotated as in Llama."""


def require_readable(decoder: Any) -> None:
    """Raise a TodreError unless what layers attend to can be told."""
    layers = getattr(decoder, "layers", ())
    names = {type(getattr(layer, "self_attn", layer)).__name__ for layer in layers}
    other = sorted(names - READABLE) or ([] if names else [type(decoder).__name__])
    if other:
        raise TodreError(
            f"decoder with {', '.join(other)} is not supported by methods that drop tokens inside "
            f"it; allowed: {', '.join(sorted(READABLE))}, or a method that only selects."
        )


@contextmanager
def withdrawing(decoder: Any, withdrawal: DecoderPruning) -> Iterator[None]:
    """Let every layer of a decoder enter and leave through the controller on its cache.

    Args:
        decoder: the decoder.
        withdrawal: the controller of the call that is about to be made.
    """
    flash = "flash" in (decoder.config._attn_implementation or "")
    handles = []
    for index, layer in enumerate(decoder.layers):
        handles.append(
            layer.register_forward_pre_hook(
                _enter(withdrawal, index, flash), with_kwargs=True, prepend=True
            )
        )
        leave = _leave(withdrawal, index, decoder)
        handles.append(layer.register_forward_hook(leave, with_kwargs=True))
    try:
        yield
    finally:
        withdrawal.stop_listening()
        for handle in handles:
            handle.remove()


def _is_at_work(controller: DecoderPruning, kwargs: dict[str, Any]) -> bool:
    return getattr(kwargs.get("past_key_values"), "withdrawal", None) is controller


def _inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerInputs:
    return LayerInputs(
        args[0] if args else kwargs["hidden_states"],
        kwargs["attention_mask"],
        kwargs["position_embeddings"],
        kwargs.get("position_ids"),
    )


def _enter(controller: DecoderPruning, index: int, flash: bool) -> Any:
    def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not _is_at_work(controller, kwargs):
            return None
        cache = kwargs["past_key_values"]
        inputs = _inputs(args, kwargs)
        if index == 0:
            controller.begin(inputs.hidden_states, cache)
        inputs = controller.enter(index, inputs, cache, flash, layer)
        kwargs = kwargs | {
            "attention_mask": inputs.attention_mask,
            "position_embeddings": inputs.position_embeddings,
            "position_ids": inputs.position_ids,
        }
        if args:
            return (inputs.hidden_states, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": inputs.hidden_states}

    return hook


def _leave(controller: DecoderPruning, index: int, decoder: Any) -> Any:
    def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        del layer
        if _is_at_work(controller, kwargs):
            states: Tensor = output[0] if isinstance(output, tuple) else output
            inputs = _inputs(args, kwargs)
            controller.leave(index, decoder, inputs, states, kwargs["past_key_values"])

    return hook
