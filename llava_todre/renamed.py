"""Old public names, which work for one more release."""

from __future__ import annotations

import importlib
import sys
import warnings
from typing import Any


def renamed(old: str, new: str) -> Any:
    """Return the value of an old name for a module's ``__getattr__``, with a DeprecationWarning.

    Args:
        old: full name, for the message.
        new: full name of the replacement.
    """
    # `from package import name` looks the name up twice, at first inside the import system.
    if sys._getframe(2).f_code.co_name != "_handle_fromlist":
        warn_renamed(old, new, depth=4)
    module, _, name = new.rpartition(".")
    return getattr(importlib.import_module(module), name)


def warn_renamed(old: str, new: str, depth: int = 3) -> None:
    """Warn about an old name.

    Args:
        old: the name used.
        new: the replacement.
        depth: frames from here to the caller to warn.
    """
    warnings.warn(f"{old} is deprecated; use {new}.", DeprecationWarning, stacklevel=depth)
