"""The KV cache: the one module that knows how transformers stores keys and values.

Symbols: B batch, M tokens that a layer holds, G key heads, E head width.
"""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache

from llava_todre.errors import TodreError
from llava_todre.stage2.masks import gather
from llava_todre.stage2.state import DecoderPruning

CACHE_ARGUMENT = "past_key_values"
"""The argument in which models and layers of transformers take their cache."""

Layers = tuple[tuple[Tensor, Tensor], ...]
"""Keys and values, (B, G, M, E) each, of every layer."""


class PrunedCache(DynamicCache):
    """A KV cache whose layers may hold different numbers of tokens, and the state of Stage 2.

    Copying it, beam search and rolling back are those of ``DynamicCache``; a copy has its own copy
    of the state.
    """

    state: DecoderPruning | None = None
    """Stage 2 for the prompts in this cache; None where nothing is dropped in the decoder."""

    def __init__(self, config: PreTrainedConfig, state: DecoderPruning | None = None) -> None:
        """Start empty.

        Args:
            config: of the decoder.
            state: see the attribute.
        """
        super().__init__(config=config)
        self.state = state

    @classmethod
    def convert(cls, cache: Cache, state: DecoderPruning) -> PrunedCache:
        """Make a caller's own cache one of these; it stays the same object.

        Raises:
            TodreError: its layers cannot differ in length.
        """
        kind = type(cache)
        if isinstance(cache, DynamicCache) and not isinstance(cache, cls):
            both = cls if kind is DynamicCache else type(kind.__name__, (cls, kind), {})
            cache.__class__ = both
        if not isinstance(cache, cls):
            raise TodreError(
                f"{CACHE_ARGUMENT} must be a DynamicCache, got {type(cache).__name__}."
            )
        cache.state = state
        return cache

    @property
    def num_seen(self) -> int:
        """Tokens that layer 0 holds."""
        return seen_tokens(self)

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(keys.nbytes + values.nbytes for keys, values in self.contents())

    def contents(self) -> Layers:
        """Return the keys and values of every layer."""
        return tuple((layer.keys, layer.values) for layer in self.layers)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Append (B, G, M, E) keys and values to one layer."""
        self.update(keys, values, layer)

    def keys(self, layer: int, sample: int) -> Tensor:
        """Return the (G, M, E) keys that a layer holds of one sample."""
        return self.layers[layer].keys[sample]

    def keep(self, layer: int, index: Tensor) -> None:
        """Keep the keys and values of one layer at ``index`` (B, N), in that order."""
        stored = self.layers[layer]
        stored.keys = gather(stored.keys, index, dim=2)
        stored.values = gather(stored.values, index, dim=2)


def seen_tokens(cache: Cache | None) -> int:
    """Return how many tokens layer 0 of any cache holds."""
    return 0 if cache is None else cache.get_seq_length()


def state_of(cache: object) -> DecoderPruning | None:
    """Return the state of Stage 2 that a cache has, if any."""
    return cache.state if isinstance(cache, PrunedCache) else None


def has_sliding_window(config: PreTrainedConfig) -> bool:
    """Return whether a layer of such a decoder forgets old keys by itself."""
    return any(DynamicCache(config=config).is_sliding)
