"""Phase 0: teach the vision tower what the renderer drew, patch by patch.

T tiles, N = 64 patches, D = 128 width. There is no text and no contrastive data at this size; the
labels of `labels.py` stand in for CLIP's pre-training. Linear heads read the features that LLaVA
will read (`hidden_states[-2]`); [CLS] of the last layer says what is in the tile, so that its
attention means what CLIP's does. The heads are thrown away and the tower is frozen afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.mini.render import Renderer
from eval.mini.scenes import (
    IMAGE_LAYOUT,
    TILE_LAYOUT,
    SeedFamily,
    sample_scene,
    stream,
)
from scripts.mini_training.labels import CLS_SIZE, HEAD_SIZES, IGNORE, TileLabels, tile_labels
from scripts.mini_training.loop import rate
from scripts.mini_training.muon import Muon
from scripts.mini_training.views import pixel_values
from scripts.mini_training.vision import VisionConfig, VisionTower, start_positions

LOSS_WEIGHTS = {
    "shape": 1.0,
    "colour": 1.0,
    "digit": 1.0,
    "slot": 0.5,
    "row": 0.1,
    "column": 0.1,
    "centre": 2.0,
    "thumbnail": 0.2,
}
CLS_WEIGHT = 0.1
"""Per [CLS] target, of which there are 73."""


@dataclass(frozen=True)
class TowerConfig:
    """Hyperparameters of phase 0; two of three steps see whole scenes, one sees single tiles."""

    num_steps: int = 2600
    images_per_step: int = 12
    tiles_per_step: int = 48
    muon_rate: float = 0.02
    adam_rate: float = 1.5e-3
    warmup_steps: int = 50
    decay: float = 0.5
    num_backgrounds: int = 160
    seed: int = 0


class _Heads(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, sum(HEAD_SIZES.values()))
        self.norm = nn.LayerNorm(width)
        self.cls = nn.Linear(width, CLS_SIZE)


class TowerPhase:
    """A `loop.Phase` that trains a `VisionTower`."""

    name = "tower"

    def __init__(self, config: TowerConfig, vision: VisionConfig) -> None:
        torch.manual_seed(config.seed)
        self.config, self.num_steps = config, config.num_steps
        self.tower, self._heads = VisionTower(vision), _Heads(vision.hidden_size)
        self._renderers = {
            family: Renderer(stream(family, config.seed, 0), config.num_backgrounds)
            for family in (SeedFamily.TRAIN, SeedFamily.VALIDATION)
        }
        start_positions(self.tower, self._batch(SeedFamily.TRAIN, 0)[0])
        self._parameters = [*self.tower.parameters(), *self._heads.parameters()]
        layers = list(self.tower.vision_model.encoder.parameters())
        matrices = [p for p in layers if p.dim() == 2]
        chosen = {id(p) for p in matrices}
        rest = [p for p in self._parameters if id(p) not in chosen]
        self._muon = Muon(matrices, config.muon_rate)
        self._adam = torch.optim.AdamW(
            rest, config.adam_rate, betas=(0.9, 0.98), weight_decay=0.02, fused=True
        )

    def _batch(self, family: SeedFamily, step: int) -> tuple[Tensor, TileLabels]:
        """Pixels (T, 3, 112, 112) and labels of one step."""
        rng = stream(family, self.config.seed, 1, step)
        whole = step % 3 != 2
        layout = IMAGE_LAYOUT if whole else TILE_LAYOUT
        count = self.config.images_per_step if whole else self.config.tiles_per_step
        scenes = [sample_scene(rng, layout) for _ in range(count)]
        drawn = [self._renderers[family].render(rng, scene) for scene in scenes]
        images, ids = (torch.stack([torch.from_numpy(d[i]) for d in drawn]) for i in (0, 1))
        return pixel_values(images.numpy()), tile_labels(ids.numpy(), scenes)

    def _predict(self, pixels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Logits: name to (T, N, classes), and (T, 73)."""
        with torch.autocast("cpu", torch.bfloat16):
            features, last = self.tower.hidden(pixels)
            dense = self._heads.dense(features[:, 1:]).float()
            cls = self._heads.cls(self._heads.norm(last[:, 0])).float()
        parts = dense.split(list(HEAD_SIZES.values()), -1)
        return dict(zip(HEAD_SIZES, parts, strict=True)), cls

    def train_step(self, step: int) -> dict[str, float]:
        """One update of tower and heads."""
        factor = rate(step, self.num_steps, self.config.warmup_steps, self.config.decay)
        self._muon.lr = self.config.muon_rate * factor
        for group in self._adam.param_groups:
            group["lr"] = self.config.adam_rate * factor
        pixels, labels = self._batch(SeedFamily.TRAIN, step)
        dense, cls = self._predict(pixels)
        losses = {
            name: F.cross_entropy(
                logits.flatten(0, 1), labels.dense[name].flatten(), ignore_index=IGNORE
            )
            for name, logits in dense.items()
        }
        known = labels.cls.isfinite()
        target = labels.cls.nan_to_num()
        each = F.binary_cross_entropy_with_logits(cls, target, reduction="none")
        losses["cls"] = (each * known).sum(1).mean()
        total = CLS_WEIGHT * losses["cls"]
        for name, weight in LOSS_WEIGHTS.items():
            total = total + weight * losses[name]
        total.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._muon.step()
        self._adam.step()
        for parameter in self._parameters:
            parameter.grad = None
        return {f"loss_{name}": loss.item() for name, loss in losses.items()}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Accuracy on patches that carry each label, and recall and precision of [CLS]."""
        pixels, labels = self._batch(SeedFamily.VALIDATION, 0)
        dense, cls = self._predict(pixels)
        metrics = {}
        for name, logits in dense.items():
            target = labels.dense[name]
            foreground = target >= 0 if name in ("row", "column", "thumbnail") else target > 0
            metrics[name] = (logits.argmax(-1) == target)[foreground].float().mean().item()
        said = (cls > 0) & labels.cls.isfinite()
        hits = (said & (labels.cls == 1)).sum().item()
        metrics["cls_recall"] = hits / (labels.cls == 1).sum().item()
        metrics["cls_precision"] = hits / max(1, said.sum().item())
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimiser state."""
        return {
            "tower": self.tower.state_dict(),
            "heads": self._heads.state_dict(),
            "muon": self._muon.state_dict(),
            "adam": self._adam.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.tower.load_state_dict(state["tower"])
        self._heads.load_state_dict(state["heads"])
        self._muon.load_state_dict(state["muon"])
        self._adam.load_state_dict(state["adam"])
