"""The runs of the demo: every method at every ratio, a random one several times."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from llava_todre.pruners import PRUNERS, Pruner, create_pruner

RANDOM_DRAWS = 3


@dataclass(frozen=True)
class Run:
    """One pass over the questions."""

    method: str
    """A name of the registry, or two of them joined as A+B."""
    retain_ratio: float
    draw: int = 0
    """Which draw of a random method."""

    @property
    def is_random(self) -> bool:
        """Whether its Stage 1 draws tokens by chance."""
        return self.method.partition("+")[0] == "random"

    @property
    def name(self) -> str:
        """A name fit for a file."""
        draw = f"_draw{self.draw}" if self.is_random else ""
        return re.sub(r"[^\w.]", "-", f"{self.method}_{self.retain_ratio!r}{draw}")

    def pruner(self, image_index: int) -> Pruner:
        """Return the method for one image; a random method draws afresh for each."""
        key = "before.seed" if "+" in self.method else "seed"
        options = {key: 10_000 * self.draw + image_index} if self.is_random else {}
        return create_pruner(self.method, retain_ratio=self.retain_ratio, **options)


def plan(methods: Sequence[str], ratios: Sequence[float]) -> list[Run]:
    """Return the runs: the unpruned model first, then every method at every ratio.

    Among ``methods``, "all" stands for the whole registry.
    """
    named = [name for method in methods for name in (PRUNERS if method == "all" else [method])]
    runs = [Run("vanilla", 1.0)]
    # Stage 2 alone has no budget of its own.
    runs += [Run(name, 1.0) for name in dict.fromkeys(named) if name.startswith("vanilla+")]
    for ratio in dict.fromkeys(ratios):
        for method in dict.fromkeys(named):
            if not method.startswith("vanilla"):
                draws = RANDOM_DRAWS if Run(method, ratio).is_random else 1
                runs += [Run(method, ratio, draw) for draw in range(draws)]
    for run in runs:
        run.pruner(0)  # so that a wrong name or ratio is reported before anything is computed
    return runs
