"""A method and its options in a YAML file, as in ``configs/methods``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_todre.errors import TodreError
from llava_todre.files import read_mapping
from llava_todre.pruners import create_pruner


def named_or_from_file(method: str) -> tuple[str, dict[str, Any]]:
    """Return a method's name and its options.

    Args:
        method: a name as :func:`~llava_todre.pruners.create_pruner` takes it, which is passed on;
            or a YAML file with the key ``method`` and any of its options.

    Raises:
        TodreError: the file cannot be read, is not made of such lines, or has an option that the
            method does not take.
    """
    if not method.endswith((".yaml", ".yml")):
        return method, {}
    content = read_mapping(Path(method), "method file")
    name = content.pop("method", None)
    if not isinstance(name, str):
        raise TodreError(f"method file {method!r} has no key 'method'; allowed: a name.")
    try:
        create_pruner(name, **{key: value for key, value in content.items() if key != "seed"})
    except TodreError as error:
        raise TodreError(f"method file {method!r}: {error}") from None
    return name, content
