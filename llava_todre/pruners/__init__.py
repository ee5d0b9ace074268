"""Pruning methods by name; one line each."""

from __future__ import annotations

import dataclasses
from typing import Any

from llava_todre.errors import unknown
from llava_todre.pruners.base import (
    NEEDS,
    VISION_NEEDS,
    About,
    LayerView,
    Merge,
    Need,
    Pruner,
    Selection,
)
from llava_todre.pruners.random import Random
from llava_todre.pruners.todre import Todre, TodreV1
from llava_todre.pruners.vanilla import Vanilla

PRUNERS: dict[str, type[Pruner]] = {
    "vanilla": Vanilla,
    "random": Random,
    "todre": Todre,
    "todre_v1": TodreV1,
}

__all__ = [
    "NEEDS",
    "PRUNERS",
    "VISION_NEEDS",
    "About",
    "LayerView",
    "Merge",
    "Need",
    "Pruner",
    "Selection",
    "create_pruner",
]


def create_pruner(method: str, **knobs: Any) -> Pruner:
    """Return the method of that name with its paper's defaults, changed by ``knobs``.

    Args:
        method: a key of :data:`PRUNERS`.
        knobs: fields of the method, e.g. ``retain_ratio=0.25``.

    Raises:
        TodreError: unknown method or knob, or a value out of range.
    """
    if method not in PRUNERS:
        raise unknown("method", method, PRUNERS)
    cls = PRUNERS[method]
    fields = {field.name for field in dataclasses.fields(cls)}
    for key in knobs:
        if key not in fields:
            raise unknown(f"option of method {method!r}:", key, fields)
    return cls(**knobs)
