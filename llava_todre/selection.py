"""Greedy selection of a diverse subset of visual tokens.

Symbols: N candidate tokens, D feature width, K kept tokens.

ToDRE v1 and DivPrune (max-min, the farthest-point rule) and ToDRE v2 and TrimTokenator (max-sum)
differ only in the objective and in the first token, so one function serves all four.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from llava_todre.errors import TodreError, unknown

Objective = Literal["max_sum", "max_min"]

COLUMNS_AT_A_TIME = 32
"""Tokens multiplied with all others at once: two or three times the price of one where reading the
features is what takes the time. Of more, fewer turn out to be of use."""
MIN_FEATURES = 2**22
"""N * D from which on that pays, 16 MiB; fewer stay in a processor's cache."""
MAX_COSINES = 2**26
"""Most cosines computed ahead before the unused ones are forgotten, 256 MiB."""


def check_finite(features: Tensor) -> None:
    """Raise a TodreError if a row of ``features`` (N, D) contains NaN or Inf."""
    _largest_entries(features)


def unit_rows(features: Tensor) -> Tensor:
    """Return the rows of ``features`` (N, D) scaled to length one, in float32; zero rows stay zero.

    Raises:
        TodreError: a feature is NaN or infinite, for which "similar" has no meaning.
    """
    rows = features.float()
    # Dividing by the largest entry first keeps the squares of huge or tiny rows inside float32.
    rows = rows / _largest_entries(rows).clamp_min(torch.finfo(torch.float32).tiny)
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows.div_(length.clamp_min(1e-12))


def _largest_entries(features: Tensor) -> Tensor:
    """Return (N, 1) the largest magnitude of each row; raise if one is NaN or infinite."""
    # Two reductions, because features.abs() would be a copy. Both pass NaN on.
    highest, lowest = features.amax(dim=-1, keepdim=True), features.amin(dim=-1, keepdim=True)
    largest = torch.maximum(highest, -lowest)
    finite = torch.isfinite(largest)
    if not bool(finite.all()):
        raise TodreError(
            f"features: {int((~finite).sum())} of {len(features)} visual tokens contain NaN or "
            "Inf; they must be finite."
        )
    return largest


def greedy_diverse(features: Tensor, budget: int, first: int, objective: Objective) -> Tensor:
    """Pick ``budget`` mutually dissimilar tokens, starting from token ``first``.

    Each step takes the candidate whose cosine similarity to the tokens picked so far is smallest,
    where "to the set" means the largest single similarity (``max_min``, greedy k-center: ToDRE v1
    Eq. 4-5 and Algorithm 1) or the sum of all similarities (``max_sum``, greedy max-sum
    diversification: ToDRE v2 Algorithm 1). Picked tokens are masked (v1's pseudo-code omits this;
    with duplicate tokens it could pick one twice), ties go to the lowest index.

    Cosines are float32 on every device. Sums in another order differ in the last bits (about 1e-6
    per cosine), so two devices, or two numbers of threads, agree wherever the best and the second
    best score lie further apart than that. Equal rows score the same by definition and are picked
    in the order of their index everywhere.

    Args:
        features: (N, D) visual tokens, any float type; compared in float32. On a CUDA device
            float16 and bfloat16 are multiplied as they are and summed in float32, which is as
            exact and much faster; give them unconverted.
        budget: K, from 1 to N.
        first: index of the first token (the pivot), from 0 to N - 1.
        objective: ``"max_sum"`` or ``"max_min"``.

    Returns:
        (K,) int64 indices in the order they were picked.

    Raises:
        TodreError: a value is out of range or the features are not finite.
    """
    return greedy_diverse_batch([features], [budget], [first], objective)[0]


def greedy_diverse_batch(
    features: Sequence[Tensor], budgets: Sequence[int], firsts: Sequence[int], objective: Objective
) -> list[Tensor]:
    """Do :func:`greedy_diverse` for several images; on a CUDA device they share one launch.

    Args:
        features: at least one (N, D), all on one device; N may differ.
        budgets: K of each image.
        firsts: first token of each image.
        objective: the same for all.
    """
    if objective not in get_args(Objective):
        raise unknown("objective", objective, get_args(Objective))
    features = [rows.detach() for rows in features]
    for rows, budget, first in zip(features, budgets, firsts, strict=True):
        _check_range(len(rows), budget, first)
    prepared = [_rows_and_inverse_lengths(rows) for rows in features]
    if _runs_fused(features):
        from llava_todre import selection_triton

        tasks = [
            selection_triton.Task(*rows_and_lengths, budget, first)
            for rows_and_lengths, budget, first in zip(prepared, budgets, firsts, strict=True)
        ]
        return selection_triton.greedy(tasks, max_sum=objective == "max_sum")
    picked = []
    with torch.autocast(features[0].device.type, enabled=False):
        for (rows, inverse_lengths), budget, first in zip(prepared, budgets, firsts, strict=True):
            picked.append(_greedy(rows.float(), inverse_lengths, budget, first, objective))
    return [_equal_rows_in_order(*pair) for pair in zip(features, picked, strict=True)]


def _check_range(num_tokens: int, budget: int, first: int) -> None:
    if not 1 <= budget <= num_tokens:
        raise TodreError(
            f"budget {budget} is out of range; allowed: 1 to {num_tokens} (the number of tokens)."
        )
    if not 0 <= first < num_tokens:
        raise TodreError(f"first {first} is out of range; allowed: 0 to {num_tokens - 1}.")


def _rows_and_inverse_lengths(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return (N, D) rows, uncopied where that is safe, and (N,) float32 one over their lengths.

    A cosine is their product times both; rows of half precision stay so.
    """
    rows = features.float() if features.dtype == torch.float64 else features
    lengths = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32)
    # The products of longer and of shorter rows could leave float32. NaN compares as false.
    if bool(((lengths > 2.0**-40) & (lengths < 2.0**40)).all()):
        return rows, lengths.reciprocal()
    rows = unit_rows(features)
    return rows, rows.new_ones(len(rows))


def _runs_fused(features: Iterable[Tensor]) -> bool:
    return all(rows.is_cuda for rows in features) and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


# ---------------------------------------------------------------- without Triton


def _greedy(
    rows: Tensor, inverse_lengths: Tensor, budget: int, first: int, objective: Objective
) -> Tensor:
    """Pick from float32 rows (N, D), with the columns of cosines computed some steps ahead.

    A step needs the cosines of the newest pick alone. Where they are missing, those of the
    candidates that score best now are computed with them, since most are picked soon after. The
    steps are NumPy's, on the host: each is too small to be worth a thread or a launch.
    """
    num_tokens = len(rows)
    accumulate = np.add if objective == "max_sum" else np.maximum
    closeness = np.full(num_tokens, 0.0 if objective == "max_sum" else -np.inf, dtype=np.float32)
    closeness[first] = np.inf  # stays infinite under both rules
    several = rows.numel() >= MIN_FEATURES and budget > COLUMNS_AT_A_TIME
    cosines = _Cosines(rows, inverse_lengths, several)
    picked = [first]
    ahead: dict[int, Any] = {}  # (N,) cosines of tokens that were not picked yet
    computed = 0
    for step in range(1, budget):
        newest = picked[-1]
        # After the first token alone the scores say little about what comes later.
        if not several or step == 1:
            column = cosines.column(newest)
        else:
            if newest not in ahead:
                if computed * num_tokens > MAX_COSINES:
                    ahead, computed = {}, 0
                score = closeness.copy()
                score[list(ahead)] = np.inf
                count = min(COLUMNS_AT_A_TIME, num_tokens) - 1
                wanted = [newest, *score.argpartition(count)[:count].tolist()]
                ahead.update(zip(wanted, cosines.columns(wanted), strict=True))
                computed += len(wanted)
            column = ahead.pop(newest)
        accumulate(closeness, column, out=closeness)
        picked.append(int(closeness.argmin()))
        closeness[picked[-1]] = np.inf
    return torch.tensor(picked, device=rows.device)


class _Cosines:
    """Cosines of a few rows of a matrix with all of them, as arrays.

    Several columns come from oneDNN, which reads the matrix once; the BLAS behind ``@`` first
    copies it, every time, and on AMD's processors multiplies at half the speed.
    """

    def __init__(self, rows: Tensor, inverse_lengths: Tensor, several: bool) -> None:
        self.rows = rows
        self.inverse_lengths = inverse_lengths.numpy(force=True)
        onednn = rows.device.type == "cpu" and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        self.packed = rows.to_mkldnn() if several and onednn else None

    def column(self, token: int) -> Any:
        """Return (N,) the cosines of one token."""
        scale = self.inverse_lengths * self.inverse_lengths[token]
        return (self.rows @ self.rows[token]).numpy(force=True) * scale

    def columns(self, tokens: list[int]) -> Any:
        """Return (M, N) the cosines of some tokens."""
        few = self.rows[tokens]
        if self.packed is None:
            products = few @ self.rows.T
        else:
            products = torch.nn.functional.linear(self.packed, few).to_dense().T
        scale = np.outer(self.inverse_lengths[tokens], self.inverse_lengths)
        return np.multiply(products.numpy(force=True), scale, out=scale)


def _equal_rows_in_order(features: Tensor, picked: Tensor) -> Tensor:
    """Let equal rows of ``features`` (N, D) take their turns in the order of their index.

    They score the same, but a matrix product may round the same sum in two ways in two places, so
    which of them came first was chance. Exchanging equal rows changes no later step.
    """
    ends = list(zip(features[:, 0].tolist(), features[:, -1].tolist(), strict=True))
    if len(set(ends)) == len(ends):
        return picked
    count = Counter(ends)
    suspects = [token for token, pair in enumerate(ends) if count[pair] > 1]
    _, kind = torch.unique(features[suspects], dim=0, return_inverse=True)
    kind_of = dict(zip(suspects, kind.tolist(), strict=True))
    first, *others = picked.tolist()
    waiting: defaultdict[int, deque[int]] = defaultdict(deque)
    for token, name in kind_of.items():
        if token != first:
            waiting[name].append(token)
    ordered = [waiting[kind_of[pick]].popleft() if pick in kind_of else pick for pick in others]
    return torch.tensor([first, *ordered], device=picked.device)
