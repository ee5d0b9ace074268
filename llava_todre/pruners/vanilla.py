"""No pruning: the row every other method is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llava_todre.errors import TodreError
from llava_todre.pruners.base import About, Pruner, option


@dataclass(frozen=True, kw_only=True)
class Vanilla(Pruner):
    """Keep every visual token in every layer."""

    about: ClassVar[About] = About(paper="no pruning", budget_note="none: every token stays")

    retain_ratio: float = option(1.0, "Fixed: every token stays.", low=1, high=1)

    def __post_init__(self) -> None:
        """Refuse a budget, which would silently be ignored."""
        if self.retain_ratio != 1.0 or self.retain_tokens is not None:
            given = self.retain_ratio if self.retain_tokens is None else self.retain_tokens
            raise TodreError(
                f"method 'vanilla' keeps every token, "
                f"but a budget of {given!r} was given; allowed: none."
            )
        super().__post_init__()
