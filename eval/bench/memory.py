"""Bytes: the peak of a call, and what the KV cache holds after it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile

_MIB = 1024**2


def peak_mib(run: Callable[[], object], model: torch.nn.Module) -> float:
    """Return the most memory that tensors take during a call, the model's own included, in MiB.

    On a GPU by PyTorch's allocator. On a CPU by adding up every allocation and release that
    PyTorch reports: exact and repeatable, which the size of the process is not.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / _MIB
    with (
        _without_stderr(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as traced,
    ):
        run()
    result = traced.profiler.kineto_results if traced.profiler is not None else None
    assert result is not None, "the profiler has ended"
    changes = [event for event in result.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    held = peak = 0
    for event in changes:
        held += event.nbytes()
        peak = max(peak, held)
    weights = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    return (sum(weights.values()) + peak) / _MIB


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Silence the profiler's own log, which goes past Python; exceptions still arrive."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
