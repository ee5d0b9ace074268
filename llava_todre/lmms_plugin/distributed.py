"""The processes of a run: ranks, devices, memory, and those that share one model."""

from __future__ import annotations

import resource
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch

from llava_todre.errors import TodreError
from llava_todre.lmms_plugin.requests import Item, Key
from llava_todre.model.placement import spreads

_SUPPORTED = ("NO", "MULTI_CPU", "MULTI_GPU")


def join_processes() -> Any:
    """Return the accelerator: rank, number of processes, and device of this one."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    # The processes wait for each other at the end, and the slowest may need hours longer.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=1))
    accelerator = Accelerator(kwargs_handlers=[patience])
    kind = accelerator.distributed_type.value
    if kind not in _SUPPORTED:
        raise TodreError(
            f"processes must be of type {', '.join(_SUPPORTED)}, got {kind!r}: each process holds "
            "the whole model, or with tp_plan an equal part of it."
        )
    return accelerator


def placement(
    accelerator: Any, device: str | None, device_map: str | None, tp_plan: str | None = None
) -> dict[str, Any]:
    """Return where this process's model goes, as loading options.

    Args:
        accelerator: from :func:`join_processes`.
        device: requested device, or None.
        device_map: requested instead, or None.
        tp_plan: how one model is split over the processes, or None.

    Raises:
        TodreError: the request does not fit the number of processes or their devices.
    """
    if tp_plan is not None:
        return {"device": device or "auto", "device_map": device_map, "tp_plan": tp_plan}
    if device is not None and device_map is not None:
        raise TodreError(
            f"device must be left out with a device_map, got {device!r} and {device_map!r}."
        )
    if accelerator.num_processes == 1:
        return {"device": device or "auto", "device_map": device_map}
    if spreads(device_map):
        raise TodreError(
            f"device_map must be left out with {accelerator.num_processes} processes, got "
            f"{device_map!r}: each would take all GPUs."
        )
    own = accelerator.device
    wanted = (device or device_map or "auto").partition(":")[0]
    if wanted not in ("auto", own.type):
        raise TodreError(
            f"device must be {own.type!r}, where accelerate put the {accelerator.num_processes} "
            f"processes, got {wanted!r}; for CPU start them with ACCELERATE_USE_CPU=true."
        )
    return {"device": own}


def all_counts(own: Counter[str]) -> Counter[str]:
    """Return the sum of the counts of all processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return own
    return sum(_gathered(own, torch.distributed.get_world_size()), Counter())


def peak_memory_mib(device: torch.device) -> float:
    """Return the most memory this process has used so far, of all GPUs if it uses any."""
    if device.type == "cuda":
        gpus = range(torch.cuda.device_count())
        return sum(torch.cuda.max_memory_allocated(gpu) for gpu in gpus) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Team:
    """The processes that hold one model together (tensor parallelism).

    lmms-eval distributes the items over its processes, as if each held a whole model. Here every
    process runs its part of the model on all items, in the same order, and returns the answers to
    its own share, so lmms-eval scores and writes as usual. A process with a whole model is a team
    of its own.
    """

    def __init__(self, size: int, rank: int) -> None:
        """Set size and rank.

        Args:
            size: 1, or the number of all processes.
            rank: of this process; unused with a size of 1.
        """
        self.size = size
        self.writes = size == 1 or rank == 0
        """Whether this process writes the log for all."""

    def items(self, own: Mapping[Key, Item]) -> dict[Key, Item]:
        """Return the items of all, ordered as in one process: by task, then document.

        Args:
            own: the share of this process; lmms-eval gives each some item of every task.
        """
        if self.size == 1:
            return dict(own)
        visuals = {item.task: item.doc_to_visual for item in own.values()}
        lines = [(item.key, item.prompt, item.gen_kwargs) for item in own.values()]
        items: dict[Key, Item] = {}
        shares: list[list[tuple[Key, str, dict[str, Any]]]] = _gathered(lines, self.size)
        for share in shares:
            for key, prompt, gen_kwargs in share:
                items.setdefault(key, Item(*key, prompt, gen_kwargs, visuals[key[0]]))
        tasks = list(dict.fromkeys(item.task for item in items.values()))
        ordered = sorted(items.values(), key=lambda item: (tasks.index(item.task), item.key))
        return {item.key: item for item in ordered}

    def agreed(self, value: Any) -> Any:
        """Return the value of the first process."""
        if self.size == 1:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0)
        return values[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """End this process when the block fails, upon which torchrun ends the others.

        lmms-eval would print the error and exit with 0, while the others wait for an answer.
        """
        try:
            yield
        except Exception:
            if self.size == 1:
                raise
            traceback.print_exc()
            raise SystemExit(1) from None


def _gathered(own: Any, size: int) -> list[Any]:
    """Return a value of every process, by rank."""
    values: list[Any] = [None] * size
    torch.distributed.all_gather_object(values, own)
    return values
