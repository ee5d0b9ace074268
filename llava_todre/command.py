"""Errors of every command: one line on standard error, and an exit status.

It imports no torch: it must work before the slow imports.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable

from llava_todre.errors import TodreError

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it: 128 + SIGINT."""
_NOBODY_READS = 141
"""The same for SIGPIPE: the reader of our output, such as ``head -1``, is done."""
_LONGEST = 300


def run_command(program: str, call: Callable[[], int], debug: bool = False) -> int:
    """Run a command; returns its exit status, 1 for an error and 130 for Ctrl-C.

    Args:
        program: what messages begin with.
        call: does everything, imports included.
        debug: whether to raise errors, for their traceback.
    """
    try:
        try:
            return call()
        finally:  # also on the way out of argparse's --help
            sys.stdout.flush()
    except KeyboardInterrupt:
        return _end(program, "interrupted", INTERRUPTED)
    except BrokenPipeError:
        _forget_output()
        return _NOBODY_READS
    except Exception as error:
        if debug:
            raise
        return _end(program, f"error: {_one_line(error)}", 1)


def _one_line(error: Exception) -> str:
    """Return one line about an error."""
    text = " ".join(str(error).split())
    if isinstance(error, TodreError):
        return text
    if isinstance(error, OSError) and error.strerror:  # such as a full disk
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        return str(TodreError(f"{' -> '.join(map(repr, names)) or 'output'}: {error.strerror}."))
    # Unexpected, so say how to find out more.
    return f"{type(error).__name__}: {text[:_LONGEST]} (--debug shows where)"


def _end(program: str, text: str, status: int) -> int:
    with contextlib.suppress(OSError):  # standard error may be full, too
        print(f"{program}: {text}", file=sys.stderr)
    _forget_output()
    return status


def _forget_output() -> None:
    """Keep the interpreter from writing again at exit what could not be written."""
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
