"""FLOPs of the prefill of one prompt, for the command line, the page and results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from llava_todre.errors import TodreError
from llava_todre.flops import DecoderShape, decoder_prefill_flops
from llava_todre.stats import PruneStats


class HasDecoder(Protocol):
    """A model of ours or a stock one."""

    @property
    def decoder_shape(self) -> DecoderShape:
        """The decoder's dimensions."""


@dataclass(frozen=True)
class PrefillWork:
    """Exact FLOPs of a prefill; see :mod:`llava_todre.flops`."""

    flops: int
    """Of decoder layers, vocabulary head and the method's probes."""
    probe_flops: int
    """Of the method's probes between layers alone."""
    unpruned_flops: int
    """Of the same prompt with all visual tokens, without a method."""


def prefill_work(model: HasDecoder, stats: PruneStats) -> PrefillWork | None:
    """Return what a prompt cost, or None where the decoder's FLOPs are not known.

    Args:
        model: that has read the prompt.
        stats: of the prompt.
    """
    layers = stats.prompt_tokens_per_layer
    try:
        shape = model.decoder_shape
        pruned = decoder_prefill_flops(shape, layers)
        unpruned = decoder_prefill_flops(shape, [stats.unpruned_prompt_tokens] * len(layers))
    except TodreError:
        return None
    return PrefillWork(pruned + stats.probe_flops, stats.probe_flops, unpruned)
