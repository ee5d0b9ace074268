"""What the JSON files of a checkpoint may hold, checked before anything is built from them.

The bounds are far above every published model, and low enough that a typing error, or a
malicious file, is refused before it costs memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llava_todre.errors import TodreError
from llava_todre.model.placement import DTYPES
from llava_todre.stage1.anyres import MERGE_TYPES

Check = tuple[str, Callable[[Any], bool]]
"""What is expected, in words, and whether a value is that."""


def _is_whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _size(high: int, low: int = 1) -> Check:
    return f"a whole number from {low} to {high}", lambda value: _is_whole(value, low, high)


def _sizes(high: int) -> Check:
    """Check for one number, or one for each direction."""

    def fits(value: Any) -> bool:
        numbers = value if isinstance(value, list) else [value]
        return len(numbers) in (1, 2) and all(_is_whole(number, 1, high) for number in numbers)

    return f"one or two whole numbers from 1 to {high}", fits


def _real(low: float, high: float, *, closed: bool = False) -> Check:
    def fits(value: Any) -> bool:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and (low <= value if closed else low < value) and value <= high

    return f"a number {'from' if closed else 'above'} {low:g} to {high:g}", fits


def _word(allowed: Iterable[str]) -> Check:
    words = sorted(allowed)
    shown = ", ".join(words[:12]) + (", ..." if len(words) > 12 else "")
    return f"one of {shown}", lambda value: isinstance(value, str) and value in words


def _of_type(kind: type, name: str) -> Check:
    return name, lambda value: isinstance(value, kind)


def _pinpoints(value: Any) -> bool:
    if isinstance(value, str):  # as LLaVA's training scripts write them; parsed where it is used
        return True
    return isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(_is_whole(n, 1, 2**16) for n in pair)
        for pair in value
    )


def _layers(value: Any) -> bool:
    numbers = value if isinstance(value, list) and value else [value]
    return all(_is_whole(number, -1000, 1000) for number in numbers)


def _numbers(low: float, *, closed: bool) -> Check:
    """Check for one number per colour."""
    name, fits = _real(low, 1e4, closed=closed)

    def all_fit(value: Any) -> bool:
        return isinstance(value, list) and len(value) == 3 and all(map(fits, value))

    return f"three times {name}", all_fit


def _rope(value: Any) -> bool:
    """Check for a known kind; of several kinds of layers each has its own."""
    if not isinstance(value, dict):
        return False
    nested = [inner for inner in value.values() if isinstance(inner, dict)]
    kind = value.get("rope_type", value.get("type", "default"))
    return kind in _ROPE_KINDS and all(map(_rope, nested))


def _side(value: Any) -> bool:
    stated = list(value.values()) if isinstance(value, dict) else [value]
    sides = [side for side in stated if side is not None]
    both = value if isinstance(value, dict) else {}
    is_half = (both.get("height") is None) != (both.get("width") is None)
    return bool(sides) and not is_half and all(_is_whole(side, 1, 2**28) for side in sides)


_ROPE_KINDS = ("default", "mrope", "axial", *ROPE_INIT_FUNCTIONS)
_ROPE = f"a JSON object with one of the types {', '.join(_ROPE_KINDS)}", _rope
_BOOL = _of_type(bool, "true or false")
_DICT = _of_type(dict, "a JSON object")
_TEXT = _of_type(str, "text")
_SHARE = _real(0, 1, closed=True)
_SPREAD = _real(0, 100, closed=True)
_SIDE = f"pixels, each a whole number from 1 to {2**28}", _side  # Qwen's is an area

# A key that is absent or null stands for the default.
CONFIG: dict[str, Check] = {
    "vocab_size": _size(2**24),
    "hidden_size": _size(2**16),
    "intermediate_size": _size(2**20),
    "num_hidden_layers": _size(1000),
    "num_attention_heads": _size(2**12),
    "num_key_value_heads": _size(2**12),
    "head_dim": _size(2**12),
    "max_position_embeddings": _size(2**27),
    "max_sequence_length": _size(2**27),
    "tokenizer_model_max_length": _size(2**27),
    "mm_hidden_size": _size(2**20),
    "projection_dim": _size(2**16, low=0),
    "num_channels": _size(16),
    "image_size": _sizes(2**14),
    "patch_size": _sizes(2**12),
    "rms_norm_eps": _real(0, 1),
    "layer_norm_eps": _real(0, 1),
    "rope_theta": _real(1, 1e15, closed=True),
    "factor": _real(0, 1e6),
    "attention_dropout": _SHARE,
    "initializer_range": _SPREAD,
    "initializer_factor": _SPREAD,
    "hidden_act": _word(ACT2FN),
    "projector_hidden_act": _word(ACT2FN),
    "dtype": _word([*DTYPES, "float64"]),
    "torch_dtype": _word([*DTYPES, "float64"]),
    "mm_patch_merge_type": _word(MERGE_TYPES),
    "tokenizer_padding_side": _word(["left", "right"]),
    "vision_feature_select_strategy": _word(["default", "full"]),
    "vision_feature_layer": ("a whole number, or a list of them", _layers),
    "mm_vision_select_layer": _size(1000, low=-1000),
    "image_grid_pinpoints": ("a list of pairs of whole numbers from 1 to 65536", _pinpoints),
    "tie_word_embeddings": _BOOL,
    "attention_bias": _BOOL,
    "mlp_bias": _BOOL,
    "multimodal_projector_bias": _BOOL,
    "mm_use_im_start_end": _BOOL,
    "mm_vision_tower": _TEXT,
    "mm_projector_type": _TEXT,
    "rope_scaling": _ROPE,
    "rope_parameters": _ROPE,
    "quantization_config": _DICT,
    "text_config": _DICT,
    "vision_config": _DICT,
}
"""What a model is built from; keys that are not listed pass."""
GENERATION: dict[str, Check] = {
    "num_beams": _size(1000),
    "num_return_sequences": _size(1000),
    "max_length": _size(2**27),
    "max_new_tokens": _size(2**27),
    "min_length": _size(2**27, low=0),
    "temperature": _real(0, 1e4, closed=True),
    "top_p": _SHARE,
    "repetition_penalty": _real(0, 1e4),
    "do_sample": _BOOL,
}
PROCESSOR: dict[str, Check] = {
    "image_processor": _DICT,
    "vision_feature_select_strategy": CONFIG["vision_feature_select_strategy"],
    "image_grid_pinpoints": CONFIG["image_grid_pinpoints"],
    "image_mean": _numbers(-1e4, closed=True),
    "image_std": _numbers(0, closed=False),
    "rescale_factor": _real(0, 1),
    "resample": _size(5, low=0),
    "size": _SIDE,
    "crop_size": _SIDE,
    "patch_size": _sizes(2**12),
    "num_additional_image_tokens": _size(64, low=0),
    "do_resize": _BOOL,
    "do_center_crop": _BOOL,
    "do_rescale": _BOOL,
    "do_normalize": _BOOL,
}
_TOKENS = (
    *("bos_token_id", "eos_token_id", "pad_token_id"),
    *("image_token_id", "image_token_index", "video_token_id", "video_token_index"),
)


def check_config(path: Path | str, raw: Mapping[str, Any]) -> None:
    """Raise a TodreError for the first value that no model could be built from.

    Args:
        path: of the config.json, for the message.
        raw: what it holds; the configurations of decoder and tower within are checked, too.
    """
    check_values(path, raw, CONFIG)
    decoder = raw.get("text_config") or raw
    for values in (decoder, raw.get("vision_config") or {}):
        _check_heads(path, values)
    size = decoder.get("vocab_size")
    for values in (raw, decoder):
        check_tokens(path, values, size or 2**24)


def check_values(
    path: Path | str, values: Mapping[str, Any], table: Mapping[str, Check], within: str = ""
) -> None:
    """Raise a TodreError for a value that its table does not allow, or that is NaN or infinite.

    Args:
        path: of the file, for the message.
        values: what it holds; the table goes for objects within, too.
        table: key -> check.
        within: where ``values`` are in the file, for the message.
    """
    for key, value in values.items():
        expected, fits = table.get(key, ("", None))
        if fits is not None and value is not None and not fits(value):
            raise _wrong(path, within + key, value, expected)
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise _wrong(path, within + key, value, "finite numbers")
        if isinstance(value, dict) and key != "quantization_config":
            check_values(path, value, table, f"{within}{key}.")


def check_tokens(path: Path | str, values: Mapping[str, Any], size: int) -> None:
    """Raise a TodreError for a special token that the vocabulary does not have.

    Args:
        path: of the file, for the message.
        values: has keys such as ``pad_token_id``, or not; -1 is none.
        size: of the vocabulary.
    """
    for key in _TOKENS:
        stated = values.get(key)
        ids = stated if isinstance(stated, list) and key == "eos_token_id" else [stated]
        if not all(number is None or _is_whole(number, -1, size - 1) for number in ids):
            raise _wrong(path, key, stated, f"null, or a token of the vocabulary, 0 to {size - 1}")


def _wrong(path: Path | str, key: str, value: Any, expected: str) -> TodreError:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
    return TodreError(f"{path}: {key} must be {expected}, got {shown}.")


def _check_heads(path: Path | str, values: Mapping[str, Any]) -> None:
    """Raise unless the heads share the width, and the keys the heads, without a rest."""
    width, heads = values.get("hidden_size"), values.get("num_attention_heads")
    keys = values.get("num_key_value_heads")
    if width and heads and not values.get("head_dim") and width % heads:
        raise _wrong(path, "num_attention_heads", heads, f"a divisor of hidden_size {width}")
    if heads and keys and heads % keys:
        expected = f"a divisor of num_attention_heads {heads}"
        raise _wrong(path, "num_key_value_heads", keys, expected)
