"""The trained model as an original LLaVA checkpoint, and back.

A directory with `config.json` of a `LlavaLlamaForCausalLM`, half-precision `model.safetensors`
under LLaVA's own names, the tokenizer, and `vision_tower/` with the CLIP configuration that
`mm_vision_tower` points to. The tower's weights are in `model.safetensors`, as in LLaVA 1.6.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from eval.mini.scenes import IMAGE_SIDE, TILE_SIDE
from scripts.mini_training.network import DecoderConfig, MiniDecoder
from scripts.mini_training.tokenizer import MAX_LENGTH, PromptEncoder, save_tokenizer
from scripts.mini_training.views import PIXEL_MEAN, PIXEL_STD
from scripts.mini_training.vision import VisionConfig, VisionTower

TOWER_PREFIX = "model.vision_tower.vision_tower."
_PAD_ID, _BOS_ID, _EOS_ID = 0, 1, 2


def llava_config(decoder: DecoderConfig) -> dict[str, Any]:
    """`config.json` in LLaVA's layout."""
    return {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": _BOS_ID,
        "eos_token_id": _EOS_ID,
        "pad_token_id": _PAD_ID,
        "hidden_act": "silu",
        "hidden_size": decoder.hidden_size,
        "intermediate_size": decoder.intermediate_size,
        "num_hidden_layers": decoder.num_hidden_layers,
        "num_attention_heads": decoder.num_attention_heads,
        "num_key_value_heads": decoder.num_attention_heads,
        "max_position_embeddings": MAX_LENGTH,
        "rms_norm_eps": decoder.rms_norm_eps,
        "rope_theta": decoder.rope_theta,
        "rope_scaling": None,
        "vocab_size": decoder.vocab_size,
        "tie_word_embeddings": False,
        "use_cache": True,
        "torch_dtype": "float16",
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": [[IMAGE_SIDE, IMAGE_SIDE]],
        "mm_hidden_size": decoder.mm_hidden_size,
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "vision_tower",
        "unfreeze_mm_vision_tower": True,
        "use_mm_proj": True,
        "tokenizer_model_max_length": MAX_LENGTH,
        "tokenizer_padding_side": "right",
    }


def _vision_files(vision: VisionConfig) -> dict[str, dict[str, Any]]:
    """Configuration files of the CLIP tower."""
    config = {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model"}
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": TILE_SIDE},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": TILE_SIDE, "width": TILE_SIDE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [PIXEL_MEAN] * 3,
        "image_std": [PIXEL_STD] * 3,
        "do_convert_rgb": True,
    }
    sizes = dataclasses.asdict(vision) | {"num_channels": 3, "projection_dim": 64}
    return {"config.json": config | sizes, "preprocessor_config.json": preprocessor}


def state_tensors(tower: VisionTower, decoder: MiniDecoder) -> dict[str, Tensor]:
    """All weights under the names of an original LLaVA checkpoint."""
    tensors = dict(decoder.state_dict())
    tensors |= {TOWER_PREFIX + name: value for name, value in tower.state_dict().items()}
    return tensors


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def save_checkpoint(directory: Path, tower: VisionTower, decoder: MiniDecoder) -> None:
    """Write weights in float16, configurations and tokenizer."""
    (directory / "vision_tower").mkdir(parents=True, exist_ok=True)
    half = {k: v.half().contiguous() for k, v in state_tensors(tower, decoder).items()}
    weights = directory / "model.safetensors"
    save_file(half, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # it is written readable by its owner only
    _write_json(directory / "config.json", llava_config(decoder.config))
    generation = {"bos_token_id": _BOS_ID, "eos_token_id": _EOS_ID, "pad_token_id": _PAD_ID}
    _write_json(directory / "generation_config.json", generation)
    for name, content in _vision_files(tower.config).items():
        _write_json(directory / "vision_tower" / name, content)
    save_tokenizer(directory)


def load_checkpoint(directory: Path) -> tuple[VisionTower, MiniDecoder]:
    """The training network in float32 with the weights of `directory`."""
    tensors = {k: v.float() for k, v in load_file(directory / "model.safetensors").items()}
    tower = VisionTower(VisionConfig())
    decoder = MiniDecoder(DecoderConfig(PromptEncoder().vocabulary_size))
    size = len(TOWER_PREFIX)
    tower.load_state_dict({k[size:]: v for k, v in tensors.items() if k.startswith(TOWER_PREFIX)})
    decoder.load_state_dict({k: v for k, v in tensors.items() if not k.startswith(TOWER_PREFIX)})
    return tower.requires_grad_(False), decoder.requires_grad_(False)
