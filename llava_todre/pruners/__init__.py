"""Pruning methods by name; one line each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from llava_todre.errors import TodreError, unknown
from llava_todre.pruners.base import (
    NEEDS,
    VISION_NEEDS,
    About,
    Keep,
    Need,
    Pruner,
    plain,
)
from llava_todre.pruners.cdpruner import CDPruner
from llava_todre.pruners.combined import Combined, Observed, Wrapper
from llava_todre.pruners.controls import Random, Vanilla
from llava_todre.pruners.dart import DART
from llava_todre.pruners.divprune import DivPrune
from llava_todre.pruners.downsample import Downsample
from llava_todre.pruners.fastervlm import FasterVLM
from llava_todre.pruners.fastv import FastV
from llava_todre.pruners.globalcom2 import GlobalCom2
from llava_todre.pruners.grid import Pooling, Uniform
from llava_todre.pruners.hiprune import HiPrune
from llava_todre.pruners.holov import HoloV
from llava_todre.pruners.prumerge import PruMerge, PruMergePlus
from llava_todre.pruners.pyramiddrop import PyramidDrop
from llava_todre.pruners.sparsevlm import SparseVLM, SparseVLMPlus
from llava_todre.pruners.staged import StagedPruner
from llava_todre.pruners.todre import Todre, TodreV1
from llava_todre.pruners.trimtokenator import TrimTokenator
from llava_todre.pruners.view import DecoderView, LayerView, PromptView, Tally
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

BUDGET = {"retain_ratio", "retain_tokens"}

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


def create_pruner(method: str, **options: Any) -> Pruner:
    """Return the method of that name with its paper's defaults, changed by ``options``.

    Args:
        method: a key of :data:`PRUNERS`; or ``"A+B"``, Stage 1 of A with the decoder stage of B.
        options: fields of the method, e.g. ``retain_ratio=0.25``. Of a combination the budget is
            A's, ``newlines`` is that of both, any other field belongs to the one that has it, and
            ``before.`` or ``inside.`` in front of the name settles it where both do. A method that
            keeps a number of tokens inside the decoder must be given ``inside.retain_ratio`` or
            ``inside.retain_tokens``.

    Raises:
        TodreError: unknown method or option, or a value out of range.
    """
    if not isinstance(method, str):
        raise TodreError(f"method must be a name or a method object, got {method!r}.")
    before, plus, inside = method.partition("+")
    if not plus:
        return _known(method)(**_checked(method, _known(method), options))
    owned = {"before": _fields(_known(before)), "inside": _fields(_known(inside))}
    shares: dict[str, dict[str, Any]] = {"before": {}, "inside": {}}
    for key, value in options.items():
        place, dot, name = key.partition(".")
        owners = [place for place in owned if key in owned[place]]
        if dot and place in shares:
            shares[place][name] = value
        elif key == "newlines":
            for share in shares.values():
                share.setdefault(key, value)
        elif len(owners) == 2 and key not in BUDGET:
            raise TodreError(
                f"option {key!r} is that of both {before!r} and {inside!r}: expected before.{key} "
                f"or inside.{key}, got {key}."
            )
        else:
            shares[owners[0] if owners else "before"][key] = value
    if issubclass(PRUNERS[inside], StagedPruner) and not BUDGET & set(shares["inside"]):
        raise TodreError(
            f"inside.retain_ratio or inside.retain_tokens must be given, as {inside!r} has a "
            f"budget of its own, counted from the tokens that {before!r} lets in; got neither."
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
    if isinstance(method, Wrapper):
        raise TodreError(
            f"options of a combination belong to its stages: expected none next to the object, or "
            f"'A+B' by name, got {', '.join(options)}."
        )
    cls = type(method)
    return dataclasses.replace(method, **_checked(cls.__name__, cls, options))


def _checked(name: str, method: type[Pruner], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as Python has them; raise a TodreError if one is no field of the method."""
    for key in options:
        if key not in _fields(method):
            raise unknown(f"option of method {name!r}:", key, _fields(method))
    return {key: plain(value) for key, value in options.items()}


def _fields(method: type[Pruner]) -> set[str]:
    return {field.name for field in dataclasses.fields(method)}


def _known(name: str) -> type[Pruner]:
    if name not in PRUNERS:
        raise unknown("method", name, PRUNERS)
    return PRUNERS[name]
