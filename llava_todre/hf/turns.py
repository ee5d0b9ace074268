"""Compiled code runs only while no call objects: whether it does is the whole process's affair."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock

import torch

_guard = Lock()
_plain = ExitStack()
_running = 0


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run what was compiled as it is, until the last of all such blocks ends."""
    global _running
    with _guard:
        _running += 1
        if _running == 1:
            _plain.enter_context(torch.compiler.set_stance("force_eager"))
    try:
        yield
    finally:
        with _guard:
            _running -= 1
            if _running == 0:
                _plain.close()
