"""What happened to the visual tokens of one prompt, and how long each stage took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from threading import get_ident
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Probe:
    """What a method saw after one decoder layer, and what it did."""

    layer: int
    """0-based; tokens leave from ``layer + 1`` on."""
    dropped: int
    """Prompt tokens dropped, patch and newline tokens alike."""
    text_to_visual: float | None = None
    """Share of the text's attention that goes to visual tokens (ToDRE Eq. 8), when measured."""
    visual_to_text: float | None = None
    """Share of the visual tokens' attention that goes to the text, when measured."""


@dataclass(frozen=True)
class ImageStats:
    """Stage 1 on one image or video."""

    patches: Tensor
    """(N,) int64: patch tokens that would have reached the decoder, as view * side**2 +
    row * side + column."""
    side: int
    """Patches per row and column of a view; of one that is not square, of the square around it."""
    keep_idx: Tensor
    """(K,) int64, ascending, into ``patches``: the ones that did."""
    num_newlines: int = 0
    """Newline tokens before pruning."""

    @property
    def num_tokens(self) -> int:
        """Patch tokens before pruning."""
        return len(self.patches)


@dataclass(frozen=True)
class PruneStats:
    """One prompt, from its images to the last decoder layer."""

    images: tuple[ImageStats, ...]
    newline_tokens: int
    """``image_newline`` tokens that reached the decoder."""
    probes: tuple[Probe, ...]
    prompt_tokens_per_layer: tuple[int, ...]
    """All tokens each decoder layer processed during prefill."""
    visual_tokens_per_layer: tuple[int, ...]
    """Patch and newline tokens each decoder layer processed during prefill."""
    probe_flops: int = 0
    """Of the matrix products that the method had made between decoder layers."""

    @property
    def text_tokens(self) -> int:
        """System and text tokens."""
        return self.prompt_tokens_per_layer[0] - self.visual_tokens_per_layer[0]

    @property
    def visual_tokens(self) -> int:
        """Patch tokens before pruning."""
        return sum(image.num_tokens for image in self.images)

    @property
    def kept_tokens(self) -> int:
        """Patch tokens that reached the decoder."""
        return sum(len(image.keep_idx) for image in self.images)

    @property
    def unpruned_prompt_tokens(self) -> int:
        """All tokens of the prompt before pruning: text, patch and newline tokens."""
        newlines = sum(image.num_newlines for image in self.images)
        return self.text_tokens + self.visual_tokens + newlines

    @property
    def mean_visual_tokens(self) -> float:
        """Patch and newline tokens a decoder layer processed, mean over layers.

        This is what the papers call equivalent tokens; every layer counts what it processes.
        """
        return sum(self.visual_tokens_per_layer) / len(self.visual_tokens_per_layer)

    @property
    def withdrawn_from(self) -> int | None:
        """First decoder layer that ran without any visual token, if one did."""
        if self.kept_tokens == 0:
            return None
        gone = [layer for layer, count in enumerate(self.visual_tokens_per_layer) if count == 0]
        return gone[0] if gone else None

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers and lists, for JSON."""
        return {
            "visual_tokens": self.visual_tokens,
            "kept_tokens": self.kept_tokens,
            "newline_tokens": self.newline_tokens,
            "text_tokens": self.text_tokens,
            "mean_visual_tokens": self.mean_visual_tokens,
            "probes": [asdict(probe) for probe in self.probes],
            "withdrawn_from": self.withdrawn_from,
            "visual_tokens_per_layer": list(self.visual_tokens_per_layer),
            "keep_idx": [image.keep_idx.tolist() for image in self.images],
        }


@dataclass
class Clock:
    """Adds up wall-clock milliseconds per stage of one thread; does nothing until enabled."""

    enabled: bool = False
    stages_ms: dict[str, float] = field(default_factory=dict)
    _thread: int | None = None
    """The one that is timed: others may run the model meanwhile."""

    @contextmanager
    def timing(self, enabled: bool) -> Iterator[dict[str, float]]:
        """Time the stages of a block, if enabled; gives the dictionary they are written to."""
        before = self.enabled, self.stages_ms, self._thread
        self.enabled, self.stages_ms, self._thread = enabled, {}, get_ident()
        try:
            yield self.stages_ms
        finally:
            self.enabled, self.stages_ms, self._thread = before

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a block; waits for the accelerator before and after when enabled."""
        if not self.enabled or self._thread != get_ident():
            yield
            return
        _synchronise()
        start = time.perf_counter()
        try:
            yield
        finally:
            _synchronise()
            elapsed = (time.perf_counter() - start) * 1e3
            self.stages_ms[name] = self.stages_ms.get(name, 0.0) + elapsed


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
