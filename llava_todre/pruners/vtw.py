"""VTW (arXiv 2405.05803): from one decoder layer on, do without all visual tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava_todre.errors import TodreError
from llava_todre.pruners.base import About, LayerView, Pruner, check_layer, option, round_half_up
from llava_todre.pruners.options import Option


@dataclass(frozen=True, kw_only=True)
class VTW(Pruner):
    """Withdraw all visual tokens at the entry of layer K, whatever the prompt.

    :func:`search_layer` finds K on a few calibration samples, as the authors do.
    """

    about: ClassVar[About] = About(
        paper="VTW, AAAI 2025, arXiv 2405.05803",
        budget_note="share of the decoder layers that see the visual tokens, all of them; this is "
        "their mean share over the layers",
        count="own",
        reads_text=False,
        deviations=(
            "The released code names layer 15 or 16 of 32; here the share carries K over to other "
            "depths.",
        ),
    )
    retain_ratio: float = option(
        0.5, "Share of the decoder layers that see the visual tokens.", above=0, high=1
    )
    retain_tokens: int | None = option(
        None, "Not for this method, which withdraws all visual tokens.", low=1
    )
    layer: int | None = option(
        None,
        "K: the first layer, counted from 0, without visual tokens; null takes retain_ratio of "
        "all layers.",
        low=1,
    )

    def __post_init__(self) -> None:
        """Refuse a number of tokens, which it cannot keep."""
        super().__post_init__()
        if self.retain_tokens is not None:
            raise TodreError(
                "retain_tokens must be null for vtw, which withdraws all visual tokens (give "
                f"retain_ratio or layer), got {self.retain_tokens}."
            )

    @property
    def withdraws_all(self) -> bool:
        """Whatever the question."""
        return True

    def probe_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return layer K - 1, or nothing when K is the number of layers."""
        first = self.layer or max(1, round_half_up(self.retain_ratio * num_layers))
        check_layer(first, num_layers, num_layers)
        return (first - 1,) if first < num_layers else ()

    def at_layer(self, view: LayerView) -> Tensor:
        """Withdraw all visual tokens."""
        return view.patches[:0]


def search_layer(
    logits_at: Callable[[int | None], Sequence[Tensor]],
    num_layers: int,
    eta: float = 0.003,
    first: int = 5,
) -> tuple[int, dict[int, float]]:
    """Find the first layer at which withdrawal hardly changes the next token.

    Args:
        logits_at: K -> the last token's logits (vocabulary,) of each calibration sample, visual
            tokens being withdrawn at the entry of layer K; of the full model for None. The authors
            take about 20 samples.
        num_layers: number of decoder layers.
        eta: bound on the mean over samples of KL(withdrawn || full), in nats. The authors use
            0.003 for LLaVA-1.5 7B, 0.0005 for 13B and 0.0001 for LLaVA-1.6 7B.
        first: first layer to try.

    Returns:
        K, which is ``num_layers`` if no layer meets the bound, and the divergence of each layer
        that was tried.
    """
    Option("", float, low=0).check("eta", eta)
    Option("", int, low=1, high=num_layers - 1).check("first", first)
    full = [logits.float().log_softmax(dim=-1) for logits in logits_at(None)]
    if not full:
        raise TodreError("logits_at(None) must return the logits of one sample or more, got none.")
    divergences: dict[int, float] = {}
    for layer in range(first, num_layers):
        withdrawn = [logits.float().log_softmax(dim=-1) for logits in logits_at(layer)]
        pairs = zip(withdrawn, full, strict=True)
        of_samples = [(ours.exp() * (ours - theirs)).sum() for ours, theirs in pairs]
        divergences[layer] = float(torch.stack(of_samples).mean())
        if divergences[layer] <= eta:
            return layer, divergences
    return num_layers, divergences
