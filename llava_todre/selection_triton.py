"""The greedy rule of ``selection`` on a CUDA device, without a launch or a wait per pick.

Symbols: B images, N candidate tokens, D feature width, K kept tokens, M tokens of known cosines.

Two kernels. One multiplies rows on the tensor cores and leaves cosines in float32; all entries are
summed in the same order, so equal rows have equal cosines to the last bit and ties stay ties. The
other makes greedy steps, one program per image, for as long as the cosines of the newest pick are
at hand: a step is one row read and one minimum found.

Where all N x N cosines fit into memory they are computed first, and one launch makes all steps of
all images. Where they do not (a long video), the columns of the tokens likely to be picked next are
computed a few at a time, and the host asks once per such block how far the steps came.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_COSINES = 2**26
"""Most cosines held at a time, 256 MiB: all pairs of 8,192 tokens."""
COLUMNS_AT_A_TIME = 32
SCORES_AT_A_TIME = 4096


@dataclass(frozen=True)
class Task:
    """One image and what to pick from it."""

    rows: Tensor
    """(N, D) features; float32, float16 or bfloat16."""
    inverse_lengths: Tensor
    """(N,) float32, one over the length of each row."""
    budget: int
    """K, from 1 to N."""
    first: int


def greedy(tasks: Sequence[Task], max_sum: bool) -> list[Tensor]:
    """Return the (K,) int64 picks of each task, in the order they were picked.

    Args:
        tasks: at least one; all on one device.
        max_sum: whether similarities to the picked tokens are added; else the largest counts.
    """
    picked: list[Tensor] = []
    together: list[Task] = []
    with torch.cuda.device_of(tasks[0].rows):
        for task in tasks:
            if sum(len(other.rows) ** 2 for other in [*together, task]) > MAX_COSINES:
                picked += _all_at_once(together, max_sum)
                together = []
            if len(task.rows) ** 2 > MAX_COSINES:
                picked.append(_block_by_block(task, max_sum))
            else:
                together.append(task)
        return picked + _all_at_once(together, max_sum)


def _all_at_once(tasks: Sequence[Task], max_sum: bool) -> list[Tensor]:
    """Compute the cosines of all pairs, then make all steps of all tasks in one launch."""
    if not tasks:
        return []
    state = _State(tasks, max_sum)
    device = tasks[0].rows.device
    sizes = [len(task.rows) ** 2 for task in tasks]
    cosines = torch.empty(sum(sizes), device=device)
    for task, part in zip(tasks, cosines.split(sizes), strict=True):
        _cosines(task, torch.arange(len(task.rows), device=device), part, symmetric=True)
    state.advance(cosines, column_of=None)
    return list(state.picked.split([task.budget for task in tasks]))


def _block_by_block(task: Task, max_sum: bool) -> Tensor:
    """Compute columns of cosines when they are missing, with those likely to be missing next."""
    state = _State([task], max_sum)
    num_tokens, device = len(task.rows), task.rows.device
    capacity = max(COLUMNS_AT_A_TIME, MAX_COSINES // num_tokens)
    cosines = torch.empty(capacity, num_tokens, device=device)
    column_of = torch.full((num_tokens,), -1, dtype=torch.int32, device=device)
    held, done = 0, 1
    while done < task.budget:
        # After the first token alone the scores say little about what comes later.
        count = 1 if done == 1 else min(COLUMNS_AT_A_TIME, task.budget - done)
        if held + count > capacity:
            column_of.fill_(-1)
            held = 0
        unknown = state.closeness.masked_fill(column_of >= 0, torch.inf)
        likely = unknown.topk(count - 1, largest=False).indices
        wanted = torch.cat([state.picked[done - 1 : done], likely])
        _cosines(task, wanted, cosines[held:], symmetric=False)
        column_of[wanted] = torch.arange(held, held + count, dtype=torch.int32, device=device)
        held += count
        state.advance(cosines, column_of)
        done = int(state.num_picked)
    return state.picked


class _State:
    """What the greedy steps of some tasks leave behind."""

    def __init__(self, tasks: Sequence[Task], max_sum: bool) -> None:
        self.max_sum = max_sum
        device = tasks[0].rows.device
        sizes = [len(task.rows) for task in tasks]
        table, tokens, picks, cosines = [], 0, 0, 0
        for size, task in zip(sizes, tasks, strict=True):
            table.append([size, task.budget, tokens, picks, cosines])
            tokens, picks, cosines = tokens + size, picks + task.budget, cosines + size**2
        self.table = torch.tensor(table, device=device)
        self.num_picked = torch.ones(len(tasks), dtype=torch.int32, device=device)
        self.picked = torch.empty(picks, dtype=torch.int64, device=device)
        self.closeness = torch.full((tokens,), 0.0 if max_sum else -torch.inf, device=device)
        for task, (_, _, token, pick, _) in zip(tasks, table, strict=True):
            self.picked[pick] = task.first
            self.closeness[token + task.first] = torch.inf
        self.block = min(triton.next_power_of_2(max(sizes)), SCORES_AT_A_TIME)

    def advance(self, cosines: Tensor, column_of: Tensor | None) -> None:
        """Pick until all is picked or, with ``column_of``, until a column is missing."""
        _greedy_kernel[(len(self.table),)](
            self.table,
            self.closeness,
            self.picked,
            self.num_picked,
            cosines,
            self.table if column_of is None else column_of,
            MAX_SUM=self.max_sum,
            ALL_KNOWN=column_of is None,
            BLOCK=self.block,
            num_warps=max(1, self.block // 512),
        )


def _cosines(task: Task, wanted: Tensor, out: Tensor, symmetric: bool) -> None:
    """Write the (M, N) float32 cosines of the ``wanted`` (M,) tokens with all tokens to ``out``."""
    num_tokens, width = task.rows.shape
    tile_d = 32
    if not symmetric:
        tile_m, tile_n, num_warps = 32, 128, 4
    elif task.rows.dtype == torch.float32:
        tile_m, tile_n, num_warps = 64, 64, 4
    else:
        tile_m, tile_n, num_warps = 128, 128, 8
    grid = (triton.cdiv(len(wanted), tile_m), triton.cdiv(num_tokens, tile_n))
    _cosines_kernel[grid](
        task.rows.contiguous(),
        task.inverse_lengths,
        wanted,
        out,
        len(wanted),
        num_tokens,
        width,
        SYMMETRIC=symmetric,
        TILE_M=tile_m,
        TILE_N=tile_n,
        TILE_D=tile_d,
        num_warps=num_warps,
        num_stages=3,
    )


@triton.jit
def _cosines_kernel(
    rows,  # (N, D)
    inverse_lengths,  # (N,) float32
    wanted,  # (M,) int64
    cosines,  # (M, N) float32, written
    num_wanted,
    num_tokens,
    width,
    SYMMETRIC: tl.constexpr,  # wanted is 0 .. N - 1: each pair is computed once, written twice
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
):
    """Write the cosines of the wanted rows with all rows, one tile per program."""
    if SYMMETRIC:
        if tl.program_id(1) < tl.program_id(0):
            return
    left = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    right = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    token = tl.load(wanted + left, mask=left < num_wanted, other=0)
    other = tl.where(right < num_tokens, right, 0).to(tl.int64)
    dims = tl.arange(0, TILE_D)
    left_rows = rows + token[:, None] * width + dims[None, :]
    right_rows = rows + other[None, :] * width + dims[:, None]
    total = tl.zeros((TILE_M, TILE_N), dtype=tl.float32)
    for start in range(0, width, TILE_D):
        within = dims < width - start
        a = tl.load(left_rows + start, mask=within[None, :], other=0.0)
        b = tl.load(right_rows + start, mask=within[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    # One product of the two lengths first: it is the same for (i, j) and (j, i), to the last bit.
    scale = tl.load(inverse_lengths + token)[:, None] * tl.load(inverse_lengths + other)[None, :]
    total *= scale
    inside = (left < num_wanted)[:, None] & (right < num_tokens)[None, :]
    place = left.to(tl.int64)[:, None] * num_tokens + right[None, :]
    tl.store(cosines + place, total, mask=inside)
    if SYMMETRIC:
        mirrored = right.to(tl.int64)[:, None] * num_tokens + left[None, :]
        tl.store(cosines + mirrored, tl.trans(total), mask=tl.trans(inside))


@triton.jit
def _greedy_kernel(
    table,  # (B, 5) int64: N, K, then where tokens, picks and cosines of the image begin
    closeness,  # (sum of N,) float32, infinite once picked
    picked,  # (sum of K,) int64
    num_picked,  # (B,) int32, from 1 to K
    cosines,  # (M, N) float32 per image
    column_of,  # (sum of N,) int32: which of the M belongs to a token, or -1
    MAX_SUM: tl.constexpr,
    ALL_KNOWN: tl.constexpr,  # M = N; column_of is not read
    BLOCK: tl.constexpr,
):
    """Make greedy steps until all tokens are picked or a column is not known."""
    image = tl.program_id(0)
    num_tokens = tl.load(table + 5 * image).to(tl.int32)
    budget = tl.load(table + 5 * image + 1)
    first_token = tl.load(table + 5 * image + 2)
    closeness += first_token
    picked += tl.load(table + 5 * image + 3)
    cosines += tl.load(table + 5 * image + 4)
    step = tl.load(num_picked + image).to(tl.int64)
    column = tl.load(picked + step - 1)
    if not ALL_KNOWN:
        column = tl.load(column_of + first_token + column).to(tl.int64)
    while (step < budget) & (column >= 0):
        lowest = tl.full((BLOCK,), float("inf"), tl.float32)
        best = tl.full((BLOCK,), 0, tl.int32)
        known = cosines + column * num_tokens
        for start in range(0, num_tokens, BLOCK):
            token = start + tl.arange(0, BLOCK)
            inside = token < num_tokens
            score = tl.load(closeness + token, mask=inside, other=float("inf"))
            cosine = tl.load(known + token, mask=inside, other=0.0)
            score = score + cosine if MAX_SUM else tl.maximum(score, cosine)
            tl.store(closeness + token, score, mask=inside)
            best = tl.where(score < lowest, token, best)
            lowest = tl.minimum(score, lowest)
        newest = tl.min(tl.where(lowest == tl.min(lowest), best, num_tokens))
        tl.debug_barrier()  # all scores are written before one of them is overwritten
        tl.store(closeness + newest, float("inf"))
        tl.store(picked + step, newest.to(tl.int64))
        tl.debug_barrier()
        step += 1
        column = newest.to(tl.int64)
        if not ALL_KNOWN:
            column = tl.load(column_of + first_token + newest).to(tl.int64)
    tl.store(num_picked + image, step.to(tl.int32))
