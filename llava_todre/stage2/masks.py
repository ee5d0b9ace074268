"""Gather tensors sample by sample, and re-express layer 0's masks and positions for a segment.

Symbols: B batch, M tokens of a segment, Q query length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava_todre.stage2.segment import Context, LayerInputs, Segment


def gather(tensor: Tensor, index: Tensor, dim: int) -> Tensor:
    """Gather ``dim`` of ``tensor`` (B or 1, ...) at ``index`` (B, M), sample by sample."""
    dim = dim % tensor.ndim
    index = index.to(tensor.device)
    if len(index) == 1:
        return tensor.index_select(dim, index[0])
    tensor = tensor.expand(len(index), *tensor.shape[1:])
    shape = [1] * tensor.ndim
    shape[0], shape[dim] = index.shape
    target = list(tensor.shape)
    target[dim] = index.shape[1]
    return tensor.gather(dim, index.view(shape).expand(target))


def hide(mask: Tensor, valid: Tensor) -> Tensor:
    """Hide what is not valid in a (B, keys) or (B, 1, Q, keys) mask; ``valid`` (B, keys)."""
    if mask.ndim == 2:
        return mask.bool() & valid.to(mask.device)
    closed = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return mask.masked_fill(~valid[:, None, None].to(mask.device), closed)


def causal(num_queries: int, num_keys: int, valid: Tensor) -> Tensor:
    """Return a (B, 1, Q, keys) bool mask for the last ``num_queries`` of ``num_keys`` positions."""
    key = torch.arange(num_keys, device=valid.device)
    query = torch.arange(num_keys - num_queries, num_keys, device=valid.device)
    return (key <= query[:, None])[None, None] & valid[:, None, None]


def context(segment: Segment, inputs: LayerInputs, flash: bool) -> Context:
    """Return mask and positions of the prompt at the segment's positions.

    Args:
        segment: what the layer holds.
        inputs: mask and positions as built for layer 0.
        flash: whether the attention implementation takes (B, keys) masks.
    """
    mask, positions = inputs.attention_mask, segment.positions
    length = positions.shape[1]
    if mask is None and segment.ragged:
        mask = segment.valid if flash else causal(length, length, segment.valid)
    elif mask is not None:
        rows = mask if mask.ndim == 2 else gather(mask, positions, dim=2)
        mask = hide(gather(rows, positions, dim=-1), segment.valid)
    cosines, sines = (gather(table, positions, dim=1) for table in inputs.position_embeddings)
    position_ids = inputs.position_ids
    if position_ids is not None:
        # Layers rotate by the tables above. FlashAttention's check for packed sequences is the only
        # reader of the ids, and would take the gap left by the visual tokens for a boundary between
        # two sequences.
        plain = torch.arange(length, device=positions.device)
        position_ids = plain.expand(len(position_ids), -1)
    return mask, (cosines, sines), position_ids


def decode_mask(
    segment: Segment, mask: Tensor | None, new: range, num_queries: int, flash: bool
) -> Tensor | None:
    """Return layer 0's mask at the segment's positions and at ``new``, those after the prompt."""
    if mask is None and not segment.ragged:
        return None
    batch, length = segment.positions.shape
    valid = torch.cat([segment.valid, segment.valid.new_ones(batch, len(new))], dim=1)
    if mask is None:
        return valid if flash else causal(num_queries, length + len(new), valid)
    after = torch.arange(new.start, new.stop, device=segment.positions.device)
    positions = torch.cat([segment.positions, after.expand(batch, -1)], dim=1)
    return hide(gather(mask, positions, dim=-1), valid)
