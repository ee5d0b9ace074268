"""Calls from several threads: one at a time per model, uncompiled during Stage 2.

A call holds its model until it ends: it puts hooks into it, and it must not be given another method
between its images and its prompt. Threads that share a model wait for each other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock, RLock, local
from typing import Any, Generic, TypeVar, cast
from weakref import WeakKeyDictionary

import torch

Found = TypeVar("Found")
Method = TypeVar("Method", bound=Callable[..., Any])

_guard = Lock()
_turns: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
_eager = ExitStack()
_num_eager = 0


@contextmanager
def turn(model: Any) -> Iterator[None]:
    """Wait until no other thread is in such a block for this model; blocks may be nested."""
    with _guard:
        lock = _turns.setdefault(model, RLock())
    with lock:
        yield


def in_turn(method: Method) -> Method:
    """Let a method of a model run in its turn."""

    @functools.wraps(method)
    def waiting(model: Any, *args: Any, **kwargs: Any) -> Any:
        with turn(model):
            return method(model, *args, **kwargs)

    return cast(Method, waiting)


class Latest(Generic[Found]):
    """What the latest call found: of the calling thread, or of any where it has made none."""

    def __init__(self, nothing: Found) -> None:
        """Start with what is found before any call."""
        self._nothing = nothing
        self._of_any = nothing
        self._of_thread = local()

    def put(self, found: Found) -> None:
        """Record what a call of this thread has found."""
        self._of_any = self._of_thread.found = found

    def get(self) -> Found:
        """Return what this thread's latest call has found."""
        found: Found = getattr(self._of_thread, "found", self._of_any)
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        """Let a copy of a model begin without calls."""
        return type(self), (self._nothing,)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Disable ``torch.compile``, for the whole process, until the last of all such blocks ends."""
    global _num_eager
    with _guard:
        _num_eager += 1
        if _num_eager == 1:
            _eager.enter_context(torch.compiler.set_stance("force_eager"))
    try:
        yield
    finally:
        with _guard:
            _num_eager -= 1
            if _num_eager == 0:
                _eager.close()
