"""Inputs of a stock model for questions about images of which some have been read before.

The processor and the tower run for new images only. The prompt of a question is tokenised without
its images, and the ids that the processor writes for them are put in.

Symbols: B requests, T ids of a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava_todre.hf.encoded import EncodedImage

_WRITTEN = ("input_ids", "mm_token_type_ids")
_NOT_SIZES = (*_WRITTEN, "attention_mask", "pixel_values", "pixel_values_videos")


@dataclass(frozen=True, eq=False)
class Shown:
    """What requests that show the same images have in common."""

    images: Sequence[EncodedImage]
    sizes: Mapping[str, Any]
    """What else the processor says of the images, e.g. their grids."""
    ahead: Tensor | None
    """(T,) ids of the prompt before the only placeholder; None where there is none or several."""
    written: Mapping[str, Tensor]
    """(T,) what the processor writes in its place: ids, and their types."""

    def row(self, ids: Tensor, placeholders: Tensor) -> dict[str, Tensor] | None:
        """Return a prompt (T,) with everything that the processor writes; None if not known.

        Args:
            ids: (T,) of the prompt, with one placeholder per image.
            placeholders: ids that stand for images and videos.
        """
        cut = _only_placeholder(ids, placeholders)
        if self.ahead is None or cut is None or not torch.equal(ids[:cut], self.ahead):
            return None
        plain = {"input_ids": ids, "mm_token_type_ids": torch.zeros_like(ids)}
        return {
            key: torch.cat([plain[key][:cut], inside, plain[key][cut + 1 :]])
            for key, inside in self.written.items()
        }


def _only_placeholder(ids: Tensor, placeholders: Tensor) -> int | None:
    found = torch.isin(ids, placeholders).nonzero()[:, 0].tolist()
    return found[0] if len(found) == 1 else None


def shown_by(
    processed: Mapping[str, Any],
    images: Sequence[EncodedImage],
    ids: Tensor,
    placeholders: Tensor,
) -> Shown:
    """Return what other requests about the images of a request can take over.

    Args:
        processed: what the processor returns for it.
        images: its images, encoded.
        ids: (T,) of its prompt with one placeholder per image.
        placeholders: see :meth:`Shown.row`.
    """
    sizes = {key: value for key, value in processed.items() if key not in _NOT_SIZES}
    rows, cut = by_token(processed), _only_placeholder(ids, placeholders)
    whole = rows["input_ids"]
    if cut is not None:
        end = len(whole) - (len(ids) - cut - 1)
        if torch.equal(torch.cat([whole[:cut], ids[cut : cut + 1], whole[end:]]), ids):
            inside = {key: row[cut:end] for key, row in rows.items()}
            return Shown(images, sizes, ids[:cut], inside)
    return Shown(images, sizes, None, {})


def by_token(processed: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the (T,) ids of the only prompt that was processed, and their types if any."""
    return {key: processed[key][0].cpu() for key in _WRITTEN if key in processed}


def joined(prompts: Sequence[tuple[Mapping[str, Tensor], Shown]], pad_id: int) -> dict[str, Any]:
    """Return arguments of ``generate`` for a batch, its ids padded on the left.

    Args:
        prompts: (T,) ids of each request, and what it shows.
        pad_id: fills the shorter ones up.
    """
    rows, shown = [row for row, _ in prompts], [each for _, each in prompts]
    found: dict[str, Any] = {}
    for key in rows[0]:
        value = pad_id if key == "input_ids" else 0
        found[key] = _padded([row[key] for row in rows], value)
    found["attention_mask"] = _padded([torch.ones_like(row["input_ids"]) for row in rows], 0)
    for key in dict.fromkeys(key for each in shown for key in each.sizes):
        parts = [each.sizes[key] for each in shown if key in each.sizes]
        is_tensor = isinstance(parts[0], Tensor)
        found[key] = torch.cat(parts) if is_tensor else [one for part in parts for one in part]
    return found | {"encoded": [image for each in shown for image in each.images]}


def _padded(rows: Sequence[Tensor], value: int) -> Tensor:
    return pad_sequence(list(rows), True, value, padding_side="left")
