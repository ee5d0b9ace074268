"""How much text and visual tokens attend to each other in one decoder layer (ToDRE Eq. 7).

Symbols: H query heads, G key heads (grouped-query attention when G < H), R query rows, N keys, E
    head width.

Only the rows that are asked for are computed, so the decoder itself can run FlashAttention or SDPA,
which never materialise the attention map.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention_rows(queries: Tensor, keys: Tensor, rows: Tensor, scaling: float) -> Tensor:
    """Return causal softmax attention for some query rows.

    Args:
        queries: (H, R, E) rotated queries of the rows asked for.
        keys: (G, N, E) rotated keys of the whole sequence.
        rows: (R,) position of each query in the key axis; key ``j`` is visible to row ``r`` when
            ``j <= rows[r]``.
        scaling: factor on the logits, ``E ** -0.5`` for Llama.

    Returns:
        (H, R, N) float32 probabilities.
    """
    heads, num_rows, width = queries.shape
    groups, num_keys, _ = keys.shape
    grouped = queries.float().reshape(groups, heads // groups * num_rows, width)
    logits = (grouped @ keys.float().transpose(1, 2) * scaling).view(heads, num_rows, num_keys)
    hidden = torch.arange(num_keys, device=keys.device) > rows[:, None]  # (R, N)
    return logits.masked_fill_(hidden, -torch.inf).softmax(dim=-1)


def attention_mass(
    queries: Tensor, keys: Tensor, rows: Tensor, columns: Tensor, scaling: float
) -> float:
    """Return the share of attention that rows pay to columns, mean over heads and rows.

    This is either ratio of ToDRE Eq. 7: since every softmax row sums to one, the denominator is the
    number of rows.

    Args:
        queries: (H, R, E) as in :func:`attention_rows`.
        keys: (G, N, E).
        rows: (R,) positions of the queries.
        columns: (N,) bool, the keys whose attention is counted.
        scaling: factor on the logits.

    Returns:
        A number in [0, 1]; 0.0 when there are no rows or no columns.
    """
    if len(rows) == 0 or not bool(columns.any()):
        return 0.0
    groups, heads = len(keys), len(queries)
    per_group = heads // groups
    counted = columns.float()  # (N,); a product, because indexing by a mask would synchronise
    # One key head at a time bounds the memory to R x N per query head of the group.
    mass = torch.zeros((), device=keys.device)
    for group in range(groups):
        heads_of_group = queries[group * per_group : (group + 1) * per_group]
        attention = attention_rows(heads_of_group, keys[group : group + 1], rows, scaling)
        mass += (attention @ counted).sum()
    return float(mass.detach()) / (heads * len(rows))
