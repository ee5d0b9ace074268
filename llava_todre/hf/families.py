"""The model families of transformers that methods can be attached to."""

from __future__ import annotations

from typing import Any

from llava_todre.errors import TodreError
from llava_todre.hf.family import Family
from llava_todre.hf.internvl import INTERNVL
from llava_todre.hf.llava import LLAVA, LLAVA_NEXT
from llava_todre.hf.llava_video import LLAVA_NEXT_VIDEO
from llava_todre.hf.onevision import LLAVA_ONEVISION
from llava_todre.hf.original import ORIGINAL
from llava_todre.hf.qwen import QWEN

FAMILIES = (LLAVA, LLAVA_NEXT, LLAVA_NEXT_VIDEO, LLAVA_ONEVISION, *QWEN, INTERNVL)


def family_of(model: Any) -> Family:
    """Return the family of a model, or raise a TodreError that names those there are."""
    if hasattr(model, "_orig_mod"):
        raise TodreError(
            "model must be the model itself, or one whose forward is compiled, got one wrapped by "
            "torch.compile, whose generate does not run compiled."
        )
    if hasattr(model, "set_pruner"):
        raise TodreError("this model prunes by itself; call its set_pruner instead.")
    names = []
    for base in type(model).__mro__:
        names += [base.__name__, f"{base.__module__.split('.')[0]}.{base.__name__}"]
    return family_named(*names)


def family_named(*names: str) -> Family:
    """Return the family of the first class that has one.

    Args:
        names: a class and those it derives from.

    Raises:
        TodreError: none has; the error names the families there are.
    """
    for family in (*FAMILIES, ORIGINAL):
        if set(names) & set(family.models):
            return family
    known = ", ".join(name for family in (*FAMILIES, ORIGINAL) for name in family.models)
    raise TodreError(f"model must be one of {known}, got {names[0]}.")
