"""Base of the methods that drop patch tokens between decoder layers, in steps of known size.

Symbols: N tokens now present, L decoder layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from llava_todre.errors import TodreError
from llava_todre.pruners.base import Keep, LayerView, Pruner, check_layer, option, round_half_up

BudgetRule = Literal["count", "mean"]


@dataclass(frozen=True, kw_only=True)
class StagedPruner(Pruner):
    """Keep a known share of the patch tokens after each of a few decoder layers.

    All images of a prompt form one pool.
    """

    budget_rule: BudgetRule = option(
        "count",
        "What `retain_ratio` is a share of: `count`, the patch tokens after the last stage; "
        "`mean`, the mean over all decoder layers, each charged with what it processes.",
        choices=get_args(BudgetRule),
    )

    def stages(self, ratio: float, num_layers: int) -> dict[int, float]:
        """Return, by layer, the share of the patch tokens that layer 0 read to keep after it.

        The shares grow with ``ratio``, are 0 at 0 and reach 1 (at 1 or above); they fall from
        layer to layer.
        """
        raise NotImplementedError

    def choose(self, view: LayerView, count: int) -> Keep | Tensor:
        """Return which ``count`` patch tokens stay; called only to drop some.

        A method that merges may keep others as well.
        """
        raise NotImplementedError

    def left(self, before: float, share: float) -> float:
        """Return what a stage of that ``share`` leaves of ``before``, itself a share."""
        del before
        return share

    def probe_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return the layers of the stages; one after the last layer would have no effect."""
        if self.retain_ratio == 1.0 and self.retain_tokens is None:
            return ()
        layers = sorted(self.stages(1.0, num_layers))
        return tuple(layer for layer in layers if layer < num_layers - 1)

    def at_layer(self, view: LayerView) -> Keep | Tensor | None:
        """Drop what the stage after this layer drops."""
        total = sum(view.visual_counts)
        wanted = sum(self.num_keep(num_patches) for num_patches in view.visual_counts)
        if wanted == total:
            return None
        ratio = wanted / total
        if self.budget_rule == "mean":
            ratio = self.ratio_for_mean(ratio, view.num_layers)
        share = self.stages(ratio, view.num_layers)[view.layer]
        count = max(1, round_half_up(share * total))
        if count >= len(view.patches):
            return None
        return self.choose(view, count)

    def mean_share(self, ratio: float, num_layers: int) -> float:
        """Return the mean share of the patch tokens that the decoder layers process."""
        stages = self.stages(ratio, num_layers)
        share, total = 1.0, 0.0
        for layer in range(num_layers):
            total += share
            share = self.left(share, stages[layer]) if layer in stages else share
        return total / num_layers

    def ratio_for_mean(self, mean: float, num_layers: int) -> float:
        """Return the ratio at which :meth:`mean_share` is ``mean``, by bisection.

        Raises:
            TodreError: the layers before the last stage alone process more than that.
        """
        least = self.mean_share(0.0, num_layers)
        if mean <= least:
            given = f"retain_ratio {self.retain_ratio:g}"
            if self.retain_tokens is not None:
                given = f"retain_tokens {self.retain_tokens} (retain_ratio {mean:.4g})"
            layers = ", ".join(map(str, self.probe_layers(num_layers)))
            raise TodreError(
                f"{given} is out of reach with budget_rule='mean': tokens leave after layers "
                f"{layers} of {num_layers}, which makes a mean above {least:.4g} of the patch "
                "tokens; allowed: a larger budget, or budget_rule='count'."
            )
        low, high = 0.0, 1.0
        while self.mean_share(high, num_layers) < mean:
            high *= 2
        for _ in range(50):
            middle = (low + high) / 2
            if self.mean_share(middle, num_layers) < mean:
                low = middle
            else:
                high = middle
        return high


@dataclass(frozen=True, kw_only=True)
class OneStagePruner(StagedPruner):
    """Drop once, at the entry of layer K."""

    layer: int = option(2, "K: the first layer, counted from 0, that works on fewer tokens.", low=1)

    def stages(self, ratio: float, num_layers: int) -> dict[int, float]:
        """Return the one stage, after layer K - 1."""
        check_layer(self.layer, num_layers - 1, num_layers)
        return {self.layer - 1: ratio}
