"""A method and its options in a YAML file, as in ``configs/methods``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_todre.errors import TodreError
from llava_todre.files import read_mapping


def named_or_from_file(method: str) -> tuple[str, dict[str, Any]]:
    """Return a method's name and its options.

    Args:
        method: a name as :func:`~llava_todre.pruners.create_pruner` takes it, which is passed on;
            or a YAML file with the key ``method`` and any of its options.

    Raises:
        TodreError: the file cannot be read, or is not made of such lines.
    """
    if not method.endswith((".yaml", ".yml")):
        return method, {}
    content = read_mapping(Path(method), "method file")
    name = content.pop("method", None)
    if not isinstance(name, str):
        raise TodreError(f"method file {method!r} has no key 'method'; allowed: a name.")
    return name, {key: tuple(v) if isinstance(v, list) else v for key, v in content.items()}
