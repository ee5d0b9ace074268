"""Training-free visual-token pruning for LLaVA: ToDRE (arXiv 2505.18757) and what to compare with.

The names below are loaded on first use, so that ``import llava_todre`` and ``todre --help`` do not
wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from llava_todre.version import __version__

if TYPE_CHECKING:
    from llava_todre.errors import TodreError
    from llava_todre.hf import attach, detach, last_stats, prune
    from llava_todre.image_cache import ImageCache
    from llava_todre.load_options import LoadOptions
    from llava_todre.model.images import load_image
    from llava_todre.model.load import load_pretrained_model
    from llava_todre.pruners import PRUNERS, Pruner, create_pruner
    from llava_todre.request import VLM, Answer, Request
    from llava_todre.stats import PruneStats
    from llava_todre.vlm import answer, ask, load, prepare

_HOMES = {
    "TodreError": "errors",
    "ImageCache": "image_cache",
    "LoadOptions": "load_options",
    "Answer": "request",
    "Request": "request",
    "VLM": "request",
    "answer": "vlm",
    "ask": "vlm",
    "load": "vlm",
    "prepare": "vlm",
    "attach": "hf",
    "detach": "hf",
    "last_stats": "hf",
    "prune": "hf",
    "load_image": "model.images",
    "load_pretrained_model": "model.load",
    "PRUNERS": "pruners",
    "Pruner": "pruners",
    "create_pruner": "pruners",
    "PruneStats": "stats",
}
_RENAMED = {"Memory": "ImageCache"}
"""Old names, for one more release."""

__all__ = [
    "PRUNERS",
    "VLM",
    "Answer",
    "ImageCache",
    "LoadOptions",
    "PruneStats",
    "Pruner",
    "Request",
    "TodreError",
    "__version__",
    "answer",
    "ask",
    "attach",
    "create_pruner",
    "detach",
    "last_stats",
    "load",
    "load_image",
    "load_pretrained_model",
    "prepare",
    "prune",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use."""
    if name in _RENAMED:
        from llava_todre.renamed import renamed

        return renamed(f"{__name__}.{name}", f"{__name__}.{_RENAMED[name]}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
