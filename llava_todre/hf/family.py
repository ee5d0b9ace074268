"""Per-family description: tower, token layout, available quantities."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from llava_todre.errors import TodreError
from llava_todre.pruners import Pruner
from llava_todre.stage1.layout import Layout
from llava_todre.stage1.select import require_needs

Inputs = Mapping[str, Any]
Layouts = dict[str, list[Layout]]
"""By modality, "image" and "video", in the order of the tensors of pixels."""

STATES = "states"
"""What enters a layer of the tower, as it is; available next to the quantities of a family."""


def _same_layer(model: Any, quantity: str, layer: int) -> int:
    del model, quantity
    return layer


def _project(model: Any, features: Tensor) -> Tensor:
    projected: Tensor = model.model.multi_modal_projector(features)
    return projected


def _none(model: Any) -> int:
    del model
    return 0


@dataclass(frozen=True)
class Family:
    """One family of transformers' vision-language models.

    To add one: where its tower is, how the tokens of its images lie in the prompt, and what of its
    tower a method may read.
    """

    name: str
    models: tuple[str, ...]
    """Classes of transformers."""
    layouts: Callable[[Any, Inputs], Layouts]
    """Model, arguments of ``generate`` -> how its images and videos lie in the prompt."""
    tower_layers: Callable[[Any], Sequence[nn.Module]]
    """Model -> encoder layers of its tower."""
    measure: Callable[[str, nn.Module, Tensor, Inputs], Tensor]
    """Quantity, encoder layer, its input, its keyword arguments -> (patches of all images, ...)."""
    quantities: frozenset[str]
    """What ``measure`` knows, of :data:`llava_todre.pruners.base.VISION_NEEDS`."""
    inputs: tuple[str, ...]
    """Arguments of ``generate`` that describe images and videos."""
    positioned_by: Mapping[str, str] = field(default_factory=dict)
    """Those of them with one row per image or video that positions in space are computed from, and
    whether they describe an image or a video."""
    towers: tuple[str, ...] = ()
    """``model_type`` of the towers that ``measure`` knows; () where a family has one kind only."""
    feature_layer: Callable[[Any], int] | None = None
    """Model -> tower layer whose input, [CLS] first, is what the projector gets; None where methods
    that need ``vision_features`` are not served."""
    project: Callable[[Any, Tensor], Tensor] = _project
    """Model, (K, W) such features -> (K, D)."""
    proxies: Mapping[str, str] = field(default_factory=dict)
    """Quantity that the tower does not have -> the one a method gets in its place."""
    measured_at: Callable[[Any, str, int], int] = _same_layer
    """Model, quantity, requested layer -> layer of the tower at which it is measured."""
    deep_layers: Callable[[Any], int] = _none
    """Model -> first decoder layers after which more of the tower is added to the visual tokens
    (DeepStack): none may leave earlier."""

    @property
    def served(self) -> frozenset[str]:
        """What a method may need."""
        features = {"vision_features"} if self.feature_layer is not None else set[str]()
        return self.quantities | self.proxies.keys() | features | {"text_embeds"}

    def require(self, model: Any, pruner: Pruner) -> None:
        """Raise a TodreError unless a model of the family can give what a method needs."""
        require_needs(pruner, self.served, f"models of the family {self.name}")
        of_tower = sorted({need[0] if isinstance(need, tuple) else need for need in pruner.needs})
        of_tower = [need for need in of_tower if need != "text_embeds"]
        tower = model.config.vision_config.model_type if self.towers else None
        if of_tower and tower is not None and tower not in self.towers:
            raise TodreError(
                f"{type(pruner).__name__} needs {of_tower[0]}, which a tower of type {tower} does "
                f"not give; allowed: {', '.join(self.towers)}, or a method that needs nothing of "
                "the tower."
            )
