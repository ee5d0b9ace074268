"""The part of a prompt that questions about the same images share, computed once.

[system | visual tokens] comes first and attention is causal, so its keys and values do not depend
on the question behind it. A question then runs only its own rows (POPE asks 18 questions about an
image, GQA about 30).

Symbols: B batch, P positions up to the last visual token, G key heads, E head width.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache

from llava_todre.errors import TodreError
from llava_todre.pruners import Pruner
from llava_todre.spans import TokenType
from llava_todre.stage1.pack import SplicedPrompt
from llava_todre.stage1.select import PrunedImage

Layers = tuple[tuple[Tensor, Tensor], ...]
"""Keys and values, (1, G, P, E) each, of every layer."""


@dataclass(frozen=True, eq=False)
class _Prefix:
    prefix_ids: tuple[int, ...]
    visuals: tuple[PrunedImage, ...]
    layers: Layers

    def serves(self, prompt: SplicedPrompt) -> bool:
        same_visuals = len(self.visuals) == len(prompt.visuals) and all(
            ours is theirs for ours, theirs in zip(self.visuals, prompt.visuals, strict=True)
        )
        return same_visuals and self.prefix_ids == prompt.prefix_ids


class PrefixStore:
    """Keys and values of the prompts' first parts, kept between calls of one model.

    Its weights must not change meanwhile.
    """

    def __init__(self, max_prefixes: int = 1) -> None:
        """Start empty.

        Args:
            max_prefixes: how many to keep; the one that was not used for longest goes first. One
                takes P * layers * G * E * 2 numbers: in half precision 174 MiB for 348 tokens of
                a 7B, 1.4 GiB for 2,900.
        """
        if max_prefixes < 1:
            raise TodreError(f"max_prefixes {max_prefixes} is out of range; allowed: 1 or more.")
        self.max_prefixes = max_prefixes
        self.hits = 0
        """Prompts that were served from the store."""
        self._prefixes: list[_Prefix] = []
        self._model: weakref.ref[Any] | None = None

    def claim(self, model: Any) -> None:
        """Take note of whose keys these are.

        Raises:
            TodreError: they are another model's.
        """
        if self._model is None:
            self._model = weakref.ref(model)
        if self._model() is not model:
            raise TodreError("the memory of one model was given to another; allowed: one for each.")

    def __len__(self) -> int:
        return len(self._prefixes)

    @property
    def num_bytes(self) -> int:
        """What the stored keys and values take."""
        layers = (layer for prefix in self._prefixes for layer in prefix.layers)
        return sum(keys.nbytes + values.nbytes for keys, values in layers)

    def cache(
        self,
        prompts: Sequence[SplicedPrompt],
        config: PreTrainedConfig,
        compute: Callable[[Tensor], Layers],
    ) -> DynamicCache:
        """Return a cache that holds the first part of every prompt, padded on the left.

        Each is computed by itself, so that its numbers do not depend on its company.

        Args:
            prompts: B of them.
            config: of the decoder.
            compute: (1, P, D) embeddings -> their keys and values.
        """
        latest, chosen = list(self._prefixes), []
        for prompt in prompts:
            found = next((known for known in latest if known.serves(prompt)), None)
            if found is None:
                layers = compute(prompt.embeds[None, : prompt.prefix_len])
                found = _Prefix(prompt.prefix_ids, prompt.visuals, layers)
            else:
                self.hits += 1
                latest.remove(found)
            latest.append(found)
            chosen.append(found)
        self._prefixes = latest[-self.max_prefixes :]
        length = max(prompt.prefix_len for prompt in prompts)
        cache = DynamicCache(config=config)
        for index in range(len(chosen[0].layers)):
            keys, values = (
                _stacked([prefix.layers[index][part] for prefix in chosen], length)
                for part in (0, 1)
            )
            cache.update(keys, values, index)
        return cache


def _stacked(rows: list[Tensor], length: int) -> Tensor:
    """Return (B, G, length, E), each (1, G, P, E) padded with zeros on the left."""
    if all(row is rows[0] for row in rows):
        return rows[0].expand(len(rows), -1, -1, -1)
    return torch.cat([pad(row, (0, 0, length - row.shape[2], 0)) for row in rows])


def may_share(prompts: Sequence[SplicedPrompt], pruner: Pruner, num_layers: int) -> bool:
    """Return whether these prompts can start from stored prefixes with the answers unchanged.

    Not when a prompt has no image or ends with one; nor when images stand between pieces of text
    and may be withdrawn, because the text between them would then have read them.
    """
    if not pruner.prefix_cacheable(num_layers):
        return False
    withdraws = bool(pruner.probe_layers(num_layers))
    for prompt in prompts:
        if not 0 < prompt.prefix_len < len(prompt.embeds):
            return False
        if withdraws and bool((prompt.kinds[: prompt.prefix_len] == TokenType.TEXT).any()):
            return False
    return True
