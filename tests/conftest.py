"""Tiny models built in code: 8 decoder layers of width 64; a tower of 4 layers, 4 x 4 patches."""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import ImageFile
from torch import Tensor, nn

# Triton reads this when it is first imported, which transformers may do: without a GPU its kernels
# run in Python, on tensors of the CPU.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
# No test needs the hub; one that tries waits for its retries.
os.environ["HF_HUB_OFFLINE"] = "1"

from llava_todre.model.export_hf import save_as_hf
from llava_todre.model.llava import LlavaConfig, LlavaLlamaForCausalLM
from llava_todre.model.load import load_pretrained_model
from llava_todre.pruners import Keep, LayerView, Pruner
from llava_todre.spans import TokenType, VisualTokens, is_visual

# Matrices this small are faster without handing work to a second thread.
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Take all that was imported out of garbage collection: a tenth of the time goes there."""
    gc.collect()
    gc.freeze()


VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
    "projection_dim": 32,
}
PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]


def randomise(model: nn.Module, seed: int) -> None:
    """Draw weights at which attention is far from uniform and every layer matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim > 1 and "embed" not in name:
                gain = 1.5 if "q_proj" in name or "k_proj" in name else 1.0
                noise *= gain * weight[0].numel() ** -0.5
            elif "norm" in name and name.endswith("weight"):
                noise = 1 + 0.1 * noise
            elif name.endswith("bias"):
                noise *= 0.1
            weight.copy_(noise)


@pytest.fixture(scope="session")
def tiny_llava() -> Callable[..., LlavaLlamaForCausalLM]:
    """Build a random LLaVA-NeXT: ``tiny_llava(attention, seed=0, **config)``."""

    def build(attention: str = "sdpa", seed: int = 0, **config: Any) -> LlavaLlamaForCausalLM:
        options = {
            "vocab_size": 300,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 1,
            "eos_token_id": None,
            "pad_token_id": 0,
            "tie_word_embeddings": False,
            "mm_projector_type": "mlp2x_gelu",
            "mm_hidden_size": 32,
            "mm_patch_merge_type": "spatial_unpad",
            "image_aspect_ratio": "anyres",
            "image_grid_pinpoints": PINPOINTS,
            "vision_config": VISION,
        }
        model = LlavaLlamaForCausalLM(LlavaConfig(**(options | config))).eval()
        model.config._attn_implementation = attention
        randomise(model, seed)
        return model

    return build


@pytest.fixture(scope="session")
def stock_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA-NeXT as llava-hf lays it out, with its processor; copy it to change it."""
    folder = tmp_path_factory.mktemp("stock") / "llava-next"
    golden = Path(__file__).parent / "golden" / "llava-v1.6-tiny"
    tokenizer, model, _, _ = load_pretrained_model(golden)
    save_as_hf(model, tokenizer, folder, "vicuna_v1")
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Folder and results of ``todre demo`` on two images; copy the folder to change it."""
    from eval.demo.run import run_demo

    out = tmp_path_factory.mktemp("demo")
    return out, run_demo(None, ["random", "todre"], [0.25], 2, out)


@pytest.fixture(autouse=True)
def pillow_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what some task modules of lmms-eval do: let Pillow read damaged files silently."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)


@pytest.fixture(params=["eager", "sdpa"])
def attention(request: pytest.FixtureRequest) -> str:
    """Run the test under both exact attention implementations."""
    return request.param


@pytest.fixture
def draw() -> torch.Generator:
    """A generator with a fixed seed."""
    return torch.Generator().manual_seed(0)


def visual_tokens(
    grid: tuple[int, int] | None = None,
    side: int = 24,
    frames: int = 0,
    padding: int = 0,
    width: int = 64,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    num_text: int = 12,
) -> VisualTokens:
    """Return random tokens of an image (with ``grid`` = (columns, rows) of crops) or a video.

    Everything a method can need is there. Features cluster and lie on one side of the origin, as
    real ones do; ``padding`` rows are missing at the top and the bottom of the canvas of crops.
    """
    generator = torch.Generator().manual_seed(seed)
    columns, rows = grid or (0, 0)
    num_views = frames or 1 + columns * rows
    every = torch.arange(num_views * side * side)
    if grid is None:
        order = every
    else:
        canvas = every[side * side :].view(rows, columns, side, side).transpose(1, 2)
        canvas = canvas.reshape(rows * side, -1)[padding : rows * side - padding]
        order = torch.cat([every[: side * side], canvas.flatten()])

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    vision_width, heads = 48, 4
    groups = torch.randint(20, every.shape, generator=generator)
    features = noise(20, width)[groups] + 0.5 * noise(len(every), width) + noise(width)
    features = features * (1 + 0.3 * noise(len(every), 1).abs())
    logits = 2 * noise(num_views, side * side)
    vision = {}
    for layer in (-2, -1, 0, 1, 2, 8, 9):
        shifted = logits + noise(num_views, side * side)
        vision["cls_logits", layer] = shifted.flatten()
        vision["cls_attention", layer] = shifted.softmax(1).flatten()
        vision["cls_attention_unsplit", layer] = (2 * shifted).softmax(1).flatten()
        vision["received_attention", layer] = noise(*shifted.shape).softmax(1).flatten()
        vision["keys", layer] = noise(len(every), heads, vision_width // heads)
    vision_features = noise(len(every), vision_width) + noise(vision_width)
    matrix = noise(vision_width, width) / vision_width**0.5

    def project(states: Tensor) -> Tensor:
        return torch.nn.functional.gelu(states @ matrix.to(states)).to(dtype)

    def resized(height: int, breadth: int) -> Tensor:
        maps = features.view(num_views, side, side, width).permute(0, 3, 1, 2)
        pooled = torch.nn.functional.adaptive_avg_pool2d(maps, (height, breadth))
        return pooled.flatten(2).transpose(1, 2).to(dtype)

    patch = order % (side * side)
    return VisualTokens(
        features=features[order].to(dtype),
        view=order // (side * side),
        row=patch // side,
        column=patch % side,
        is_video=frames > 0,
        grid=grid,
        vision={key: value[order] for key, value in vision.items()},
        vision_features=vision_features[order].to(dtype),
        cls_features=noise(num_views, vision_width).to(dtype),
        project=project,
        resized=resized,
        text_embeds=0.3 * noise(num_text, width).to(dtype),
    )


def selected(method: Pruner, tokens: VisualTokens, num_keep: int) -> Keep:
    """Return what a method keeps when it is to keep ``num_keep``, in position order."""
    return Keep.checked(method.select(tokens, num_keep), type(method).__name__, len(tokens))


def layer_view(cls: type[LayerView] = LayerView, **given: Any) -> LayerView:
    """Return a view of which only what is given can be asked."""
    named: dict[str, Any] = {field.name: None for field in dataclasses.fields(cls)}
    return cls(**(named | {"measured": {}} | given))


@dataclass(frozen=True, kw_only=True)
class MeasureAll(Pruner):
    """Measures Eq. 8 after every layer and never drops anything."""

    retain_ratio: float = 1.0
    all_text: bool = False

    def probe_layers(self, num_layers: int) -> tuple[int, ...]:
        return tuple(range(num_layers))

    def at_layer(self, view: LayerView) -> None:
        is_text = ~is_visual(view.kinds) if self.all_text else view.kinds == TokenType.TEXT
        view.attention_ratios(is_text)
