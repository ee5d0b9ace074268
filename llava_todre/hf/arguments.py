"""Which arguments of ``generate`` cannot be combined with pruning, or cannot be read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from llava_todre.errors import TodreError
from llava_todre.model.checkpoint import first_line
from llava_todre.settings import REFUSED_WITH_PRUNING, refuse, setting
from llava_todre.stage2.cache import CACHE_ARGUMENT, has_sliding_window

_UNREADABLE = (
    *(AttributeError, IndexError, KeyError, OverflowError),
    *(RuntimeError, TypeError, ValueError),
)
_REFUSED = (*REFUSED_WITH_PRUNING, CACHE_ARGUMENT)


@contextmanager
def fitting_inputs(model: Any) -> Iterator[None]:
    """Raise a TodreError for inputs that the model's own code cannot read in this block."""
    try:
        yield
    except (TodreError, torch.OutOfMemoryError):
        raise
    except _UNREADABLE as error:
        raise TodreError(
            f"inputs must be what the processor of {type(model).__name__} returns, which raised "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error


def any_refused(model: Any, kwargs: Mapping[str, Any]) -> bool:
    """Return whether :func:`check` would refuse one of these arguments, whatever the method."""
    values = (setting(model, key, kwargs) for key in _REFUSED)
    return any(value is not None and value is not False for value in values)


def check(model: Any, decoder: Any, kwargs: Mapping[str, Any], inside: bool) -> None:
    """Reject arguments and models that are incompatible with pruning.

    Args:
        model: of transformers.
        decoder: its decoder.
        kwargs: arguments of ``generate``.
        inside: whether the method drops tokens inside the decoder.
    """
    if model.training:
        raise TodreError("model must be in evaluation mode, got training mode: call model.eval().")
    refuse(model, _REFUSED, kwargs)
    if not inside:
        return
    cache, config = setting(model, "cache_implementation", kwargs), decoder.config
    attention, slides = config._attn_implementation, has_sliding_window(config)
    for fits, key, expected, given in (
        (cache in (None, "dynamic"), "cache_implementation", "dynamic", cache),
        (setting(model, "use_cache", kwargs) is not False, "use_cache", "True", False),
        (
            attention != "flex_attention",
            "attn_implementation",
            "eager, sdpa or flash_attention_2",
            attention,
        ),
        (not slides, "sliding_window", "None", getattr(config, "sliding_window", "one")),
    ):
        if not fits:
            raise TodreError(
                f"{key} must be {expected} with a method that drops tokens inside the decoder, got "
                f"{given}."
            )
