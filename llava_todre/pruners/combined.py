"""Stage 1 of one method with the decoder stage of another, for ablations and new combinations."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from llava_todre.errors import TodreError
from llava_todre.pruners.base import About, Count, Keep, LayerView, Need, Pruner
from llava_todre.pruners.vanilla import Vanilla
from llava_todre.spans import NewlineRule, VisualTokens


@dataclass(frozen=True, kw_only=True)
class Combined(Pruner):
    """``before`` selects before the decoder, ``inside`` prunes inside it; the budget is before's.

    Either may be :class:`~llava_todre.pruners.vanilla.Vanilla`, which leaves that stage out. A
    budget of ``inside`` counts from the tokens that enter the decoder.
    """

    about: ClassVar[About] = About(paper="-", budget_note="that of each stage")

    before: Pruner
    """Whose ``select`` is used."""
    inside: Pruner
    """Whose ``probe_layers`` and ``at_layer`` are used."""
    retain_ratio: float = field(init=False, default=1.0, repr=False)
    retain_tokens: int | None = field(init=False, default=None, repr=False)
    newlines: NewlineRule = field(init=False, default="row", repr=False)
    """That of both stages."""

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
    def needs(self) -> Set[Need]:
        """What ``before`` needs."""
        return self.before.needs

    @property
    def withdraws_all(self) -> bool:
        """What ``inside`` does."""
        return self.inside.withdraws_all

    @property
    def count(self) -> Count:
        """What ``before`` promises."""
        return self.before.count

    def num_keep(self, num_tokens: int) -> int:
        """Return the number of ``before``."""
        return self.before.num_keep(num_tokens)

    def select(self, tokens: VisualTokens, num_keep: int) -> Keep | Tensor:
        """Let ``before`` select."""
        return self.before.select(tokens, num_keep)

    def select_all(
        self, images: Sequence[VisualTokens], num_keeps: Sequence[int]
    ) -> Sequence[Keep | Tensor]:
        """Let ``before`` select."""
        return self.before.select_all(images, num_keeps)

    def probe_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return the layers of ``inside``."""
        return self.inside.probe_layers(num_layers)

    def at_layer(self, view: LayerView) -> Keep | Tensor | None:
        """Let ``inside`` decide."""
        return self.inside.at_layer(view)
