"""Which documents show the same picture, told without decoding one.

A guess that is wrong costs speed, never an answer: what is computed once for several questions is
looked up by the pictures themselves.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from typing import Any

_ABOUT_PICTURES = re.compile(r"image|img|picture|video", re.IGNORECASE)


def picture_keys(documents: Any) -> Callable[[int], str | None]:
    """Return a function from ``doc_id`` to what stands for the pictures of that document.

    It is a hash of all columns that are about images or videos, as they are stored; None where
    there is no such column, or where the documents are not a table.

    Args:
        documents: a ``datasets.Dataset``, or anything else that is indexed by ``doc_id``.
    """
    names = [
        name for name in getattr(documents, "column_names", ()) if _ABOUT_PICTURES.search(name)
    ]
    if not names or not hasattr(documents, "with_format"):
        return lambda doc_id: None
    stored = documents.select_columns(names).with_format("arrow")  # undecoded

    def key(doc_id: int) -> str:
        content = json.dumps(stored[doc_id].to_pylist(), sort_keys=True, default=_hash)
        return _hash(content.encode())

    return key


def _hash(value: Any) -> str:
    content = value if isinstance(value, bytes) else repr(value).encode()
    return hashlib.blake2b(content, digest_size=12).hexdigest()
