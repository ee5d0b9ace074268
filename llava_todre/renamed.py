"""Old public names, which work for one more release."""

from __future__ import annotations

import importlib
import warnings
from typing import Any


def renamed(old: str, new: str) -> Any:
    """Return what an old name stands for, with a DeprecationWarning to whoever uses it.

    Args:
        old: full name, for the message.
        new: full name of what to use instead.
    """
    warn_renamed(old, new, depth=4)
    module, _, name = new.rpartition(".")
    return getattr(importlib.import_module(module), name)


def warn_renamed(old: str, new: str, depth: int = 3) -> None:
    """Warn about an old name.

    Args:
        old: what was used.
        new: what to use instead.
        depth: frames from here to whoever used it.
    """
    warnings.warn(f"{old} is deprecated; use {new}.", DeprecationWarning, stacklevel=depth)
