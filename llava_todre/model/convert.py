"""The published layouts of LLaVA turned into ours: config keys and tensor names. Pure functions.

``original``: liuhaotian/llava-v1.5-*, llava-v1.6-*: one flat config with ``mm_*`` keys, names such
as ``model.mm_projector.0.weight``. Ours is this one, less the level ``vision_model`` that
transformers 5 dropped from CLIP. A model of ours that was saved is read as this layout too.

``hf``: llava-hf/*: ``text_config`` and ``vision_config``, sizes as (height, width), and two
generations of names (``language_model.model.*``, later ``model.language_model.*``).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from transformers import CLIPVisionConfig
from transformers import LlavaConfig as HfLlavaConfig
from transformers import LlavaNextConfig as HfLlavaNextConfig

from llava_todre.errors import TodreError
from llava_todre.model.images import checked_aspect_ratio

TOWER_PREFIX = "model.vision_tower.vision_tower."
PROTOCOLS = ("native", "paper")

_ORIGINAL_TYPES = ("llava", "llava_llama", "llava_mistral")
_HF_TYPES = ("llava", "llava_next")
_TOWER_KEYS = (
    "hidden_size intermediate_size projection_dim num_hidden_layers num_attention_heads "
    "num_channels image_size patch_size hidden_act layer_norm_eps attention_dropout "
    "initializer_range initializer_factor"
).split()
# Facts about the file a config came from, not about the model.
_NOISE_KEYS = (
    "architectures model_type transformers_version _name_or_path torch_dtype id2label label2id "
    "sliding_window layer_types"
).split()

# First match wins; a name no rule matches stays as it is.
_ORIGINAL_RULES = [(r"model\.vision_tower\.vision_tower\.(vision_model\.)?", TOWER_PREFIX)]
_TOWER_RULES = [
    (r"(vision_model\.)?(?=embeddings|encoder|pre_layrnorm|post_layernorm)", TOWER_PREFIX)
]
_HF_RULES = [
    (r"model\.language_model\.", "model."),
    (r"language_model\.lm_head\.", "lm_head."),
    (r"language_model\.model\.", "model."),
    (r"(model\.)?vision_tower\.(vision_model\.)?", TOWER_PREFIX),
    (r"(model\.)?multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
    (r"(model\.)?multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
    (r"image_newline", "model.image_newline"),
]
_RULES = {"original": _ORIGINAL_RULES, "tower": _TOWER_RULES, "hf": _HF_RULES}
# Constants that older files store and newer models compute.
_LEFTOVER = re.compile(r"rotary_emb\.inv_freq$|embeddings\.position_ids$")
# The text half of a whole CLIP.
_CLIP_TEXT = re.compile(r"text_model\.|(text|visual)_projection\.|logit_scale$")


def rename(name: str, layout: str) -> str | None:
    """Return our name of a tensor, or None when the model does not want it.

    Args:
        name: the name in the file.
        layout: ``"original"``, ``"hf"``, or ``"tower"`` for a CLIP saved by itself.
    """
    if _LEFTOVER.search(name) or (layout == "tower" and _CLIP_TEXT.match(name)):
        return None
    for pattern, replacement in _RULES[layout]:
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name, count=1)
    return name


def detect_layout(raw: dict[str, Any]) -> str:
    """Return ``"original"`` or ``"hf"`` for the content of a config.json."""
    model_type = raw.get("model_type")
    if model_type in _HF_TYPES and "text_config" in raw:
        return "hf"
    if model_type in _ORIGINAL_TYPES and raw.get("mm_vision_tower"):
        return "original"
    reason = " without mm_vision_tower" if model_type in _ORIGINAL_TYPES else ""
    raise TodreError(
        "config.json is not of a LLaVA checkpoint: model_type must be one of "
        f"{', '.join(_ORIGINAL_TYPES)} in the original layout, or {', '.join(_HF_TYPES)} of "
        f"llava-hf, got {model_type!r}{reason}."
    )


def vision_config(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of ``CLIPVisionConfig`` from a tower's config.json.

    Args:
        raw: config of a vision tower alone, or of a whole CLIP.
    """
    nested = raw.get("vision_config", raw)
    model_type = nested.get("model_type", "clip_vision_model")
    if raw.get("model_type") not in (None, "clip", "clip_vision_model"):
        model_type = raw["model_type"]
    if model_type != "clip_vision_model":
        raise TodreError(
            f"vision tower must have model_type clip or clip_vision_model, got {model_type!r}."
        )
    known = {key: nested[key] for key in _TOWER_KEYS if nested.get(key) is not None}
    for key in ("image_size", "patch_size"):
        if not isinstance(known.get(key, 1), int):
            raise TodreError(f"{key} of the vision tower must be one number, got {known[key]!r}.")
    config = built("the vision tower's config", CLIPVisionConfig, **known)
    return {key: getattr(config, key) for key in _TOWER_KEYS}


def from_original(raw: dict[str, Any], tower: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of our config from a config in the original layout.

    Args:
        raw: its config.json.
        tower: what :func:`vision_config` returned.
    """
    if raw.get("mm_use_im_start_end"):
        raise TodreError("mm_use_im_start_end must be false, got true.")
    if raw.get("model_type") == "llava_mistral" and raw.get("sliding_window") is not None:
        raise TodreError(f"sliding_window must be null, got {raw['sliding_window']}.")
    ours = _without_noise(raw)
    ours["dtype"] = raw.get("dtype") or raw.get("torch_dtype")
    ours["vision_config"] = tower
    ours.setdefault("mm_hidden_size", tower["hidden_size"])
    ours.setdefault("mm_projector_type", "linear")
    ours.setdefault("mm_patch_merge_type", "flat")
    return _checked(ours)


def from_hf(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of our config from a ``llava-hf`` config.

    The vocabulary keeps HF's size, with its rows for ``<image>`` and padding. LLaVA-1.5 gets
    ``image_aspect_ratio`` "pad", as in the original (HF's own processor crops the centre).
    """
    anyres = raw["model_type"] == "llava_next"
    hf = built("config.json", (HfLlavaNextConfig if anyres else HfLlavaConfig).from_dict, raw)
    _check_hf(hf)
    ours = _without_noise(hf.text_config.to_dict())
    tower = vision_config(hf.vision_config.to_dict())
    ours["dtype"] = raw.get("dtype") or raw.get("torch_dtype") or ours.get("dtype")
    if raw.get("pad_token_id") is not None:
        ours["pad_token_id"] = raw["pad_token_id"]
    ours |= {
        "vision_config": tower,
        "mm_vision_tower": "vision_tower",
        "mm_hidden_size": tower["hidden_size"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": feature_layer(hf.vision_feature_layer),
        "mm_vision_select_feature": (
            "patch" if hf.vision_feature_select_strategy == "default" else "cls_patch"
        ),
        "mm_patch_merge_type": "spatial_unpad" if anyres else "flat",
        "image_aspect_ratio": "anyres" if anyres else "pad",
    }
    if anyres:
        ours["image_grid_pinpoints"] = [[w, h] for h, w in hf.image_grid_pinpoints]
    return _checked(ours)


def built(what: str, make: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
    """Return ``make(...)``; our error when transformers refuses the values read from a file."""
    try:
        return make(*arguments, **settings)
    except TodreError:
        raise
    except KeyError as error:
        raise TodreError(f"{what} is not usable: it lacks, or has no use for, {error}") from error
    except Exception as error:  # types and ranges, each with errors of their own
        raise TodreError(f"{what} is not usable: {' '.join(str(error).split())}") from error


def feature_layer(stated: Any) -> Any:
    """Return ``vision_feature_layer``; of a list of one, the one."""
    is_one = isinstance(stated, (list, tuple)) and len(stated) == 1
    return stated[0] if is_one else stated


def _check_hf(hf: Any) -> None:
    text, layer = hf.text_config, feature_layer(hf.vision_feature_layer)
    other = "; else use transformers' own class: --backend transformers."
    if text.model_type not in ("llama", "mistral") or getattr(text, "sliding_window", None):
        raise TodreError(
            "text_config must have model_type llama, or mistral without a sliding window, "
            f"got {text.model_type!r}{other}"
        )
    if not isinstance(layer, int):
        raise TodreError(f"vision_feature_layer must be one integer, got {layer!r}{other}")
    if hf.projector_hidden_act != "gelu" or not hf.multimodal_projector_bias:
        raise TodreError(
            "projector must have activation 'gelu' and a bias, "
            f"got {hf.projector_hidden_act!r} and {hf.multimodal_projector_bias}{other}"
        )


def loads(raw: dict[str, Any]) -> bool:
    """Return whether our class runs what a config.json of llava-hf describes."""
    if raw.get("quantization_config"):
        return False
    try:
        from_hf(raw)
    except TodreError:
        return False
    return True


def with_protocol(config: dict[str, Any], protocol: str) -> dict[str, Any]:
    """Return the config under an evaluation protocol.

    ``"native"`` changes nothing. ``"paper"`` is the fixed grid of the papers' token counts: always
    2 x 2 tiles and the thumbnail, no unpadding, no newlines (2,880 tokens for CLIP-L at 336).
    """
    if protocol == "native":
        return config
    mode = config.get("image_aspect_ratio")
    if mode != "anyres":
        raise TodreError(
            "protocol must be native unless image_aspect_ratio is 'anyres', "
            f"got 'paper' with {mode!r}."
        )
    side = 2 * config["vision_config"]["image_size"]
    return config | {"mm_patch_merge_type": "spatial", "image_grid_pinpoints": [[side, side]]}


def _without_noise(raw: dict[str, Any]) -> dict[str, Any]:
    """Leave out what only describes the file, and nulls: they stand for the default."""
    return {k: v for k, v in raw.items() if k not in _NOISE_KEYS and v is not None}


def _checked(ours: dict[str, Any]) -> dict[str, Any]:
    checked_aspect_ratio(ours.get("image_aspect_ratio"))
    return ours
