"""Pruning methods by name; one line each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from llava_todre.errors import TodreError, unknown
from llava_todre.pruners.base import (
    NEEDS,
    VISION_NEEDS,
    About,
    DecoderView,
    Keep,
    LayerView,
    Need,
    PromptView,
    Pruner,
    Tally,
    plain,
)
from llava_todre.pruners.cdpruner import CDPruner
from llava_todre.pruners.combined import Combined
from llava_todre.pruners.dart import DART
from llava_todre.pruners.divprune import DivPrune
from llava_todre.pruners.downsample import Downsample
from llava_todre.pruners.fastervlm import FasterVLM
from llava_todre.pruners.fastv import FastV
from llava_todre.pruners.globalcom2 import GlobalCom2
from llava_todre.pruners.hiprune import HiPrune
from llava_todre.pruners.holov import HoloV
from llava_todre.pruners.observed import Observed
from llava_todre.pruners.pooling import Pooling
from llava_todre.pruners.prumerge import PruMerge, PruMergePlus
from llava_todre.pruners.pyramiddrop import PyramidDrop
from llava_todre.pruners.random import Random
from llava_todre.pruners.sparsevlm import SparseVLM, SparseVLMPlus
from llava_todre.pruners.staged import StagedPruner
from llava_todre.pruners.todre import Todre, TodreV1
from llava_todre.pruners.trimtokenator import TrimTokenator
from llava_todre.pruners.uniform import Uniform
from llava_todre.pruners.vanilla import Vanilla
from llava_todre.pruners.visionzip import VisionZip
from llava_todre.pruners.vispruner import VisPruner
from llava_todre.pruners.vtw import VTW

PRUNERS: dict[str, type[Pruner]] = {
    "vanilla": Vanilla,
    "random": Random,
    "uniform": Uniform,
    "pooling": Pooling,
    "downsample": Downsample,
    "todre": Todre,
    "todre_v1": TodreV1,
    "fastv": FastV,
    "sparsevlm": SparseVLM,
    "sparsevlm_plus": SparseVLMPlus,
    "fastervlm": FasterVLM,
    "globalcom2": GlobalCom2,
    "divprune": DivPrune,
    "vtw": VTW,
    "trimtokenator": TrimTokenator,
    "cdpruner": CDPruner,
    "visionzip": VisionZip,
    "dart": DART,
    "pyramiddrop": PyramidDrop,
    "vispruner": VisPruner,
    "prumerge": PruMerge,
    "prumerge_plus": PruMergePlus,
    "holov": HoloV,
    "hiprune": HiPrune,
}

__all__ = [
    "NEEDS",
    "PRUNERS",
    "VISION_NEEDS",
    "About",
    "Combined",
    "DecoderView",
    "Keep",
    "LayerView",
    "Need",
    "Observed",
    "PromptView",
    "Pruner",
    "Tally",
    "create_pruner",
    "resolve",
]


def create_pruner(method: str, **knobs: Any) -> Pruner:
    """Return the method of that name with its paper's defaults, changed by ``knobs``.

    Args:
        method: a key of :data:`PRUNERS`; or ``"A+B"``, Stage 1 of A with the decoder stage of B.
        knobs: fields of the method, e.g. ``retain_ratio=0.25``. Of a combination the budget is A's,
            ``newlines`` is that of both, any other field belongs to the one that has it, and
            ``before.`` or ``inside.`` in front of the name settles it where both do. A method that
            keeps a number of tokens inside the decoder must be given ``inside.retain_ratio`` or
            ``inside.retain_tokens``.

    Raises:
        TodreError: unknown method or knob, or a value out of range.
    """
    if not isinstance(method, str):
        raise TodreError(f"method {method!r} is neither a name nor a method object; pass either.")
    before, plus, inside = method.partition("+")
    if not plus:
        cls = _known(method)
        check_knobs(method, cls, knobs)
        return cls(**{key: plain(value) for key, value in knobs.items()})
    shares: dict[str, dict[str, Any]] = {"before": {}, "inside": {}}
    owned = {"before": _fields(before), "inside": _fields(inside)}
    for key, value in knobs.items():
        if key == "newlines":
            for share in shares.values():
                share.setdefault(key, value)
            continue
        place, dot, name = key.partition(".")
        if not dot or place not in shares:
            owners = [place for place in owned if key in owned[place]]
            if len(owners) == 2 and key not in ("retain_ratio", "retain_tokens"):
                raise TodreError(
                    f"option {key!r} is one of both {before!r} and {inside!r}; "
                    f"allowed: before.{key}, inside.{key}."
                )
            place, name = owners[0] if owners else "before", key
        shares[place][name] = value
    budgets = {"retain_ratio", "retain_tokens"}
    if issubclass(PRUNERS[inside], StagedPruner) and not budgets & set(shares["inside"]):
        raise TodreError(
            f"inside.retain_ratio is missing: {inside!r} has a budget of its own, counted from the "
            f"tokens that {before!r} lets in; allowed: inside.retain_ratio, inside.retain_tokens."
        )
    return Combined(
        before=create_pruner(before, **shares["before"]),
        inside=create_pruner(inside, **shares["inside"]),
    )


def resolve(method: str | Pruner, options: Mapping[str, Any]) -> Pruner:
    """Return a method by its name, or a method object, with these options.

    Raises:
        TodreError: see :func:`create_pruner`; or options for an object that combines two methods.
    """
    if not isinstance(method, Pruner):
        return create_pruner(method, **options)
    if not options:
        return method
    if isinstance(method, Combined):
        raise TodreError(
            f"options of a combination belong to its stages: expected none next to the object, or "
            f"'A+B' by name, got {', '.join(options)}."
        )
    check_knobs(type(method).__name__, type(method), options)
    return dataclasses.replace(method, **{key: plain(value) for key, value in options.items()})


def check_knobs(name: str, method: type[Pruner], knobs: Iterable[str]) -> None:
    """Raise a TodreError unless every knob is a field of the method."""
    fields = {field.name for field in dataclasses.fields(method)}
    for key in knobs:
        if key not in fields:
            raise unknown(f"option of method {name!r}:", key, fields)


def _fields(method: str) -> set[str]:
    return {field.name for field in dataclasses.fields(_known(method))}


def _known(method: str) -> type[Pruner]:
    if method not in PRUNERS:
        raise unknown("method", method, PRUNERS)
    return PRUNERS[method]
