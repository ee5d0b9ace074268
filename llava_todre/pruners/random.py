"""The control every selection rule has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava_todre.pruners.base import About, Pruner, option, random_generator
from llava_todre.spans import VisualTokens


@dataclass(frozen=True, kw_only=True)
class Random(Pruner):
    """Keep a uniformly random subset, the same for equal ``seed`` and equal number of tokens."""

    about: ClassVar[About] = About(
        paper="control", budget_note="k = share of the patch tokens of an image"
    )

    seed: int = option(0, "Vary it to draw again; report several draws.")

    def select(self, tokens: VisualTokens, num_keep: int) -> Tensor:
        """Draw ``num_keep`` tokens without replacement."""
        cpu = torch.device("cpu")  # so that the draw does not depend on the device
        order = torch.randperm(len(tokens), generator=random_generator(self.seed, cpu))
        return order[:num_keep]
