"""The one error type a user can cause, and the helper that makes its messages actionable."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_LONGEST = 800
_ENDS = 300
_LONG_WORD = re.compile(r"(\S{60})\S{100,}(\S{40})")


class TodreError(ValueError):
    """Bad input: names the key, the value received and what is allowed, on one line."""

    def __init__(self, message: str) -> None:
        """Keep the message one line of readable length, whatever value it quotes."""
        line = " ".join(part.strip() for part in message.splitlines())
        if len(line) > _LONGEST:  # first what no text is made of, such as a path or data
            line = _LONG_WORD.sub(r"\1...\2", line)
        if len(line) > _LONGEST:
            line = f"{line[:_ENDS]} ... {line[-_ENDS:]}"
        super().__init__(line)


class PromptTooLongError(TodreError):
    """A prompt is longer than the model can read: bad for one question, not for the others."""


def unknown(key: str, value: object, allowed: Iterable[str]) -> TodreError:
    """Return the error for a value outside a closed list, with the closest legal name.

    Args:
        key: what was being set, e.g. ``"method"``.
        value: what was received.
        allowed: the legal names.
    """
    names = sorted(allowed)
    close = difflib.get_close_matches(str(value), names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return TodreError(f"{key} {value!r} is unknown.{hint} Allowed: {', '.join(names)}.")
