"""A prompt whose logits are not finite has no answer: greedy search would return whatever id is 0.

Weights that are damaged, a config that does not belong to them, and sums that overflow in half
precision all end in NaN or Inf in the logits after the prompt. Checking these once finds it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from llava_todre.errors import TodreError

# Called by every kind of search after every step, outside of what may be compiled.
_STEP = "_update_model_kwargs_for_generation"


@contextmanager
def finite_prefill(model: Any) -> Iterator[None]:
    """Let the next ``generate`` of a model raise unless the logits of its prompts are finite.

    Args:
        model: of transformers; only this instance is changed, until its first step.
    """
    before = model.__dict__.get(_STEP)
    step = getattr(model, _STEP)

    def restore() -> None:
        model.__dict__.pop(_STEP, None)
        if before is not None:
            model.__dict__[_STEP] = before

    def first_step(outputs: Any, *args: Any, **kwargs: Any) -> Any:
        restore()
        require_finite(outputs.logits[:, -1])
        return step(outputs, *args, **kwargs)

    model.__dict__[_STEP] = first_step
    try:
        yield
    finally:
        restore()


def require_finite_pixels(key: str, pixels: Any) -> None:
    """Raise a TodreError if a tensor, or one of a list of tensors, holds NaN or Inf."""
    for tensor in pixels if isinstance(pixels, (list, tuple)) else [pixels]:
        is_float = isinstance(tensor, Tensor) and tensor.is_floating_point()
        if is_float and not bool(torch.isfinite(tensor).all()):
            raise TodreError(f"{key} holds pixels that are NaN or Inf; they must be finite.")


def require_finite(logits: Tensor) -> None:
    """Raise a TodreError unless the (B, vocabulary) logits after the prompts can be an answer."""
    # Where the square of what the last norm reads overflows, it makes zeros of it.
    is_flat = logits.amax(dim=-1) == logits.amin(dim=-1)
    is_damaged = ~torch.isfinite(logits).all(dim=-1) | is_flat
    if not bool(is_damaged.any()):
        return
    damaged = int(is_damaged.sum())
    dtype = str(logits.dtype).removeprefix("torch.")
    raise TodreError(
        f"logits of {damaged} of {len(logits)} prompts contain NaN or Inf, or are all equal; they "
        f"must be finite and differ: the weights or the config are damaged, or {dtype} overflows "
        "(try float32 or bfloat16)."
    )
