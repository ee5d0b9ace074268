"""What a refusal must look like, whatever the front end: one line, soon, and no foreign words."""

from __future__ import annotations

import re
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

SECONDS = 60
"""A refusal takes milliseconds, or a small model's loading; this is for loaded machines."""
BYTES = 6 * 2**30
"""What a refusal may allocate; without a bound a bomb would end the machine, not the test."""
LONGEST = 850
BOMB = "a: &a [x]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + before] * 9)}]\n"
    for before, name in zip("abcdefghij", "bcdefghijk", strict=True)
)
"""YAML whose aliases stand for 3.5 thousand million values."""
DEEP = "[" * 20_000
_FOREIGN = re.compile(r"Traceback|--debug shows where|\b(Key|Type|Attribute)Error\b")


class TooSlow(BaseException):
    """Raised by the alarm; not an Exception, so that nothing under test catches it."""


@contextmanager
def soon(seconds: float = SECONDS) -> Iterator[None]:
    """Fail a block that takes longer, or more memory."""

    def ring(*_: Any) -> None:
        raise TooSlow(f"no answer within {seconds} seconds")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, limits[1]))
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def check_message(message: str) -> None:
    """Fail unless a message is one short line in our own words."""
    assert message.strip()
    assert "\n" not in message.strip()
    assert len(message) <= LONGEST, f"{len(message)} characters"
    assert not _FOREIGN.search(message), message


def refused(
    main: Callable[[list[str]], int], arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> str:
    """Run a command that must fail; returns the line that says why."""
    with soon():
        try:
            status = main(arguments)
        except SystemExit as stop:  # bad usage
            status = int(stop.code or 0)
    written = capsys.readouterr()
    assert status in (1, 2), f"exit {status}: {written.out[-300:]}{written.err[-300:]}"
    assert "Traceback" not in written.err
    said = [line for line in written.err.splitlines() if re.search(r"\berror: ", line)]
    assert len(said) == 1, written.err[-1500:]
    check_message(said[0])
    return said[0]
