"""Where a number comes from: code, versions and machine, stored with every result."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

SOURCES = ("llava_todre", "eval", "configs", "checkpoints/mini")
"""What a result depends on; changes elsewhere do not count as dirty."""
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pillow")


def provenance() -> dict[str, Any]:
    """Return commit, dirty flag, package versions, device and time of the running code."""
    root = Path(__file__).resolve().parents[1]
    return {
        "time_utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "git_commit": _git(root, "rev-parse", "HEAD"),
        "git_dirty": bool(_git(root, "status", "--porcelain", "--", *SOURCES)),
        "versions": {"python": platform.python_version()}
        | {name: _installed(name) for name in ("llava-todre", *PACKAGES)},
        "device": device_name(),
        "torch_threads": torch.get_num_threads(),
    }


def device_name() -> str:
    """Return the accelerator's name, or the processor's kind and number of cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{_processor()}, {os.cpu_count()} cores"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
