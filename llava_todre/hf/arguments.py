"""Arguments of ``generate``: what is set, and what cannot be combined with pruning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from llava_todre.errors import TodreError

_REFUSED = (
    "assistant_model",
    "assistant_early_exit",
    "prompt_lookup_num_tokens",
    "use_mtp",
    "prefill_chunk_size",
    "past_key_values",
    "custom_generate",
    "position_ids",
)


def refuse(model: Any, keys: Iterable[str], kwargs: Mapping[str, Any]) -> None:
    """Raise a TodreError if one of these arguments is given, or set by a configuration."""
    for key in keys:
        given = setting(model, key, kwargs)
        if given is not None and given is not False:
            raise TodreError(f"{key} is not supported together with pruning; leave it out.")


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
    if inside and any(DynamicCache(config=decoder.config).is_sliding):
        raise TodreError(
            "a decoder with sliding_window cannot drop tokens per layer; allowed: a method "
            "that only selects."
        )


def setting(model: Any, key: str, kwargs: Mapping[str, Any]) -> Any:
    """Return what ``generate`` takes for ``key``: its argument, or what configurations say."""
    for source in (kwargs.get("generation_config"), model.generation_config):
        if kwargs.get(key) is None and getattr(source, key, None) is not None:
            return getattr(source, key)
    return kwargs.get(key)


def real_tokens(model: Any, ids: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """Return (B, L) bool, which tokens count when no mask is given, as transformers does."""
    pad, eos = setting(model, "pad_token_id", kwargs), setting(model, "eos_token_id", kwargs)
    if pad is None or pad in (eos if isinstance(eos, list) else [eos]):
        return torch.ones_like(ids, dtype=torch.bool)
    return ids != pad


def pad_id(model: Any, kwargs: Mapping[str, Any]) -> int:
    """Return the token with which ``generate`` pads."""
    pad, eos = setting(model, "pad_token_id", kwargs), setting(model, "eos_token_id", kwargs)
    pad = eos if pad is None else pad
    return int(pad[0] if isinstance(pad, list) else pad or 0)
