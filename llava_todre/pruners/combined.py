"""Methods made of others: Stage 1 of one and the decoder stage of another, or one observed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from llava_todre.errors import TodreError
from llava_todre.pruners.base import About, Count, Keep, LayerView, Needs, Pruner
from llava_todre.pruners.controls import Vanilla
from llava_todre.spans import NewlineRule, TokenType, VisualTokens


@dataclass(frozen=True, kw_only=True)
class Wrapper(Pruner):
    """Base: what happens before the decoder, and its budget, are those of another method."""

    about: ClassVar[About] = About(paper="-", budget_note="that of the methods it is made of")

    retain_ratio: float = field(init=False, default=1.0, repr=False)
    retain_tokens: int | None = field(init=False, default=None, repr=False)
    newlines: NewlineRule = field(init=False, default="row", repr=False)

    def __post_init__(self) -> None:
        """Take that method's rule for newlines; it has checked itself."""
        object.__setattr__(self, "newlines", self._first.newlines)

    @property
    def _first(self) -> Pruner:
        raise NotImplementedError

    @property
    def needs(self) -> Needs:
        """What that method needs."""
        return self._first.needs

    @property
    def count(self) -> Count:
        """What it promises."""
        return self._first.count

    def num_keep(self, num_tokens: int) -> int:
        """Return its number."""
        return self._first.num_keep(num_tokens)

    def will_select(self, num_tokens: int) -> bool:
        """Return whether it will."""
        return self._first.will_select(num_tokens)

    def select(self, tokens: VisualTokens, num_keep: int) -> Keep | Tensor:
        """Let it select."""
        return self._first.select(tokens, num_keep)

    def select_all(
        self, images: Sequence[VisualTokens], num_keeps: Sequence[int]
    ) -> Sequence[Keep | Tensor]:
        """Let it select."""
        return self._first.select_all(images, num_keeps)


@dataclass(frozen=True, kw_only=True)
class Combined(Wrapper):
    """``before`` selects before the decoder, ``inside`` prunes inside it; the budget is before's.

    Either may be :class:`~llava_todre.pruners.controls.Vanilla`, which leaves that stage out. A
    budget of ``inside`` counts from the tokens that enter the decoder.
    """

    before: Pruner
    """Whose ``select`` is used."""
    inside: Pruner
    """Whose ``probe_layers`` and ``at_layer`` are used."""

    def __post_init__(self) -> None:
        """Refuse a method in a place where it does nothing."""
        acts = {
            "before": self.before.selects,
            "inside": type(self.inside).at_layer is not Pruner.at_layer,
        }
        for place, does in acts.items():
            method = getattr(self, place)
            if not (does or isinstance(method, Vanilla)):
                raise TodreError(
                    f"{place} must be a method that drops tokens {place} the decoder, or vanilla, "
                    f"got {type(method).__name__}."
                )
        if self.before.newlines != self.inside.newlines:
            raise TodreError(
                f"newlines must be the same before and inside the decoder, got "
                f"{self.before.newlines!r} and {self.inside.newlines!r}."
            )
        super().__post_init__()

    @property
    def _first(self) -> Pruner:
        return self.before

    @property
    def withdraws_all(self) -> bool:
        """What ``inside`` does."""
        return self.inside.withdraws_all

    def probe_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return the layers of ``inside``."""
        return self.inside.probe_layers(num_layers)

    def at_layer(self, view: LayerView) -> Keep | Tensor | None:
        """Let ``inside`` decide."""
        return self.inside.at_layer(view)


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

    @property
    def _first(self) -> Pruner:
        return self.method

    def probe_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return all layers."""
        return tuple(range(num_layers))

    def at_layer(self, view: LayerView) -> Keep | Tensor | None:
        """Let the method decide at its own layers; show every layer."""
        decides = view.layer in self.method.probe_layers(view.num_layers)
        decision = self.method.at_layer(view) if decides else None
        spent = view.tally.flops  # what follows is not the method's work
        self.look(view)
        view.tally.flops = spent
        return decision
