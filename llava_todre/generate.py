"""The old name of :mod:`llava_todre.vlm`, for one more release."""

from __future__ import annotations

from typing import Any

from llava_todre.renamed import renamed

_NAMES = ("Answer", "Memory", "Picture", "Request", "Views", "answer", "ask", "prepare")


def __getattr__(name: str) -> Any:
    """Return a name of ``llava_todre.vlm``."""
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    new = "ImageCache" if name == "Memory" else name
    return renamed(f"{__name__}.{name}", f"llava_todre.vlm.{new}")
