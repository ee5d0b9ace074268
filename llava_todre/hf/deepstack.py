"""DeepStack: features of earlier layers of the tower, added after the first decoder layers.

``generate`` does not pass these on for a prompt given as embeddings, so a hook does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def adding(decoder: Any, visual: Tensor, features: list[Tensor]) -> Iterator[None]:
    """Let a decoder add features to the visual tokens of the prompt, however often it is repeated.

    Args:
        decoder: of a model with DeepStack.
        visual: (B, M) bool, the visual tokens of the prompts.
        features: (visual tokens of the batch, D) for each of the first layers. Where a method
            merged tokens, those are still the features of the place that stayed.
    """
    counts = visual.sum(dim=1).tolist()
    is_done = False

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal is_done
        del module
        if is_done:
            return None  # later steps have no visual tokens
        is_done = True
        copies = len(kwargs["inputs_embeds"]) // len(visual)  # beam search repeats every sample
        repeated = [
            torch.cat([part for part in each.split(counts) for _ in range(copies)])
            for each in features
        ]
        return args, kwargs | {
            "visual_pos_masks": visual.repeat_interleave(copies, dim=0),
            "deepstack_visual_embeds": repeated,
        }

    handle = decoder.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
