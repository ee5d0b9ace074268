"""A method as it is, and the two ratios of ToDRE Eq. 8 after every decoder layer besides."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from llava_todre.pruners.base import About, Count, Keep, LayerView, Need, Pruner
from llava_todre.pruners.vanilla import Vanilla
from llava_todre.spans import NewlineRule, TokenType, VisualTokens


def measure(view: LayerView) -> None:
    """Measure Eq. 8 where visual tokens are left, with the text after the first of them as T."""
    if bool(view.visual.any()):
        view.attention_ratios(view.kinds == TokenType.TEXT)


@dataclass(frozen=True, kw_only=True)
class Observed(Pruner):
    """Does what ``method`` does, and shows every layer to ``look``.

    Answers are those of ``method``; times are not.
    """

    about: ClassVar[About] = About(paper="-", budget_note="that of the method")

    method: Pruner = Vanilla()
    """Whose decisions are carried out."""
    look: Callable[[LayerView], object] = field(default=measure, compare=False)
    """What is done with each view, after the method."""
    retain_ratio: float = field(init=False, default=1.0, repr=False)
    retain_tokens: int | None = field(init=False, default=None, repr=False)
    newlines: NewlineRule = field(init=False, default="row", repr=False)

    def __post_init__(self) -> None:
        """Take the method's rule for newlines; the method has checked itself."""
        object.__setattr__(self, "newlines", self.method.newlines)

    @property
    def needs(self) -> Set[Need]:
        """What the method needs."""
        return self.method.needs

    @property
    def count(self) -> Count:
        """What the method promises."""
        return self.method.count

    @property
    def selects(self) -> bool:
        """Whether the method selects before the decoder."""
        return self.method.selects

    def will_select(self, num_tokens: int) -> bool:
        """Ask the method."""
        return self.method.will_select(num_tokens)

    def num_keep(self, num_tokens: int) -> int:
        """Return the number of the method."""
        return self.method.num_keep(num_tokens)

    def select(self, tokens: VisualTokens, num_keep: int) -> Keep | Tensor:
        """Let the method select."""
        return self.method.select(tokens, num_keep)

    def select_all(
        self, images: Sequence[VisualTokens], num_keeps: Sequence[int]
    ) -> Sequence[Keep | Tensor]:
        """Let the method select."""
        return self.method.select_all(images, num_keeps)

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
