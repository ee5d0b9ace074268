"""The KV cache of the first part of a prompt, computed once for all questions that share it.

[system | visual tokens] comes first and attention is causal, so its keys and values do not depend
on the question after it. A question then runs only its own rows (POPE has 18 questions about an
image, GQA about 30).

Symbols: B batch, P positions up to the last visual token, L prompt length, G key heads, E head
width, D decoder width.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from llava_todre.errors import TodreError
from llava_todre.pruners import Pruner
from llava_todre.spans import TokenType
from llava_todre.stage2.cache import CACHE_ARGUMENT, Layers, PrunedCache
from llava_todre.stage2.state import DecoderPruning


@dataclass(frozen=True, eq=False)
class Prefix:
    """The first part of one prompt: what identifies it, and what the decoder reads."""

    key: Hashable
    """Compared by value, e.g. token ids."""
    objects: tuple[object, ...]
    """Compared by identity, e.g. the selected tokens of each image."""
    embeds: Tensor
    """(P, D)."""
    inputs: Mapping[str, Any] = field(default_factory=dict)
    """Other arguments of the decoder for this prompt alone, e.g. position ids."""

    def equals(self, other: Prefix) -> bool:
        """Return whether the other one has the same keys and values."""
        same = len(self.objects) == len(other.objects) and all(
            ours is theirs for ours, theirs in zip(self.objects, other.objects, strict=True)
        )
        return same and self.key == other.key


class PrefixStore:
    """Keys and values of the prompts' first parts, kept between calls of one model.

    Its weights must not change meanwhile.
    """

    def __init__(self, max_prefixes: int = 1) -> None:
        """Start empty.

        Args:
            max_prefixes: how many to keep; the least recently used goes first. One takes
                P * layers * G * E * 2 numbers: in half precision 174 MiB for 348 tokens of a 7B,
                1.4 GiB for 2,900.
        """
        if max_prefixes < 1:
            raise TodreError(f"max_prefixes must be 1 or more, got {max_prefixes}.")
        self.max_prefixes = max_prefixes
        self.hits = 0
        """Prompts that were served from the store."""
        self._stored: list[tuple[Prefix, Layers]] = []
        self._model: weakref.ref[Any] | None = None

    def claim(self, model: Any) -> None:
        """Remember which model these keys are of.

        Raises:
            TodreError: they are of another model.
        """
        if self._model is None:
            self._model = weakref.ref(model)
        if self._model() is not model:
            raise TodreError("stored prefixes must be of one model, got those of another.")

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def num_bytes(self) -> int:
        """Bytes of the stored keys and values."""
        layers = (layer for _, stored in self._stored for layer in stored)
        return sum(keys.nbytes + values.nbytes for keys, values in layers)

    def cache(self, prefixes: Sequence[Prefix], decoder: Any, state: DecoderPruning) -> PrunedCache:
        """Return a cache that holds the first part of every prompt, padded on the left.

        Each is computed by itself, so that its numbers do not depend on the rest of the batch.

        Args:
            prefixes: B of them.
            decoder: the decoder, run for those that are not stored.
            state: of Stage 2 for the whole prompts.
        """
        latest, chosen = list(self._stored), []
        for prefix in prefixes:
            found = next((known for known in latest if known[0].equals(prefix)), None)
            if found is None:
                kept = replace(prefix, embeds=prefix.embeds.new_empty(0), inputs={})
                found = kept, _computed(prefix, decoder)
            else:
                self.hits += 1
                latest.remove(found)
            latest.append(found)
            chosen.append(found[1])
        self._stored = latest[-self.max_prefixes :]
        length = max(len(prefix.embeds) for prefix in prefixes)
        cache = PrunedCache(decoder.config, state if state.probe_layers else None)
        for index, of_layer in enumerate(zip(*chosen, strict=True)):
            keys, values = (_stacked(rows, length) for rows in zip(*of_layer, strict=True))
            cache.append(index, keys, values)
        return cache


def _computed(prefix: Prefix, decoder: Any) -> Layers:
    cache = PrunedCache(decoder.config)
    given = {"inputs_embeds": prefix.embeds[None], "use_cache": True, CACHE_ARGUMENT: cache}
    decoder(**given, **prefix.inputs)
    return cache.contents()


def _stacked(rows: Sequence[Tensor], length: int) -> Tensor:
    """Return (B, G, length, E), each (1, G, P, E) padded with zeros on the left."""
    if all(row is rows[0] for row in rows):
        return rows[0].expand(len(rows), -1, -1, -1)
    return torch.cat([pad(row, (0, 0, length - row.shape[2], 0)) for row in rows])


def may_share(
    kinds: Sequence[Tensor], lengths: Sequence[int], pruner: Pruner, num_layers: int
) -> bool:
    """Return whether prompts can start from stored prefixes with the answers unchanged.

    Not when a prompt has no image or ends with one; nor when images stand between pieces of text
    and may be withdrawn, because the text between them would then have read them.

    Args:
        kinds: (L,) of each prompt, see :class:`~llava_todre.spans.TokenType`.
        lengths: P of each prompt.
        pruner: the method.
        num_layers: of the decoder.
    """
    if not pruner.prefix_cacheable(num_layers):
        return False
    withdraws = bool(pruner.probe_layers(num_layers))
    return all(
        0 < length < len(row) and not (withdraws and bool((row[:length] == TokenType.TEXT).any()))
        for row, length in zip(kinds, lengths, strict=True)
    )
