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
            f"inputs do not fit {type(model).__name__}, which says "
            f"{type(error).__name__}: {first_line(error)}; allowed: what its processor returns."
        ) from error


def any_refused(model: Any, kwargs: Mapping[str, Any]) -> bool:
    """Return whether :func:`check` would refuse one of these arguments, whatever the method."""
    return any(setting(model, key, kwargs) not in (None, False) for key in _REFUSED)


def check(model: Any, decoder: Any, kwargs: Mapping[str, Any], inside: bool) -> None:
    """Refuse what would be answered wrongly.

    Args:
        model: of transformers.
        decoder: its decoder.
        kwargs: arguments of ``generate``.
        inside: whether the method works inside the decoder.
    """
    if model.training:
        raise TodreError("a model in training mode is not pruned; call model.eval() first.")
    refuse(model, _REFUSED, kwargs)
    cache = setting(model, "cache_implementation", kwargs)
    if inside and cache not in (None, "dynamic"):
        raise TodreError(
            f"cache_implementation {cache!r} cannot drop tokens per layer; allowed: dynamic, "
            "or a method that only selects."
        )
    if inside and setting(model, "use_cache", kwargs) is False:
        raise TodreError(
            "use_cache False is not supported with pruning inside the decoder; allowed: True, "
            "or a method that only selects."
        )
    if inside and decoder.config._attn_implementation == "flex_attention":
        raise TodreError(
            "attn_implementation flex_attention cannot drop tokens per layer; allowed: eager, "
            "sdpa, flash_attention_2, or a method that only selects."
        )
    if inside and has_sliding_window(decoder.config):
        raise TodreError(
            "a decoder with sliding_window cannot drop tokens per layer; allowed: a method "
            "that only selects."
        )
