"""Progress of a running model: the layer, the text so far, and a way to stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event
from typing import Any

import torch
from torch import Tensor, nn

Tell = Callable[[str], None]
"""Called with one line of progress."""


class Stopped(Exception):
    """Stopped before the first token."""


class Words:
    """A streamer for ``generate`` that decodes the whole answer with every token.

    Also a stopping criterion: after the first token, stopping keeps the text so far.
    """

    def __init__(self, tokenizer: Any, say: Callable[[str], None], stop: Event) -> None:
        """Start with no token.

        Args:
            tokenizer: decodes ids.
            say: called with the text so far.
            stop: ends the answer after the token at hand.
        """
        self.tokenizer, self.say, self.stop = tokenizer, say, stop
        self.ids: list[int] = []
        self.first_at: float | None = None
        """``time.perf_counter`` of the first token."""
        self._prompt_is_next = True

    def put(self, value: Tensor) -> None:
        """Receive the prompt first, then one token after the other."""
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        self.first_at = self.first_at or time.perf_counter()
        self.ids += value.flatten().tolist()
        self.say(self.tokenizer.decode(self.ids, skip_special_tokens=True).strip())

    def end(self) -> None:
        """Do nothing: ``generate`` returns the answer."""

    def __call__(self, ids: Tensor, scores: Any, **rest: Any) -> Tensor:
        """Return (B,) bool, whether to stop."""
        del scores, rest
        return torch.full((len(ids),), self.stop.is_set(), device=ids.device)


@contextmanager
def watching(
    model: nn.Module, decoder_layers: nn.ModuleList, words: Words, tell: Tell, stop: Event
) -> Iterator[None]:
    """Report every layer of the tower and of the prefill before it runs, or stop there.

    Args:
        model: holds its layers in module lists.
        decoder_layers: those of the decoder.
        words: of the answer; nothing is reported after its first token.
        tell: receives the line.
        stop: if set, :class:`Stopped` is raised in the thread that runs the model.
    """

    def before(line: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if words.first_at is not None:
                return
            if stop.is_set():
                raise Stopped
            tell(line)

        return hook

    handles = []
    for layers in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        for number, layer in enumerate(layers, start=1):
            stage = "reads the prompt" if layers is decoder_layers else "encodes the image"
            line = f"{stage}, layer {number} of {len(layers)}"
            handles.append(layer.register_forward_pre_hook(before(line)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
