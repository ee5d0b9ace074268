"""Models by dimensions, with random weights: nothing is downloaded and nothing converted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from eval.results.known_models import known_models
from llava_todre.errors import TodreError
from llava_todre.flops import DecoderShape, TowerShape
from llava_todre.model.llava import LlavaConfig, LlavaLlamaForCausalLM

CONTEXT = 4096


@dataclass(frozen=True)
class Size:
    """Dimensions of a LLaVA-NeXT; images take 2 x 2 crops and a thumbnail."""

    decoder: DecoderShape
    tower: TowerShape
    """Its ``layers`` are those that are run: one less than the tower has."""
    tower_heads: int
    needs_gpu: bool = False
    """Without one, only FLOPs are reported."""


_CLIP_L = TowerShape(layers=23, width=1024, mlp_width=4096, image_size=336, patch_size=14)
MODELS = {"7b": "llava_next_7b", "13b": "llava_next_13b"}
"""Sizes with the dimensions of a model of configs/models."""


def _decoder_of(key: str) -> DecoderShape:
    facts = known_models()[key]
    return DecoderShape(layers=facts["num_layers"], **facts["decoder"])


SIZES = {
    "cpu": Size(
        DecoderShape(layers=10, width=512, mlp_width=1376, heads=8, kv_heads=8, vocab=1024),
        TowerShape(layers=11, width=96, mlp_width=384, image_size=336, patch_size=14),
        tower_heads=2,
    ),
    **{
        size: Size(_decoder_of(key), _CLIP_L, tower_heads=16, needs_gpu=True)
        for size, key in MODELS.items()
    },
}
"""What ``--size`` allows. ``cpu`` keeps the shares of a 7B model: a tower with a twentieth of the
prefill's FLOPs, a head with a fiftieth of the weights. It has a layer after the probe at 7/8 of
its depth, so that withdrawal saves something."""


def thin(size: Size) -> Size:
    """Return a size with the same layers and tokens and next to no width.

    Methods decide by depth and by count, so that it tells how many tokens each layer of the full
    size would process.
    """
    decoder = replace(size.decoder, width=16, mlp_width=16, heads=1, kv_heads=1, vocab=64)
    return replace(
        size, decoder=decoder, tower=replace(size.tower, width=8, mlp_width=8), tower_heads=1
    )


def build(
    size: Size, device: torch.device, dtype: torch.dtype, attention: str
) -> LlavaLlamaForCausalLM:
    """Return a model of these dimensions, made on the device in its final number format.

    Raises:
        TodreError: it does not fit into the device's memory.
    """
    decoder, tower = size.decoder, size.tower
    config = LlavaConfig(
        hidden_size=decoder.width,
        intermediate_size=decoder.mlp_width,
        num_hidden_layers=decoder.layers,
        num_attention_heads=decoder.heads,
        num_key_value_heads=decoder.kv_heads,
        vocab_size=decoder.vocab,
        max_position_embeddings=CONTEXT,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
        attn_implementation=attention,
        mm_projector_type="mlp2x_gelu",
        mm_hidden_size=tower.width,
        mm_patch_merge_type="spatial",
        image_aspect_ratio="anyres",
        image_grid_pinpoints=[[2 * tower.image_size, 2 * tower.image_size]],
        vision_config={
            "hidden_size": tower.width,
            "intermediate_size": tower.mlp_width,
            "num_hidden_layers": tower.layers + 1,
            "num_attention_heads": size.tower_heads,
            "image_size": tower.image_size,
            "patch_size": tower.patch_size,
        },
    )
    try:
        with device, _default_dtype(dtype):
            model = LlavaLlamaForCausalLM(config).eval()
    except torch.OutOfMemoryError as error:
        raise TodreError(
            f"size of {decoder.layers} layers of width {decoder.width} does not fit on {device}; "
            "allowed: a smaller one."
        ) from error
    side = tower.image_size
    model.get_vision_tower().image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    return model


def tower_shape(model: LlavaLlamaForCausalLM) -> TowerShape:
    """Return the dimensions of a model's tower, with the layers that are run."""
    config = model.get_vision_tower().config
    return TowerShape(
        layers=model.get_vision_tower().num_run,
        width=config.hidden_size,
        mlp_width=config.intermediate_size,
        image_size=config.image_size,
        patch_size=config.patch_size,
        channels=config.num_channels,
    )


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
