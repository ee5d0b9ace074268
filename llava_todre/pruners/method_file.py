"""A method and its options in a YAML file, as in ``configs/methods``: reading and writing it."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from pathlib import Path
from typing import Any

from llava_todre.errors import TodreError, unknown
from llava_todre.files import read_mapping
from llava_todre.pruners import PRUNERS, create_pruner
from llava_todre.pruners.options import options_of


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
        raise TodreError(f"method file {method!r}: method must be a name, got {name!r}.")
    try:
        create_pruner(name, **{key: value for key, value in content.items() if key != "seed"})
    except TodreError as error:
        raise TodreError(f"method file {method!r}: {error}") from None
    return name, content


def method_yaml(name: str) -> str:
    """Return the method file of a method: every option with its default, help and range."""
    if name not in PRUNERS:
        raise unknown("method", name, PRUNERS)
    pruner = create_pruner(name)
    method = type(pruner)
    head = _comment(f"{method.about.paper}. Budget: {method.about.budget_note}.")
    head += _comment("Every option with its default; `todre generate --method THIS_FILE`.")
    blocks = [[*head, f"method: {name}"]]
    declared = options_of(method)
    for each in dataclasses.fields(method):
        lines = []
        if each.name in declared:
            option = declared[each.name]
            lines = _comment(f"{option.help} Allowed: {option.allowed(each.name)}.")
        value = getattr(pruner, each.name)
        text = value if isinstance(value, str) else json.dumps(value)
        blocks.append([*lines, f"{each.name}: {text}"])
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, 98, break_long_words=False)]
