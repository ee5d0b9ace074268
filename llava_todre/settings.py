"""What ``generate`` takes: which setting counts, which tokens, and which numbers are refused.

The same for our class and for the stock classes of transformers.

Symbols: B batch, T prompt length.
"""

from __future__ import annotations

import inspect
import operator
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from llava_todre.errors import TodreError, unknown
from llava_todre.pruners.base import plain, require

# Above these a call would run for days, or fill any memory, before it fails.
_MAX_TOKENS, _MAX_BEAMS, _MAX_ANSWERS = 2**20, 128, 1024
_WHOLE = {
    "max_new_tokens": (1, _MAX_TOKENS),
    "min_new_tokens": (0, _MAX_TOKENS),
    "max_length": (1, _MAX_TOKENS),
    "min_length": (0, _MAX_TOKENS),
    "num_beams": (1, _MAX_BEAMS),
    "num_return_sequences": (1, _MAX_ANSWERS),
    "top_k": (0, _MAX_TOKENS),
    "no_repeat_ngram_size": (0, _MAX_TOKENS),
}
_LARGEST = sys.float_info.max
_REAL = {
    "temperature": (0.0, _LARGEST),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "typical_p": (0.0, 1.0),
    "repetition_penalty": (0.0, _LARGEST),
    "length_penalty": (-_LARGEST, _LARGEST),
}
# Before 5.23 transformers rolled rejected candidates back by the length of the first layer.
ROLLS_BACK_BY_LAYER = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23)
# Arguments under which answers would be wrong. Our class answers without images as Llama does.
REFUSED_WITH_IMAGES = ("assistant_model", "prefill_chunk_size") + (
    () if ROLLS_BACK_BY_LAYER else ("prompt_lookup_num_tokens",)
)
REFUSED_WITH_PRUNING = (
    "assistant_model",
    "assistant_early_exit",
    "prompt_lookup_num_tokens",
    "use_mtp",
    "prefill_chunk_size",
    "custom_generate",
    "position_ids",
)
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_FLAGS = ("do_sample", "use_cache")


def setting(model: Any, key: str, kwargs: Mapping[str, Any]) -> Any:
    """Return what ``generate`` takes for ``key``: its argument, or what configurations say."""
    for source in (kwargs.get("generation_config"), model.generation_config):
        if kwargs.get(key) is None and getattr(source, key, None) is not None:
            return getattr(source, key)
    return kwargs.get(key)


def checked(model: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of ``generate`` with its numbers as Python has them.

    Args:
        model: whose ``generation_config`` counts where an argument is left out.
        kwargs: the arguments.

    Raises:
        TodreError: a number of the wrong type, out of range, or too large to be meant.
    """
    sampled = setting(model, "do_sample", kwargs)
    found = dict(kwargs)
    for key in (*_WHOLE, *_REAL, *_IDS, *_FLAGS):
        value = plain(setting(model, key, kwargs))
        if value is None:
            continue
        if key in _WHOLE:
            value = whole(key, value, *_WHOLE[key])
        elif key in _REAL:
            above = key == "repetition_penalty" or (key == "temperature" and sampled)
            require(key, value, *_REAL[key], low_included=not above)
            value = float(value)
        elif key in _IDS:
            value = _ids(key, value)
        elif not isinstance(value, bool):
            raise TodreError(f"{key} {value!r} is unknown; allowed: True, False.")
        if kwargs.get(key) is not None:
            found[key] = value
    return found


def refuse(
    model: Any, keys: Iterable[str], kwargs: Mapping[str, Any], together: str = "pruning"
) -> None:
    """Raise a TodreError if one of these arguments is given, or set by a configuration.

    Args:
        model: whose ``generation_config`` counts where an argument is left out.
        keys: such as :data:`REFUSED_WITH_PRUNING`.
        kwargs: arguments of ``generate``.
        together: what they cannot be combined with.
    """
    for key in keys:
        given = setting(model, key, kwargs)
        if given is not None and given is not False:
            raise TodreError(f"{key} is not supported together with {together}; leave it out.")


def _ids(key: str, value: Any) -> int | list[int]:
    if isinstance(value, tuple) and key == "eos_token_id":
        return [whole(key, each, -1) for each in value]
    return whole(key, value, -1)


def whole(key: str, value: Any, low: int, high: int = _MAX_TOKENS) -> int:
    """Return a whole number from ``low`` to ``high`` as an int, or raise a TodreError."""
    try:
        number = operator.index(value)
    except TypeError:
        number = low - 1
    if isinstance(value, bool) or not low <= number <= high:
        raise TodreError(
            f"{key} {value!r} is out of range; allowed: a whole number from {low} to {high:,}."
        )
    return number


def whole_rows(key: str, rows: Any, width: int) -> list[Any]:
    """Return sizes as tuples of whole numbers; None stays, for what has no size.

    Args:
        key: what the user set, for messages.
        rows: a list of them, or a tensor.
        width: numbers of each.

    Raises:
        TodreError: anything else.
    """

    def numbers(row: Any) -> tuple[int, ...] | None:
        if row is None:
            return None
        found = tuple(map(int, row))
        # A string does not equal its number.
        if found != tuple(row) or len(found) != width or min(found) < 1:
            raise ValueError
        return found

    try:
        return list(map(numbers, rows.tolist() if hasattr(rows, "tolist") else rows))
    except (TypeError, ValueError, OverflowError):
        raise TodreError(
            f"{key} {rows!r} is not usable; allowed: {width} whole numbers above 0 for each image."
        ) from None


def require_known(kwargs: Iterable[str]) -> None:
    """Raise a TodreError unless ``generate`` has all these settings.

    Args:
        kwargs: names of arguments; those that make up the prompt are no settings.
    """
    own = set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "inputs", "kwargs"}
    known = own | set(vars(GenerationConfig())) | {"tokenizer", "assistant_tokenizer"}
    for key in kwargs:
        if key not in known:
            raise unknown("argument of generate", key, {name for name in known if name[0] != "_"})


def real_tokens(model: Any, ids: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """Return (B, T) bool, which tokens count: as the mask says, else as transformers infers it.

    Args:
        model: whose ``pad_token_id`` marks padding where no mask is given.
        ids: (B, T).
        kwargs: arguments of ``generate``.

    Raises:
        TodreError: see :func:`stated_tokens`.
    """
    mask = kwargs.get("attention_mask")
    if mask is None and isinstance(ids, Tensor):
        mask = _unpadded(model, ids, kwargs)
    return stated_tokens(ids, mask)


def stated_tokens(ids: Tensor, mask: Tensor | None) -> Tensor:
    """Return (B, T) bool, which tokens count: all of them where there is no mask.

    Raises:
        TodreError: ids or a mask of another kind or shape, or a prompt without any token.
    """
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex():
        kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TodreError(f"input_ids must be a tensor of whole numbers, got {kind}.")
    if ids.ndim != 2:
        raise TodreError(f"input_ids has shape {tuple(ids.shape)}; allowed: (B, T).")
    mask = torch.ones_like(ids) if mask is None else mask
    shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    if shape != tuple(ids.shape):
        raise TodreError(
            f"attention_mask {shape} does not fit input_ids {tuple(ids.shape)}; "
            "allowed: one number per token."
        )
    real = mask.bool()
    empty = (~real.any(dim=1)).nonzero()
    if len(empty):
        raise TodreError(
            f"prompt {int(empty[0])} of the batch has no token, or attention_mask is 0 for all of "
            "them; allowed: at least one token per prompt."
        )
    return real


def _unpadded(model: Any, ids: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    pad, eos = setting(model, "pad_token_id", kwargs), setting(model, "eos_token_id", kwargs)
    if pad is None or pad in (eos if isinstance(eos, list) else [eos]):
        return torch.ones_like(ids, dtype=torch.bool)
    return ids != pad


def pad_id(model: Any, kwargs: Mapping[str, Any]) -> int:
    """Return the token with which ``generate`` pads."""
    pad, eos = setting(model, "pad_token_id", kwargs), setting(model, "eos_token_id", kwargs)
    pad = eos if pad is None else pad
    return int(pad[0] if isinstance(pad, list) else pad or 0)


def shorter_lengths(
    model: Any, kwargs: Mapping[str, Any], whole: int, short: int
) -> dict[str, int]:
    """Return ``max_length`` and ``min_length`` for pruned prompts: they count the whole ones.

    Args:
        model: whose ``generation_config`` counts where an argument is left out.
        kwargs: arguments of ``generate``.
        whole: tokens of the longest prompt, all visual tokens included.
        short: of the pruned prompts, their padding included.

    Raises:
        TodreError: nothing could be generated.
    """
    lengths = {}
    for key, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        length = setting(model, key, kwargs)
        if length is None or setting(model, new, kwargs) is not None:
            continue  # as in transformers, the number of new tokens wins
        if key == "max_length" and length <= whole:
            raise TodreError(
                f"max_length must be more than the {whole} tokens of the whole prompt, visual "
                f"tokens included, got {length}; or set max_new_tokens."
            )
        lengths[key] = max(0, length - whole + short)
    return lengths


_ROW_BY_ROW = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "use_cache": True,
    "cache_implementation": None,
}


def keeps_cache_rows(model: Any, kwargs: Mapping[str, Any]) -> bool:
    """Return whether every row of the KV cache stays with its prompt in such a call.

    Args:
        model: whose ``generation_config`` counts where an argument is left out.
        kwargs: arguments of ``generate``.
    """
    return all(setting(model, key, kwargs) in (None, usual) for key, usual in _ROW_BY_ROW.items())
