"""Gathering tensors sample by sample, and masks over keys of which some are padding.

Symbols: B batch, M tokens of a segment, Q query length.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
