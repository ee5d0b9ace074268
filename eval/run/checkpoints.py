"""Checkpoints on this machine: where they are, and a hash of what is in them."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from eval import ROOT

_WEIGHTS = ("*.json", "*.jinja", "*.safetensors", "*.bin", "*.model")
_LARGE_FILE = 64 * 2**20
"""Bytes; of larger files a checkpoint's fingerprint takes the size and samples."""
_SAMPLES, _SAMPLE = 512, 8192
"""Places of a large file, and bytes at each: other weights of the same shapes differ in most."""


def local_folder(pretrained: str) -> Path | None:
    """Return the folder of a checkpoint on disk, sought here and in the checkout; else None."""
    for folder in (Path(pretrained).expanduser(), ROOT / pretrained):
        if pretrained and folder.is_dir():
            return folder
    return None


def shown_path(path: Path) -> str:
    """Return a path relative to the working directory if it lies below it."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


@lru_cache
def fingerprint(folder: Path) -> str:
    """Return a hash of a checkpoint, so that results of other weights are not taken for its own."""
    files = sorted(file for pattern in _WEIGHTS for file in folder.rglob(pattern))
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder).as_posix()} {size} ".encode())
        with file.open("rb") as stream:
            if size <= _LARGE_FILE:
                digest.update(stream.read())
                continue
            for place in range(_SAMPLES):
                stream.seek((size - _SAMPLE) * place // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()[:12]
