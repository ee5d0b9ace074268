"""Stage 2 in a stock decoder: hooks before and after its layers.

The hooks exist while ``generate`` runs, and act only in calls whose KV cache has their state. So
nothing stays on the model, and calls cannot mix, not even nested ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from llava_todre.errors import TodreError
from llava_todre.stage2 import DecoderPruning, LayerInputs
from llava_todre.stage2.cache import CACHE_ARGUMENT, state_of

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
    """Raise a TodreError unless a method can read what the layers attend to."""
    layers = getattr(decoder, "layers", ())
    names = {type(getattr(layer, "self_attn", layer)).__name__ for layer in layers}
    other = sorted(names - READABLE) or ([] if names else [type(decoder).__name__])
    if other:
        raise TodreError(
            f"attention of the decoder must be one of {', '.join(sorted(READABLE))} for methods "
            f"that drop tokens inside it, got {', '.join(other)}."
        )


@contextmanager
def pruning_hooks(decoder: Any, state: DecoderPruning) -> Iterator[None]:
    """Drop tokens between the layers of a decoder while the block runs.

    Args:
        decoder: the decoder.
        state: of Stage 2, which the cache of the call has.
    """
    flash = "flash" in (decoder.config._attn_implementation or "")
    handles = []
    for index, layer in enumerate(decoder.layers):
        handles.append(
            layer.register_forward_pre_hook(
                _enter(state, index, flash), with_kwargs=True, prepend=True
            )
        )
        leave = _leave(state, index, decoder)
        handles.append(layer.register_forward_hook(leave, with_kwargs=True))
    try:
        yield
    finally:
        state.remove_query_hook()
        for handle in handles:
            handle.remove()


def _is_active(state: DecoderPruning, kwargs: dict[str, Any]) -> bool:
    return state_of(kwargs.get(CACHE_ARGUMENT)) is state


def _inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerInputs:
    return LayerInputs(
        args[0] if args else kwargs["hidden_states"],
        kwargs["attention_mask"],
        kwargs["position_embeddings"],
        kwargs.get("position_ids"),
    )


def _enter(state: DecoderPruning, index: int, flash: bool) -> Any:
    def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not _is_active(state, kwargs):
            return None
        cache = kwargs[CACHE_ARGUMENT]
        inputs = _inputs(args, kwargs)
        if index == 0:
            state.begin(inputs.hidden_states, cache)
        inputs = state.enter(index, inputs, cache, flash, layer)
        kwargs = kwargs | {
            "attention_mask": inputs.attention_mask,
            "position_embeddings": inputs.position_embeddings,
            "position_ids": inputs.position_ids,
        }
        if args:
            return (inputs.hidden_states, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": inputs.hidden_states}

    return hook


def _leave(state: DecoderPruning, index: int, decoder: Any) -> Any:
    def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        del layer
        if _is_active(state, kwargs):
            states: Tensor = output[0] if isinstance(output, tuple) else output
            inputs = _inputs(args, kwargs)
            state.leave(index, decoder, inputs, states, kwargs[CACHE_ARGUMENT])

    return hook
