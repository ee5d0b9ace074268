"""The Llama decoder with withdrawal of tokens between its layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from llava_todre.stage2 import DecoderPruning, LayerInputs


class PruningLlamaModel(LlamaModel):
    """``LlamaModel`` whose layers may hold fewer tokens the deeper they are.

    Modifications (follows transformers 5.23.0): the loop over layers lets a :class:`DecoderPruning`
    re-express each layer's inputs and look at its output; without one, the calls are those of
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
        withdrawal: DecoderPruning | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the decoder.

        Args:
            input_ids: (B, Q) token ids, or None when ``inputs_embeds`` is given.
            attention_mask: (B, keys), 1 for real tokens.
            position_ids: (B, Q).
            past_key_values: KV cache; its ``withdrawal`` attribute, when present, is continued.
            inputs_embeds: (B, Q, D).
            use_cache: whether to return a cache.
            withdrawal: state of Stage 2 for calls without a cache.
            kwargs: passed on to every layer.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            length = inputs_embeds.shape[1]
            position_ids = torch.arange(seen, seen + length, device=inputs_embeds.device)[None]
        withdrawal = withdrawal or getattr(past_key_values, "withdrawal", None)
        if withdrawal is not None:
            withdrawal.begin(inputs_embeds, past_key_values)

        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        tables = self.rotary_emb(inputs_embeds, position_ids=position_ids)
        flash = "flash" in (self.config._attn_implementation or "")
        hidden_states = inputs_embeds
        try:
            for index, layer in enumerate(self.layers):
                inputs = LayerInputs(hidden_states, mask, tables, position_ids)
                if withdrawal is not None:
                    inputs = withdrawal.enter(index, inputs, past_key_values, flash, layer)
                hidden_states = layer(
                    inputs.hidden_states,
                    attention_mask=inputs.attention_mask,
                    position_embeddings=inputs.position_embeddings,
                    position_ids=inputs.position_ids,
                    past_key_values=past_key_values,
                    use_cache=use_cache,
                    **kwargs,
                )
                if withdrawal is not None:
                    withdrawal.leave(index, self, inputs, hidden_states, past_key_values)
        finally:
            if withdrawal is not None:
                withdrawal.stop_listening()
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values
        )
