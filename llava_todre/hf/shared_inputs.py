"""Inputs of a stock model for questions about images of which some have been read before.

The processor and the tower run for new images only. The prompt of a question is tokenised without
its images, and the ids that the processor writes for them are put in.

Symbols: B requests, T ids of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava_todre.generate import Memory, Request, _lasting_identity
from llava_todre.hf.encoded import EncodedImage
from llava_todre.pruners import Pruner

_BY_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids")


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
    pixels = ("pixel_values", "pixel_values_videos")
    sizes = {key: value for key, value in processed.items() if key not in (*_BY_TOKEN, *pixels)}
    whole, cut = processed["input_ids"][0].cpu(), _only_placeholder(ids, placeholders)
    if cut is None:
        return Shown(images, sizes, None, {})
    end = len(whole) - (len(ids) - cut - 1)
    if not (torch.equal(whole[:cut], ids[:cut]) and torch.equal(whole[end:], ids[cut + 1 :])):
        return Shown(images, sizes, None, {})
    written = {
        key: processed[key][0, cut:end].cpu()
        for key in ("input_ids", "mm_token_type_ids")
        if key in processed
    }
    return Shown(images, sizes, ids[:cut], written)


def shared_inputs(
    requests: Sequence[Request],
    memory: Memory,
    pruner: Pruner,
    process: Callable[[Request], Mapping[str, Any]],
    tokenise: Callable[[Request], Tensor],
    encode: Callable[..., list[EncodedImage]],
    tokenizer: Any,
    placeholders: Tensor,
) -> dict[str, Any]:
    """Return arguments of ``generate`` for a batch of requests.

    Args:
        requests: B of them.
        memory: of the model.
        pruner: the method in use.
        process: request -> what the processor returns for it, on the device.
        tokenise: request -> (T,) ids of its prompt with one placeholder per image.
        encode: what the processor returns -> the images.
        tokenizer: of the model.
        placeholders: ids that stand for images and videos.
    """
    rows: list[Mapping[str, Tensor]] = []
    shown: list[Shown] = []
    try:
        for request in requests:
            names = tuple(map(_lasting_identity, request.images))
            key = (request.is_video, tuple(request.seconds), names)
            known: Any = memory.find(key, pruner)
            row = None if known is None else known.row(tokenise(request), placeholders)
            if row is None:
                processed = process(request)
                row = {name: processed[name][0].cpu() for name in _BY_TOKEN if name in processed}
                if known is None:
                    images = encode(**processed) if request.images else []
                    known = shown_by(processed, images, tokenise(request), placeholders)
                    memory.add(key, pruner, request.images, known)
            rows.append(row)
            shown.append(known)
    finally:
        memory.trim()
    filler = tokenizer.pad_token_id or 0
    keys = [key for key in ("input_ids", "mm_token_type_ids") if key in rows[0]]
    found: dict[str, Any] = {}
    for name in keys:
        value = filler if name == "input_ids" else 0
        found[name] = _padded([row[name] for row in rows], value)
    found["attention_mask"] = _padded([torch.ones_like(row["input_ids"]) for row in rows], 0)
    for name in dict.fromkeys(name for each in shown for name in each.sizes):
        parts = [each.sizes[name] for each in shown if name in each.sizes]
        is_tensor = isinstance(parts[0], Tensor)
        found[name] = torch.cat(parts) if is_tensor else [one for part in parts for one in part]
    return found | {"encoded": [image for each in shown for image in each.images]}


def _padded(rows: Sequence[Tensor], value: int) -> Tensor:
    return pad_sequence(list(rows), True, value, padding_side="left")
