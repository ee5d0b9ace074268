"""A method as it is, with a function that sees every decoder layer: by default, Eq. 8 of ToDRE."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from llava_todre.pruners.base import Keep, LayerView, Pruner
from llava_todre.pruners.combined import Wrapper
from llava_todre.pruners.vanilla import Vanilla
from llava_todre.spans import TokenType


def measure(view: LayerView) -> None:
    """Measure Eq. 8 where visual tokens are left, with the text after the first of them as T."""
    if bool(view.visual.any()):
        view.attention_ratios(view.kinds == TokenType.TEXT)


@dataclass(frozen=True, kw_only=True)
class Observed(Wrapper):
    """Does what ``method`` does, and shows every layer to ``look``.

    Answers are those of ``method``; times are not.
    """

    method: Pruner = Vanilla()
    """Whose decisions are carried out."""
    look: Callable[[LayerView], object] = field(default=measure, compare=False)
    """What is done with each view, after the method."""

    def __post_init__(self) -> None:
        """Take the method's rule for newlines; the method has checked itself."""
        object.__setattr__(self, "newlines", self.method.newlines)

    @property
    def _first(self) -> Pruner:
        return self.method

    def probe_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return all layers."""
        return tuple(range(num_layers))

    def at_layer(self, view: LayerView) -> Keep | Tensor | None:
        """Let the method decide where it looks; show every layer."""
        decides = view.layer in self.method.probe_layers(view.num_layers)
        decision = self.method.at_layer(view) if decides else None
        spent = view.tally.flops  # what follows is no work of the method's
        self.look(view)
        view.tally.flops = spent
        return decision
