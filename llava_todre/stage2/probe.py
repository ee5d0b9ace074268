"""What a method may read after a decoder layer: one sample, without padding, on demand.

Symbols: M prompt length in the layer, N tokens of the sample in it, R rows wanted, E head width,
D width. Where a model is spread over devices, everything is on that of the layer's output.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import rotate_half

from llava_todre.errors import TodreError
from llava_todre.pruners import DecoderView, LayerView, PromptView, Tally
from llava_todre.relevance import attention_rows
from llava_todre.stage2.segment import KeyStore, LayerInputs, Segment


class LayerProbe:
    """One sample in a layer that has just run."""

    def __init__(
        self,
        segment: Segment,
        sample: int,
        layer: int,
        decoder: Any,
        inputs: LayerInputs,
        output: Tensor,
        cache: KeyStore | None,
        query_output: Tensor | None,
        method: str,
    ) -> None:
        """Compute nothing yet.

        Args:
            segment: what the layer holds.
            sample: index in the batch.
            layer: that has run.
            decoder: the Llama decoder, of which ``layers``, ``norm`` and ``rotary_emb`` are used.
            inputs: what the layer was called with; after a stored prefix, of the last rows only.
            output: (B, M, D) its output.
            cache: the KV cache, already updated by the layer.
            query_output: (B, M, heads * E) output of its query projection, if known.
            method: its name, for messages.
        """
        self.tally = Tally()
        """What it has computed so far."""
        self._method = method
        self._device = output.device
        self._segment, self._sample, self._layer = segment, sample, layer
        self._decoder, self._module = decoder, decoder.layers[layer]
        self._entered = inputs.hidden_states[sample].to(self._device)
        self._left = output[sample]
        self._cache = cache
        self._query_output = None if query_output is None else query_output[sample]
        self._present = segment.present(sample).to(self._device)
        self._num_stored = segment.positions.shape[1] - inputs.hidden_states.shape[1]
        self._tables = [
            table[min(sample, len(table) - 1)].to(self._device)
            for table in inputs.position_embeddings
        ]

    def view(
        self, num_layers: int, prompt: Segment, embeds: Tensor, visual_counts: tuple[int, ...]
    ) -> LayerView:
        """Return what the method gets.

        Args:
            num_layers: of the decoder.
            prompt: what layer 0 holds.
            embeds: (B, L, D) the prompt before layer 0.
            visual_counts: patch tokens of each image that entered the decoder.
        """
        segment, sample = self._segment, self._sample
        in_prompt = prompt.present(sample).to(self._device)  # (L,) positions at layer 0
        kinds, positions = prompt.kinds[sample].to(self._device), self._held(segment.positions)
        return LayerView(
            layer=self._layer,
            num_layers=num_layers,
            kinds=self._held(segment.kinds),
            hidden_states=lambda: self._chosen(self._whole(self._left)),
            queries=self._queries,
            keys=functools.cache(self._keys),
            scaling=self._module.self_attn.scaling,
            visual_counts=visual_counts,
            prompt=PromptView(
                kinds=kinds[in_prompt] if prompt.ragged else kinds,
                positions=positions - in_prompt[0] if prompt.ragged else positions,
                embeds=lambda: self._whole(embeds[sample]).to(self._device)[in_prompt],
            ),
            decoder=DecoderView(
                next_layer_attention=self._next_layer_attention,
                rope_frequencies=self._decoder.rotary_emb.inv_freq,
                final_norm=lambda states: self._decoder.norm(states).to(self._device),
            ),
        )

    def _queries(self, rows: Tensor) -> Tensor:
        places = self._places(rows)
        return self._project(self._module, "q_proj", self._entered, places, self._query_output)

    def _keys(self) -> Tensor:
        if self._cache is None:
            return self._project(self._module, "k_proj", self._entered, self._present)
        stored = self._cache.keys(self._layer, self._sample)
        return _all_heads(self._chosen(stored), self._module, "k_proj")

    def _next_layer_attention(self, rows: Tensor) -> Tensor:
        following = self._decoder.layers[self._layer + 1]
        states = self._whole(self._left)
        queries = self._project(following, "q_proj", states, self._places(rows))
        keys = self._project(following, "k_proj", states, self._present)
        self.tally.product(*queries.shape, keys.shape[1])
        return attention_rows(queries, keys, rows, following.self_attn.scaling)

    def _project(
        self,
        module: Any,
        name: str,
        states: Tensor,
        places: Tensor,
        output: Tensor | None = None,
    ) -> Tensor:
        """Return rotated queries or keys (H, R, E).

        Args:
            module: a decoder layer.
            name: q_proj or k_proj.
            states: (M, D) what enters the layer; after a stored prefix, the last rows only.
            places: (R,) rows among the M.
            output: (M, heads * E) output of the projection, if known.
        """
        if self._num_stored:
            places = places - self._num_stored
            if bool((places < 0).any()):
                self._whole(states)
        if output is not None:
            projected = output.index_select(0, places.to(output.device))
        else:
            entering = states.index_select(0, places)  # accelerate carries it to the module
            projected = getattr(module.self_attn, name)(module.input_layernorm(entering))
            width = _num_heads(module, name) * module.self_attn.head_dim
            self.tally.product(*entering.shape, width)
        heads = projected.to(self._device).unflatten(-1, (-1, module.self_attn.head_dim))
        norm = getattr(module.self_attn, f"{name[0]}_norm", None)  # Qwen3
        heads = heads if norm is None else norm(heads).to(self._device)
        heads = heads.transpose(0, 1)  # (heads, R, E)
        cosines, sines = (table.index_select(0, places) for table in self._tables)
        return _all_heads(heads * cosines + rotate_half(heads) * sines, module, name)

    def _whole(self, states: Tensor) -> Tensor:
        """Return states of all rows; raise where only the last ones ran."""
        if self._num_stored:
            raise TodreError(
                f"{self._method} has withdraws_all, but reads rows before the end of the images; "
                "it must read keys, and rows after them, only."
            )
        return states

    def _chosen(self, tensor: Tensor) -> Tensor:
        """Return (..., N, width) of (..., M, width)."""
        return tensor.index_select(-2, self._present) if self._segment.ragged else tensor

    def _held(self, rows: Tensor) -> Tensor:
        """Return (N,) of (B, M)."""
        row = rows[self._sample].to(self._device)
        return row[self._present] if self._segment.ragged else row

    def _places(self, rows: Tensor) -> Tensor:
        """Return where (R,) of the N tokens stand among the M."""
        return self._present[rows] if self._segment.ragged else rows


def _all_heads(heads: Tensor, layer: Any, projection: str) -> Tensor:
    """Return the (H, R, E) heads of a layer; where its model is whole, those that were given.

    Under tensor parallelism every process holds an equal share of them, in the order of ranks. They
    are put together, so that all processes see the same, and decide the same.

    Args:
        heads: (heads of this process, R, E).
        layer: the decoder layer.
        projection: q_proj or k_proj, which they came from.
    """
    total = _num_heads(layer, projection)
    if len(heads) == total:
        return heads
    heads = heads.contiguous()
    shares = [torch.empty_like(heads) for _ in range(total // len(heads))]
    torch.distributed.all_gather(shares, heads)
    return torch.cat(shares)


def _num_heads(layer: Any, projection: str) -> int:
    config = layer.self_attn.config
    return int(config.num_attention_heads if projection == "q_proj" else config.num_key_value_heads)
