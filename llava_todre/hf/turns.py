"""Calls from several threads: one at a time on a model, and compiled code only when none objects.

What a call changes for its duration is the model's (hooks, the decoder's ``forward``) or the whole
process's (whether compiled code runs).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock, RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch

_guard = Lock()
_turns: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
_plain = ExitStack()
_running = 0


@contextmanager
def turn(model: Any) -> Iterator[None]:
    """Wait until no other thread is in such a block for this model."""
    with _guard:
        lock = _turns.setdefault(model, RLock())
    with lock:
        yield


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
