"""The processes of a run: who is who, where each one's model goes, and how much memory it used."""

from __future__ import annotations

import resource
from collections import Counter
from datetime import timedelta
from typing import Any

import torch

from llava_todre.errors import TodreError
from llava_todre.model.placement import spreads

_RANKS = ("NO", "MULTI_CPU", "MULTI_GPU")


def join_processes() -> Any:
    """Return the accelerator: who is who among the processes of this run, and on which device."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    # The processes wait for each other at the end, and the slowest may need hours longer.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=1))
    accelerator = Accelerator(kwargs_handlers=[patience])
    kind = accelerator.distributed_type.value
    if kind not in _RANKS:
        raise TodreError(
            f"processes of type {kind!r} are not supported; allowed: {', '.join(_RANKS)}, where "
            "each process holds the whole model, or with tp_plan an equal part of it."
        )
    return accelerator


def placement(
    accelerator: Any, device: str | None, device_map: str | None, tp_plan: str | None = None
) -> dict[str, Any]:
    """Return where this process's model goes, as ``load_pretrained_model`` takes it.

    Args:
        accelerator: from :func:`join_processes`.
        device: asked for, or None.
        device_map: asked for instead, or None.
        tp_plan: how one model is split among the processes, or None.

    Raises:
        TodreError: what was asked for does not fit the number of processes or their devices.
    """
    if tp_plan is not None:
        return {"device": device or "auto", "device_map": device_map, "tp_plan": tp_plan}
    if device is not None and device_map is not None:
        raise TodreError(
            f"device {device!r} and device_map {device_map!r} were both given; allowed: one."
        )
    if accelerator.num_processes == 1:
        return {"device": device or "auto", "device_map": device_map}
    if spreads(device_map):
        raise TodreError(
            f"device_map {device_map!r} with {accelerator.num_processes} processes: each would "
            "take all GPUs; allowed: one process, or no device_map."
        )
    own = accelerator.device
    wanted = (device or device_map or "auto").partition(":")[0]
    if wanted not in ("auto", own.type):
        raise TodreError(
            f"device {wanted!r} with {accelerator.num_processes} processes that accelerate put on "
            f"{own.type!r}; for CPU set ACCELERATE_USE_CPU=true for the launcher."
        )
    return {"device": own}


def all_counts(own: Counter[str]) -> Counter[str]:
    """Return the sum of what all processes of this run count."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return own
    told: list[Counter[str]] = [Counter()] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(told, own)
    return sum(told, Counter())


def peak_memory_mib(device: torch.device) -> float:
    """Return the most memory this process has used so far, of all GPUs if it uses any."""
    if device.type == "cuda":
        gpus = range(torch.cuda.device_count())
        return sum(torch.cuda.max_memory_allocated(gpu) for gpu in gpus) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
