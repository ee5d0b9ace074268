"""The Llama decoder, dropping tokens between its layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaModel
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from llava_todre.stage2 import DecoderPruning, LayerInputs, PrunedCache
from llava_todre.stage2.cache import CACHE_ARGUMENT, seen_tokens


class PruningLlamaModel(LlamaModel):
    """``LlamaModel`` whose layers may hold fewer tokens the deeper they are.

    Modifications (follows transformers 5.23.0): in the loop over layers a :class:`DecoderPruning`
    adapts each layer's inputs and reads its output; without one, the calls are those of
    ``LlamaModel``, bit for bit.
    """

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        pruning: DecoderPruning | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the decoder.

        Args:
            input_ids: (B, Q) token ids, or None when ``inputs_embeds`` is given.
            attention_mask: (B, keys), 1 for real tokens.
            position_ids: (B, Q).
            past_key_values: KV cache; the state of a :class:`PrunedCache` is continued.
            inputs_embeds: (B, Q, D).
            use_cache: whether to return a cache.
            pruning: state of Stage 2, for calls without a cache.
            kwargs: passed on to every layer.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = PrunedCache(self.config, pruning)
        if position_ids is None:
            seen = seen_tokens(past_key_values)
            length = inputs_embeds.shape[1]
            position_ids = torch.arange(seen, seen + length, device=inputs_embeds.device)[None]
        cache = past_key_values if isinstance(past_key_values, PrunedCache) else None
        state = pruning if cache is None else cache.state
        if state is not None:
            state.begin(inputs_embeds, cache)

        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE_ARGUMENT: past_key_values},
        )
        tables = self.rotary_emb(inputs_embeds, position_ids=position_ids)
        flash = "flash" in (self.config._attn_implementation or "")
        hidden_states = inputs_embeds
        try:
            for index, layer in enumerate(self.layers):
                inputs = LayerInputs(hidden_states, mask, tables, position_ids)
                if state is not None:
                    inputs = state.enter(index, inputs, cache, flash, layer)
                hidden_states = layer(
                    inputs.hidden_states,
                    attention_mask=inputs.attention_mask,
                    position_embeddings=inputs.position_embeddings,
                    position_ids=inputs.position_ids,
                    use_cache=use_cache,
                    **{CACHE_ARGUMENT: past_key_values},
                    **kwargs,
                )
                if state is not None:
                    state.leave(index, self, inputs, hidden_states, cache)
        finally:
            if state is not None:
                state.remove_query_hook()
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values
        )
