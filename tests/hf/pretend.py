"""Several GPUs on a machine without one: tensors carry the name of a device, and may not mix.

All data stays on the CPU. ``device``, ``to`` and what takes a device speak of the names, and every
other function of torch refuses tensors of two devices, as it would refuse real ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_DEVICE = Tensor.device.__get__  # type: ignore[attr-defined]
_INDEXING = (Tensor.__getitem__, Tensor.__setitem__)
CPU = torch.device("cpu")


def place(module: nn.Module, device: Any) -> None:
    """Put a module and all below it on a device."""
    for tensor in (*module.parameters(), *module.buffers()):
        tensor._pretended = torch.device(device)


def device_of(tensor: Tensor) -> torch.device:
    device: torch.device = getattr(tensor, "_pretended", CPU)
    return device


class _Devices(TorchFunctionMode):
    """Checks every call and names the device of what comes out."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func == _DEVICE:
            return device_of(args[0])
        if func in (Tensor.to, Tensor.cpu):
            return _moved(func, args, kwargs)
        asked = kwargs.pop("device", None)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        devices = {device_of(tensor) for tensor in given if tensor.ndim > 0}
        if func in _INDEXING and device_of(args[0]) != CPU:
            devices -= {CPU}  # places may be given on the CPU
        if len(devices) > 1 and func != Tensor.copy_:
            raise RuntimeError(f"{func.__name__} of tensors on {sorted(map(str, devices))}")
        out = func(*args, **kwargs)
        device = torch.device(asked) if asked is not None else next(iter(devices), CPU)
        if func == Tensor.copy_:
            device = device_of(args[0])
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                tensor._pretended = device
        return out


def _moved(func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    tensor, *others = args
    target = kwargs.pop("device", None) if func == Tensor.to else CPU
    rest = []
    for other in others:
        if isinstance(other, Tensor):
            target, other = device_of(other), other.dtype
        elif isinstance(other, (str, int, torch.device)) and not isinstance(other, bool):
            target, other = other, None
        if other is not None:
            rest.append(other)
    target = device_of(tensor) if target is None else torch.device(target)
    out = tensor.to(*rest, **kwargs) if rest or kwargs else tensor
    if out is tensor and target != device_of(tensor):
        out = tensor.clone()
    out._pretended = target
    return out


@contextmanager
def pretended_devices() -> Iterator[None]:
    """Let devices be names while the block runs."""
    with _Devices():
        yield
