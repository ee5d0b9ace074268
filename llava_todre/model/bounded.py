"""Work whose duration depends on a file: stopped after some seconds."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from llava_todre.errors import TodreError
from llava_todre.model.checkpoint import first_line

Result = TypeVar("Result")

SECONDS = 10.0
_MAX_TOKENS = 10_000
# Runs of letters, spaces and signs: what patterns that never end do not end on.
_PROBE = "What is this? " + "a" * 40 + " " * 40 + "!" * 40 + " 1234567890 é漢字\n"


def within(what: str, work: Callable[[], Result], seconds: float | None = None) -> Result:
    """Return what ``work`` returns.

    Args:
        what: is being done, for the message.
        work: to do, in another thread.
        seconds: it may take; :data:`SECONDS` when left out.

    Raises:
        TodreError: it took longer.
    """
    seconds = SECONDS if seconds is None else seconds
    outcome: list[tuple[bool, Any]] = []

    def run() -> None:
        try:
            outcome.append((True, work()))
        except BaseException as error:  # raised again below, in the calling thread
            outcome.append((False, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        stop = ctypes.pythonapi.PyThreadState_SetAsyncExc
        stop(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
        raise TodreError(f"{what} took longer than {seconds:g} s; is it damaged?")
    is_result, value = outcome[0]
    if not is_result:
        raise value
    result: Result = value
    return result


def check_tokenizer(where: str, tokenizer: Any) -> None:
    """Raise a TodreError unless a tokenizer makes some tokens of a line, and soon.

    Args:
        where: it was loaded from, for the message.
        tokenizer: of transformers.
    """
    what = f"the tokenizer in {where}"
    try:
        ids = within(f"{what}: one line", lambda: tokenizer(_PROBE).input_ids)
    except (TodreError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # of the library in Rust some are no Exception
        raise TodreError(f"{what} does not read one line: {first_line(error)}") from error
    if not 1 < len(ids) <= _MAX_TOKENS:
        raise TodreError(
            f"{what} makes {len(ids)} tokens of one line; expected: 2 to {_MAX_TOKENS}."
        )
