"""What ``generate`` returns: the prompts as they came, and what was generated after them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Streamer:
    """Passes on what is generated, after the prompt as it was given."""

    def __init__(self, streamer: Any, prompt: Tensor) -> None:
        self.streamer = streamer
        self.ahead = [prompt.cpu()]

    def put(self, value: Tensor) -> None:
        """Pass on the prompt in place of the pruned one, and what comes after it."""
        self.streamer.put(self.ahead.pop() if self.ahead else value)

    def end(self) -> None:
        """Pass on that it is over."""
        self.streamer.end()


def with_whole_prompt(output: Any, ids: Tensor, short: int) -> Any:
    """Put the original prompt in front of what was generated, as ``generate`` returns it.

    Args:
        output: what ``generate`` made of the pruned prompts.
        ids: (B, L) the prompts as they came.
        short: length of the pruned prompts.
    """
    is_tensor = isinstance(output, Tensor)
    sequences = output if is_tensor else output.sequences
    prompt = ids.repeat_interleave(len(sequences) // len(ids), dim=0)
    whole = torch.cat([prompt.to(sequences), sequences[:, short:]], dim=1)
    if is_tensor:
        return whole
    output.sequences = whole
    return output
