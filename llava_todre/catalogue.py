"""What a method does, read off its class: for ``todre list`` and ``docs/methods.md``."""

from __future__ import annotations

from llava_todre.pruners import Pruner
from llava_todre.pruners.base import TEXT_NEEDS

COMBINATION = "A+B: Stage 1 of A, decoder stage of B."


def where(method: type[Pruner]) -> str:
    """Return where a method drops tokens: ``before`` or ``inside`` the decoder, or ``both``."""
    before = method.select is not Pruner.select
    inside = method.at_layer is not Pruner.at_layer
    return "both" if before and inside else "before" if before else "inside" if inside else "-"


def reads_text(method: type[Pruner]) -> bool:
    """Return whether what is dropped depends on the text of the prompt."""
    stated = method.about.reads_text
    acts_inside = method.at_layer is not Pruner.at_layer
    return (acts_inside or bool(method().needs & TEXT_NEEDS)) if stated is None else stated
