"""Stage 1 of one method with the decoder stage of another, for ablations and new combinations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from llava_todre.errors import TodreError
from llava_todre.pruners.base import About, Count, Keep, LayerView, Needs, Pruner
from llava_todre.pruners.vanilla import Vanilla
from llava_todre.spans import NewlineRule, VisualTokens


@dataclass(frozen=True, kw_only=True)
class Wrapper(Pruner):
    """Base: what happens before the decoder, and its budget, are those of another method."""

    about: ClassVar[About] = About(paper="-", budget_note="that of the methods it is made of")

    retain_ratio: float = field(init=False, default=1.0, repr=False)
    retain_tokens: int | None = field(init=False, default=None, repr=False)
    newlines: NewlineRule = field(init=False, default="row", repr=False)

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

    Either may be :class:`~llava_todre.pruners.vanilla.Vanilla`, which leaves that stage out. A
    budget of ``inside`` counts from the tokens that enter the decoder.
    """

    before: Pruner
    """Whose ``select`` is used."""
    inside: Pruner
    """Whose ``probe_layers`` and ``at_layer`` are used."""

    def __post_init__(self) -> None:
        """Refuse a method in a place where it does nothing."""
        if not (self.before.selects or isinstance(self.before, Vanilla)):
            raise TodreError(
                f"before {type(self.before).__name__} selects nothing before the decoder; "
                "allowed: a method that does, or vanilla."
            )
        acts_inside = type(self.inside).at_layer is not Pruner.at_layer
        if not (acts_inside or isinstance(self.inside, Vanilla)):
            raise TodreError(
                f"inside {type(self.inside).__name__} drops nothing inside the decoder; "
                "allowed: a method that does, or vanilla."
            )
        if self.before.newlines != self.inside.newlines:
            raise TodreError(
                f"newlines must be the same before and inside the decoder, got "
                f"{self.before.newlines!r} and {self.inside.newlines!r}."
            )
        object.__setattr__(self, "newlines", self.before.newlines)

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
