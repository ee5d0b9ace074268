"""Where and how a model runs: device, number format, attention implementation."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from llava_todre.errors import TodreError, unknown
from llava_todre.model.checkpoint import first_line

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ATTENTION = ("eager", "sdpa", "flash_attention_2")
TP_PLANS = ("auto",)


def spreads(device_map: Any) -> bool:
    """Whether a device map names several devices, and so needs accelerate."""
    if isinstance(device_map, dict):
        if "disk" in device_map.values():
            raise TodreError("device_map must hold cpu and GPUs only, got 'disk'.")
        return set(device_map) != {""}
    return device_map in ("auto", "balanced", "balanced_low_0", "sequential")


def check_spread(placed: dict[str, Any]) -> None:
    """Raise if accelerate put a part of a model on the CPU or disk, and another on a GPU."""
    kinds = {"cpu" if str(device) in ("cpu", "disk") else "gpu" for device in placed.values()}
    if len(kinds) > 1:
        raise TodreError(
            "device_map must keep the model on GPUs only, or on the CPU only, but it does not fit "
            "on these GPUs and would spill to the CPU; try a smaller dtype or more GPUs."
        )


def target_device(device: Any, device_map: Any) -> torch.device:
    """Return the device of the model, or of most of it when it is spread."""
    if spreads(device_map):
        if importlib.util.find_spec("accelerate") is None:
            raise TodreError(f"device_map {device_map!r} needs accelerate: pip install accelerate.")
        device = "auto"
    elif device_map is not None:
        device = device_map[""] if isinstance(device_map, dict) else device_map
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
        if target.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise TodreError(
            "device must be auto, cpu, or one that PyTorch finds here such as cuda:0, "
            f"got {device!r} ({first_line(error)})."
        ) from error
    return target


def tensor_parallel(tp_plan: Any, device: Any, device_map: Any) -> Any:
    """Return how ``transformers`` splits one model over the processes of this run.

    Args:
        tp_plan: auto, or None for a model that stays whole.
        device: must be auto: each process takes the GPU of its local rank, or the CPU.
        device_map: must be None.

    Returns:
        A ``DistributedConfig`` whose ``tp_size`` is the number of processes; or None.
    """
    if tp_plan is None:
        return None
    if tp_plan not in TP_PLANS:
        raise unknown("tp_plan", tp_plan, TP_PLANS)
    if device_map is not None or device != "auto":
        key, value = ("device", device) if device_map is None else ("device_map", device_map)
        raise TodreError(f"{key} {str(value)!r} and tp_plan {tp_plan!r} were both given; give one.")
    from transformers.distributed import DistributedConfig

    parallel = DistributedConfig(tp_plan=tp_plan)
    if parallel.tp_size < 2:
        raise TodreError(
            f"tp_plan {tp_plan!r} splits the model over several processes, but this is the only "
            "one; start them with torchrun --nproc_per_node 2 or more."
        )
    return parallel


def check_split(config: Any, parts: int) -> None:
    """Raise unless every process gets the same number of heads and of columns of the MLP."""
    for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(config, key) % parts:
            raise TodreError(
                "tp_plan must have a number of processes that divides "
                f"{key} {getattr(config, key)}, got {parts}."
            )


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """Return the dtype; None for auto."""
    name = str(dtype).removeprefix("torch.")
    if name == "auto":
        return None
    if name not in DTYPES:
        raise unknown("dtype", name, ["auto", *DTYPES])
    return DTYPES[name]


def check_attention(name: str, device: torch.device) -> None:
    """Raise unless this attention implementation exists and runs on this device."""
    if name not in ATTENTION:
        raise unknown("attn_implementation", name, ATTENTION)
    if name != "flash_attention_2":
        return
    if device.type != "cuda":
        raise TodreError(
            f"attn_implementation must be sdpa or eager on {device}, got 'flash_attention_2'."
        )
    if importlib.util.find_spec("flash_attn") is None:
        raise TodreError(
            "attn_implementation 'flash_attention_2' needs flash-attn: pip install "
            "'llava-todre[flash]'; or use sdpa."
        )
