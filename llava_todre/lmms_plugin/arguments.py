"""From ``--model_args`` to a pruning method, and from the seed of a run to that of one item.

lmms-eval splits ``a=1,b=x`` at commas and converts numbers and truth values; everything else
arrives as text.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from llava_todre.errors import TodreError, unknown
from llava_todre.files import parse_yaml
from llava_todre.load_options import LoadOptions
from llava_todre.pruners import PRUNERS, Pruner, create_pruner
from llava_todre.pruners.base import require_int
from llava_todre.pruners.method_file import named_or_from_file

_STAGES = ("before.", "inside.")
_LONGEST_SHOWN = 80
LOADING = [each for each in dataclasses.fields(LoadOptions) if each.name != "quantization_config"]
"""Options of loading that can be written as text."""


def text(key: str, value: Any) -> str | None:
    """Return an argument that is a name or a path; None when it was not given."""
    if isinstance(value, (bool, float)):  # its spelling is lost: "1e5" became 100000.0
        raise TodreError(f"{key} must be text, in quotes: {key}='...', got {value!r}.")
    if isinstance(value, str) and len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        return value[1:-1]
    return None if value is None else str(value)


def whole(key: str, value: Any) -> int:
    """Return an argument that is a whole number of at least 1."""
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    require_int(key, value, low=1)
    return int(value)


def flag(key: str, value: Any) -> bool:
    """Return an argument that is true or false."""
    known = {"true": True, "false": False, "none": False}
    if str(value).lower() not in known:
        raise TodreError(f"{key} must be true or false, got {value!r}.")
    return known[str(value).lower()]


def item_counts(value: Any) -> dict[str, int]:
    """Return how many items each task must have, from ``task:96;other:3000``."""
    counts: dict[str, int] = {}
    for part in filter(None, str(value).split(";")):
        task, _, count = part.rpartition(":")
        if not task:
            raise TodreError(f"num_items must be of the form task:96;other:3000, got {part!r}.")
        counts[task] = whole("num_items", count)
    return counts


def option(value: Any) -> Any:
    """Return an option of a method, converted from text.

    A list is written ``[0.5,0.875]`` or ``0.5;0.875``; text is read as YAML.
    """
    if isinstance(value, float) and value < 0 and value.is_integer():
        return int(value)  # lmms-eval reads "-1" as a float
    if not isinstance(value, str):
        return value
    if ";" in value:
        return [option(part) for part in value.split(";") if part.strip()]
    return parse_yaml(value, f"value {value[:_LONGEST_SHOWN]!r} of a model argument")


def take_loading(options: dict[str, Any]) -> dict[str, Any]:
    """Take the options of loading out of model arguments; returns those that were given."""
    found: dict[str, Any] = {}
    for each in LOADING:
        if each.name in options:
            read = flag if each.default is False else text
            found[each.name] = read(each.name, options.pop(each.name))
    return {key: value for key, value in found.items() if value is not None}


def build_pruner(
    method: str,
    options: Mapping[str, Any],
    seed: int | None,
    arguments: Iterable[str],
    default_seed: int = 0,
) -> tuple[Pruner, int]:
    """Return the method of a run, and the seed of the run.

    Args:
        method: a name of the registry, two of them joined as A+B, or a YAML file that holds
            ``method`` and any of its options.
        options: model arguments that are not the model's own; they override the file's.
        seed: of the run; when None, that of the file, or else ``default_seed``.
        arguments: names of the model's own arguments, for the message about a misspelt one.
        default_seed: where neither says.
    """
    method, settings = named_or_from_file(method)
    _check_names(method, options, arguments)
    settings |= {key: option(value) for key, value in options.items()}
    of_file = settings.pop("seed", default_seed)
    chosen = of_file if seed is None else seed
    require_int("seed", chosen)
    return with_seed(create_pruner(method, **settings), chosen), chosen


def _check_names(method: str, options: Mapping[str, Any], arguments: Iterable[str]) -> None:
    """Raise a TodreError for an option that neither the model nor the method has."""
    known = set(arguments)
    for name in method.split("+"):
        if name not in PRUNERS:
            raise unknown("method", name, PRUNERS)
        known |= {field.name for field in dataclasses.fields(PRUNERS[name])}
    for key in options:
        place = next((stage for stage in _STAGES if "+" in method and key.startswith(stage)), "")
        if key.removeprefix(place) not in known:
            raise unknown("model argument", key, known)


# ---------------------------------------------------------------------- seeds


def seed_of_lmms_eval() -> int:
    """Return lmms-eval's ``--seed``, with which it seeded torch; 0 where torch was not seeded.

    An unseeded torch starts from a number beyond 32 bits, the range of lmms-eval's seeds.
    """
    seed = torch.initial_seed()
    return seed if seed < 2**32 else 0


def draws(pruner: Pruner) -> bool:
    """Return whether the method is random, so that its seed matters."""
    if any(draws(part) for part in _parts(pruner).values()):
        return True
    # A method in which only the first token (the pivot) can be random.
    return hasattr(pruner, "seed") and getattr(pruner, "pivot", "random") == "random"


def with_seed(pruner: Pruner, seed: int) -> Pruner:
    """Return the method with this seed in every part that has one."""
    changed: dict[str, Any] = {name: with_seed(part, seed) for name, part in _parts(pruner).items()}
    if hasattr(pruner, "seed"):
        changed["seed"] = seed
    return dataclasses.replace(pruner, **changed) if changed else pruner


def item_seed(seed: int, item: object) -> int:
    """Return a seed of 56 bits for one item of a run."""
    return int.from_bytes(hashlib.sha256(f"{seed} {item}".encode()).digest()[:7], "big")


def _parts(pruner: Pruner) -> dict[str, Pruner]:
    values = {field.name: getattr(pruner, field.name) for field in dataclasses.fields(pruner)}
    return {name: value for name, value in values.items() if isinstance(value, Pruner)}
