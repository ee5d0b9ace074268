"""How much text and visual tokens attend to each other in one decoder layer (ToDRE Eq. 8).

That equation is Eq. 7 in the paper's first version.

Symbols: H query heads, G key heads (grouped-query attention when G < H), R query rows, N keys, E
    head width.

Only the rows that are wanted are computed, so the decoder itself can run FlashAttention or SDPA,
which never materialise the attention map.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Numbers of an attention map that exist at once. On a CPU they stay in its cache: measured at 2,975
# keys, one key head at a time is 1.4x faster than all eight; at 383 keys it is 1.5x slower.
_AT_ONCE, _AT_ONCE_CPU = 2**24, 2**18


def attention_rows(queries: Tensor, keys: Tensor, rows: Tensor, scaling: float) -> Tensor:
    """Return causal softmax attention for some query rows.

    Args:
        queries: (H, R, E) rotated queries of these rows.
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
    nothing = grouped.new_zeros(())
    products = torch.baddbmm(nothing, grouped, keys.float().transpose(1, 2), beta=0, alpha=scaling)
    logits = products.view(heads, num_rows, num_keys)
    # No row is blind to the keys up to the first; only a CPU knows which that is without waiting.
    first = 0 if rows.is_cuda or num_rows == 0 else int(rows.min()) + 1
    hidden = torch.arange(first, num_keys, device=keys.device) > rows[:, None]  # (R, N - first)
    logits[..., first:].masked_fill_(hidden, -torch.inf)
    return logits.softmax(dim=-1)


def attention_mass(
    queries: Tensor, keys: Tensor, rows: Tensor, columns: Tensor, scaling: float
) -> float:
    """Return the share of attention that rows pay to columns, mean over heads and rows.

    This is either ratio of ToDRE Eq. 8: since every softmax row sums to one, the denominator is the
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
    if len(rows) == 0:
        return 0.0
    groups, heads = len(keys), len(queries)
    per_group = heads // groups
    counted = columns.float()  # (N,); a product, because indexing by a mask would synchronise
    mass = torch.zeros((), device=keys.device)
    bound = _AT_ONCE if keys.is_cuda else _AT_ONCE_CPU
    at_once = max(1, bound // (per_group * len(rows) * keys.shape[1]))  # key heads
    for start in range(0, groups, at_once):
        stop = start + at_once
        chosen = queries[start * per_group : stop * per_group]
        mass += (attention_rows(chosen, keys[start:stop], rows, scaling) @ counted).sum()
    return float(mass.detach()) / (heads * len(rows))
