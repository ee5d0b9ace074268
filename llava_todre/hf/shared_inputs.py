"""Prompts about images that a stock model has read before.

The processor and the tower run for new images only. The prompt of another question is tokenised
without its images, and the ids that the processor wrote for them are put in.

Symbols: T ids of a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava_todre.hf.encoded import EncodedImage
from llava_todre.stage1.pack import padded


@dataclass(frozen=True, eq=False)
class Shown:
    """What requests that show the same images share."""

    images: Sequence[EncodedImage]
    before: Tensor | None = None
    """(T,) ids of the prompt before the only placeholder; None where there is none or several."""
    inside: Tensor | None = None
    """(T,) ids that the processor writes in its place."""

    @classmethod
    def of(
        cls, images: Sequence[EncodedImage], whole: Tensor, ids: Tensor, placeholders: Tensor
    ) -> Shown:
        """Return what can be reused of one request.

        Args:
            images: its images.
            whole: (T,) ids of its prompt as the processor writes them.
            ids: (T,) the same with one placeholder per image.
            placeholders: see :meth:`ids`.
        """
        cut = _only_placeholder(ids, placeholders)
        if cut is not None:
            end = len(whole) - (len(ids) - cut - 1)
            if torch.equal(torch.cat([whole[:cut], ids[cut : cut + 1], whole[end:]]), ids):
                return cls(images, ids[:cut], whole[cut:end])
        return cls(images)

    def ids(self, ids: Tensor, placeholders: Tensor) -> Tensor | None:
        """Return a prompt as the processor would write it; None where that is not known.

        Args:
            ids: (T,) of the prompt, with one placeholder per image.
            placeholders: ids that stand for images and videos.
        """
        cut = _only_placeholder(ids, placeholders)
        if self.before is None or self.inside is None or cut is None:
            return None
        if not torch.equal(ids[:cut], self.before):
            return None
        return torch.cat([self.before, self.inside, ids[cut + 1 :]])


def _only_placeholder(ids: Tensor, placeholders: Tensor) -> int | None:
    found = torch.isin(ids, placeholders).nonzero()[:, 0].tolist()
    return found[0] if len(found) == 1 else None


def joined(prompts: Sequence[tuple[Tensor, Shown]], pad_id: int, device: Any) -> dict[str, Any]:
    """Return arguments of ``generate`` for a batch.

    Args:
        prompts: (T,) ids of each request, and what it shows.
        pad_id: fills the shorter ones up, on the left.
        device: where the model is.
    """
    rows = [ids for ids, _ in prompts]
    return {
        "input_ids": padded(rows, pad_id).to(device),
        "attention_mask": padded([torch.ones_like(row) for row in rows], 0).to(device),
        "encoded": [image for _, shown in prompts for image in shown.images],
    }
