"""What questions about the same image share, within a call and between calls."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from llava_todre.model.images import Picture, picture_digest
from llava_todre.pruners import Pruner
from llava_todre.settings import whole
from llava_todre.stage1.select import ImageFeatures
from llava_todre.stage2.prefix import PrefixStore


@dataclass(frozen=True, eq=False)
class Views:
    """An image, or the frames of a video, resized and cut for the vision tower."""

    pixels: Tensor
    """(V, 3, S, S), or (3, S, S) for an image that is one view."""
    size: tuple[int, int]
    """(width, height) of the image before."""


Group = Sequence[Picture | Views]
"""What stands at one placeholder of a prompt: an image, or the frames of a video."""


class ImageCache:
    """What questions about the same image need only once: its tokens, and its keys and values.

    An image is the same if it has the same pixels, or is an unchanged file. Answers are those of
    calls without a cache: methods that read the question choose their tokens afresh, and only what
    no question can change is kept. For one model, whose weights do not change meanwhile.
    """

    def __init__(self, max_images: int = 1) -> None:
        """Start empty.

        Args:
            max_images: how many images to remember between calls, the latest ones.
        """
        self.max_images = whole("max_images", max_images, 1)
        self.prefixes = PrefixStore(max_images)
        self._images: list[_Encoded] = []

    def find(self, key: Any, pruner: Pruner) -> ImageFeatures | None:
        """Return what is known about an image, and make it the latest."""
        for known in self._images:
            if known.key == key and known.pruner == pruner:
                self._images.remove(known)
                self._images.append(known)
                return known.visual
        return None

    def add(self, key: Any, pruner: Pruner, group: Group, visual: ImageFeatures) -> None:
        """Remember an image; the oldest is forgotten when the call ends."""
        self._images.append(_Encoded(key, pruner, group, visual))

    def trim(self) -> None:
        """Forget all but the latest images."""
        self._images = self._images[-self.max_images :]


@dataclass(frozen=True)
class _Encoded:
    key: Any
    pruner: Pruner
    group: Group
    """Held so that no other :class:`Views` can get the identity of one of these."""
    visual: ImageFeatures


def identity(picture: Picture | Views) -> Any:
    """Return what tells images apart within one call."""
    return os.fspath(picture) if isinstance(picture, (str, os.PathLike)) else id(picture)


def lasting_identity(picture: Any) -> Any:
    """Return what tells images apart between calls, in which their pixels may be changed."""
    if isinstance(picture, Image.Image):
        return picture_digest(picture)
    if isinstance(picture, (np.ndarray, Tensor)):
        array: Any = picture if isinstance(picture, np.ndarray) else picture.cpu().float().numpy()
        digest = hashlib.blake2b(array.tobytes(), digest_size=12).hexdigest()
        return array.shape, str(picture.dtype), digest
    if not isinstance(picture, (str, os.PathLike)):
        return id(picture)
    try:
        status = os.stat(os.path.expanduser(picture))
    except (OSError, ValueError):
        return os.fspath(picture)  # opening it says what is wrong
    return os.fspath(picture), status.st_size, status.st_mtime_ns
