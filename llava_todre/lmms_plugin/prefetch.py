"""Prepare the next things while the model works on one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

Given = TypeVar("Given")
Made = TypeVar("Made")


@contextmanager
def ahead(
    make: Callable[[Given], Made], things: Iterable[Given], depth: int = 2
) -> Iterator[Iterator[Made]]:
    """Give an iterator over ``make(thing)``, which one other thread computes in order.

    A thread rather than processes: decoding and resizing release the interpreter, and what
    lmms-eval knows about a document cannot be sent to a process.

    Args:
        make: what to do; its errors are raised where its result is asked for.
        things: for each of them.
        depth: how many results are asked for at a time, the next one included.
    """
    remaining = iter(things)
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
        waiting: deque[Future[Made]] = deque()

        def results() -> Iterator[Made]:
            while True:
                for thing in islice(remaining, depth - len(waiting)):
                    waiting.append(pool.submit(make, thing))
                if not waiting:
                    return
                yield waiting.popleft().result()

        try:
            yield results()
        finally:
            for future in waiting:
                future.cancel()
