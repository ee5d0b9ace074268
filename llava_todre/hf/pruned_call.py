"""One call of ``generate`` with pruned prompts: its arguments, and the hooks of Stage 2.

Symbols: B batch, L length of the whole prompts, padding included.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from llava_todre.hf.capture import DecoderInputs, decoder_of
from llava_todre.hf.deepstack import adding
from llava_todre.hf.encoded import prefixes_of
from llava_todre.locking import uncompiled
from llava_todre.pruners import Pruner
from llava_todre.settings import keeps_cache_rows, pad_id, setting, shorter_lengths
from llava_todre.spans import Spans, is_visual
from llava_todre.stage1.pack import (
    SplicedPrompt,
    kept_deep_features,
    kept_positions,
    pad_prompts,
    padded,
)
from llava_todre.stage2 import DecoderPruning, PrunedCache
from llava_todre.stage2.cache import CACHE_ARGUMENT, has_sliding_window
from llava_todre.stage2.hooks import pruning_hooks
from llava_todre.stage2.prefix import PrefixStore, may_share
from llava_todre.stats import PruneStats


@dataclass(frozen=True, eq=False)
class PrunedCall:
    """Pruned prompts, ready for the model's own ``generate``."""

    prompts: Sequence[SplicedPrompt]
    captured: DecoderInputs
    """Of the whole prompts."""
    spans: Spans
    state: DecoderPruning
    short: dict[str, Any]
    """Arguments of ``generate`` that describe the pruned prompts."""
    settings: dict[str, Any]
    """Its other arguments."""
    prefixed: bool
    """Whether the keys of the prompts' first parts are in the cache already."""

    @classmethod
    def of(
        cls,
        model: Any,
        pruner: Pruner,
        prompts: Sequence[SplicedPrompt],
        captured: DecoderInputs,
        whole: Tensor,
        kwargs: Mapping[str, Any],
        prefixes: PrefixStore | None,
    ) -> PrunedCall:
        """Prepare a call.

        Args:
            model: of transformers, or of the original package.
            pruner: the method.
            prompts: B pruned ones.
            captured: the whole ones as the decoder would have read them.
            whole: (B, L) their ids.
            kwargs: arguments of ``generate`` other than the inputs.
            prefixes: a store of the prompts' first parts; used where no answer changes by it.
        """
        decoder, filler = decoder_of(model), pad_id(model, kwargs)
        num_layers = decoder.config.num_hidden_layers
        if prefixes is not None:
            if _may_share(model, pruner, prompts, kwargs):
                prefixes.claim(model)
            else:
                prefixes = None
        embeds, spans, _ = pad_prompts(prompts, by_part=prefixes is not None)
        cached = 0 if prefixes is None else max(prompt.prefix_len for prompt in prompts)
        state = DecoderPruning(pruner, spans, num_layers, cached)
        ids, pruned = padded([prompt.ids for prompt in prompts], filler), embeds.shape[1]
        short: dict[str, Any] = {
            # The decoder reads the embeddings; the ids are for penalties of what repeats.
            "input_ids": pad(ids, (pruned - ids.shape[1], 0), value=filler).to(whole.device),
            "inputs_embeds": embeds,
            "attention_mask": spans.valid.long().to(whole.device),
        }
        settings = {**kwargs, **shorter_lengths(model, kwargs, whole.shape[1], pruned)}
        if captured.position_ids is not None:
            # After stored prefixes only the last ones are read, which are padded alike.
            short["position_ids"] = kept_positions(captured.position_ids, prompts)
        if prefixes is not None:
            short[CACHE_ARGUMENT] = prefixes.cache(prefixes_of(prompts, captured), decoder, state)
        elif state.probe_layers:
            short[CACHE_ARGUMENT] = PrunedCache(decoder.config, state)
            if setting(model, "cache_implementation", kwargs) is not None:
                settings["cache_implementation"] = None  # it is that cache
        return cls(prompts, captured, spans, state, short, settings, prefixes is not None)

    @contextmanager
    def hooks(self, decoder: Any) -> Iterator[None]:
        """Let the decoder drop tokens, and add deep features, while the block runs."""
        deep, at = self.captured.deepstack, self.captured.deepstack_at
        with ExitStack() as stack:
            if self.state.probe_layers:
                stack.enter_context(pruning_hooks(decoder, self.state))
                # Layers of changing lengths: what was compiled would be compiled again and again.
                stack.enter_context(uncompiled())
            if deep is not None and at is not None and not self.prefixed:
                kept = kept_deep_features(deep, at, self.prompts)
                stack.enter_context(adding(decoder, is_visual(self.spans.kinds), kept))
            yield

    @property
    def stats(self) -> tuple[PruneStats, ...]:
        """What happened to each sample, once it has run."""
        return self.state.stats(
            [tuple(visual.stats for visual in prompt.visuals) for prompt in self.prompts]
        )


def _may_share(
    model: Any, pruner: Pruner, prompts: Sequence[SplicedPrompt], kwargs: Mapping[str, Any]
) -> bool:
    config = decoder_of(model).config
    return (
        keeps_cache_rows(model, kwargs)
        and not has_sliding_window(config)
        and may_share(
            [prompt.kinds for prompt in prompts],
            [prompt.prefix_len for prompt in prompts],
            pruner,
            config.num_hidden_layers,
        )
    )
