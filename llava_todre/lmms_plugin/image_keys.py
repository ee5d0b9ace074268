"""Which documents show the same picture, told without decoding one.

A guess that is wrong costs speed, never an answer: what is computed once for several questions is
looked up by the pictures themselves.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

Place = tuple[str, str]
"""Task and split."""

_LOOKED_AT = 1000
_ABOUT_PICTURES = re.compile(r"image|img|picture|video", re.IGNORECASE)


def picture_keys(documents: Any) -> Callable[[int], str | None]:
    """Return a function from ``doc_id`` to what stands for the pictures of that document.

    It is a hash of all columns that are about images or videos, as they are stored; None where
    there is no such column, nothing in them, or where the documents are not a table.

    Args:
        documents: a ``datasets.Dataset``, or any sequence.
    """
    names = [
        name for name in getattr(documents, "column_names", ()) if _ABOUT_PICTURES.search(name)
    ]
    if not names or not hasattr(documents, "with_format"):
        return lambda doc_id: None
    stored = documents.select_columns(names).with_format("arrow")  # undecoded

    def key(doc_id: int) -> str | None:
        (content,) = stored[doc_id].to_pylist()
        if not any(content.values()):
            return None
        return _hash(json.dumps(content, sort_keys=True, default=_hash).encode())

    return key


def share_pictures(
    keys: Mapping[Place, Callable[[int], str | None]], sizes: Mapping[Place, int]
) -> set[Place]:
    """Return the data sets in which a picture is likely to be shown by several documents.

    Their first documents tell: the same, whatever the limit of a run and the share of a process.

    Args:
        keys: by task and split, what :func:`picture_keys` returned.
        sizes: number of documents.
    """
    found = {
        place: [key(doc_id) for doc_id in range(min(sizes[place], _LOOKED_AT))]
        for place, key in keys.items()
    }
    counts = Counter(key for of_place in found.values() for key in of_place if key)
    return {
        place
        for place, of_place in found.items()
        if any(key is not None and counts[key] > 1 for key in of_place)
    }


def _hash(value: Any) -> str:
    content = value if isinstance(value, bytes) else repr(value).encode()
    return hashlib.blake2b(content, digest_size=12).hexdigest()
