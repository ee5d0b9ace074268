"""Arguments of ``generate`` that cannot be combined with pruning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.cache_utils import DynamicCache

from llava_todre.errors import TodreError
from llava_todre.settings import REFUSED_WITH_PRUNING, refuse, setting


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
    refuse(model, REFUSED_WITH_PRUNING, kwargs)
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
    if inside and any(DynamicCache(config=decoder.config).is_sliding):
        raise TodreError(
            "a decoder with sliding_window cannot drop tokens per layer; allowed: a method "
            "that only selects."
        )
