"""Stage 2 in a stock decoder: hooks around its layers let the withdrawal controller work.

The hooks are there while ``generate`` runs, and look for the controller on the KV cache of the call
they are in. So nothing is left behind, and calls cannot mix.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from llava_todre.withdrawal import LayerInputs, Withdrawal


@contextmanager
def withdrawing(decoder: Any, withdrawal: Withdrawal) -> Iterator[None]:
    """Let every layer of a decoder enter and leave through the controller on its cache.

    Args:
        decoder: the decoder.
        withdrawal: the controller of the call that is about to be made.
    """
    flash = "flash" in (decoder.config._attn_implementation or "")
    handles = []
    for index, layer in enumerate(decoder.layers):
        handles.append(
            layer.register_forward_pre_hook(_enter(index, flash), with_kwargs=True, prepend=True)
        )
        handles.append(layer.register_forward_hook(_leave(index, decoder), with_kwargs=True))
    try:
        yield
    finally:
        withdrawal.stop_listening()
        for handle in handles:
            handle.remove()


def _controller(kwargs: dict[str, Any]) -> Withdrawal | None:
    return getattr(kwargs.get("past_key_values"), "withdrawal", None)


def _inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerInputs:
    return LayerInputs(
        args[0] if args else kwargs["hidden_states"],
        kwargs["attention_mask"],
        kwargs["position_embeddings"],
        kwargs.get("position_ids"),
    )


def _enter(index: int, flash: bool) -> Any:
    def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        controller = _controller(kwargs)
        if controller is None:
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


def _leave(index: int, decoder: Any) -> Any:
    def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        del layer
        controller = _controller(kwargs)
        if controller is not None:
            states: Tensor = output[0] if isinstance(output, tuple) else output
            inputs = _inputs(args, kwargs)
            controller.leave(index, decoder, inputs, states, kwargs["past_key_values"])

    return hook
