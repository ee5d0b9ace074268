"""Which documents show the same image, found without decoding any.

A wrong guess costs speed, never an answer: what is computed once for several questions is looked up
by the images themselves.
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

_SAMPLE = 1000
_OF_IMAGES = re.compile(r"image|img|picture|video", re.IGNORECASE)


def image_keys(documents: Any) -> Callable[[int], str | None]:
    """Return a function from ``doc_id`` to a hash of the images of that document.

    It covers all columns named after images or videos, as they are stored. None where there is no
    such column, nothing in them, or where the documents are not a table.

    Args:
        documents: a ``datasets.Dataset``, or any sequence.
    """
    names = [name for name in getattr(documents, "column_names", ()) if _OF_IMAGES.search(name)]
    if not names or not hasattr(documents, "with_format"):
        return lambda doc_id: None
    stored = documents.select_columns(names).with_format("arrow")  # undecoded

    def key(doc_id: int) -> str | None:
        (content,) = stored[doc_id].to_pylist()
        if not any(content.values()):
            return None
        return _hash(json.dumps(content, sort_keys=True, default=_hash).encode())

    return key


def shared_images(
    keys: Mapping[Place, Callable[[int], str | None]], sizes: Mapping[Place, int]
) -> set[Place]:
    """Return the data sets in which several documents probably show the same image.

    Judged by their first documents, so the result is the same for any limit of a run and share of a
    process.

    Args:
        keys: by task and split, what :func:`image_keys` returned.
        sizes: number of documents.
    """
    found = {
        place: list(filter(None, map(key, range(min(sizes[place], _SAMPLE)))))
        for place, key in keys.items()
    }
    counts = Counter(key for of_place in found.values() for key in of_place)
    return {place for place, of_place in found.items() if any(counts[key] > 1 for key in of_place)}


def _hash(value: Any) -> str:
    content = value if isinstance(value, bytes) else repr(value).encode()
    return hashlib.blake2b(content, digest_size=12).hexdigest()
