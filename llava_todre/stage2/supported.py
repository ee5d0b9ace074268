"""Which releases of transformers run our decoders: a too new one would answer wrongly, not fail."""

from __future__ import annotations

from packaging.version import Version

from llava_todre.errors import TodreError

TOO_NEW = "5.24"
"""Its decoders take the cache as ``cache`` and do not see the one in ``past_key_values``."""


def check_transformers(version: str) -> None:
    """Refuse a release of transformers that is too new.

    Raises:
        TodreError: what is installed, and what to install.
    """
    if Version(version).release >= Version(TOO_NEW).release:
        raise TodreError(
            f"transformers must be below {TOO_NEW}, got {version}: pip install"
            f" 'transformers<{TOO_NEW}'."
        )
