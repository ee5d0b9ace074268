"""lmms-eval's store of answers (``--use_cache``), told what ours depend on.

lmms-eval 0.7.3 looks answers up by the text behind ``--model_args``. The same text may name another
model or method tomorrow: a YAML file with other options, a folder with other weights, another
version of this package, or another ``--seed``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from lmms_eval.caching.response_cache import ResponseCache

from llava_todre.lmms_plugin import NAME


def tell_response_cache(fingerprint: Callable[[], tuple[str, Any]]) -> None:
    """Let stores that are opened from now on know our model by its fingerprint, too.

    Args:
        fingerprint: of the model; asked only when a store is opened, as it reads all weights.
    """
    create = getattr(ResponseCache.create, "__wrapped__", ResponseCache.create)

    @functools.wraps(create)
    def create_for(*args: Any, model: str = "", **kwargs: Any) -> ResponseCache:
        name = f"{model} {fingerprint()[0]}" if model == NAME else model
        return create(*args, model=name, **kwargs)

    ResponseCache.create = create_for
