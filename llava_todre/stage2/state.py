"""Stage 2: which prompt tokens each decoder layer holds, in the prefill and afterwards.

Dropping a token from layer l on removes its row from the hidden states that enter layer l. Layers l
and later never write keys for it; earlier layers keep theirs. Nothing is masked: the tensors get
shorter. Three things follow, for our decoder and for stock ones with hooks alike:

* each sample of a batch drops its own tokens, so rows are packed to the right again and the places
  left over on the left are marked as padding;
* positions stay as they were: the cosines and sines of RoPE are gathered, not recomputed;
* masks are built for the keys of layer 0; each later layer gets them for its own keys.

If the keys of the first ``cached`` positions (up to the last visual token) are stored from an
earlier question about the same images, only the rows after them run, and dropping tokens means
gathering the stored keys. This equals a fresh run for methods that drop all visual tokens or none
(``Pruner.prefix_cacheable``).

The state of a batch of prompts belongs to its KV cache
(:class:`~llava_todre.stage2.cache.PrunedCache`), so calls, conversations and models cannot mix.

Symbols: B batch, L prompt length at layer 0, M prompt length in a later layer, Q query length of
one forward call, N tokens of one sample in a layer, D width, E head width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from llava_todre.errors import TodreError
from llava_todre.pruners import Keep, Pruner
from llava_todre.spans import Spans, TokenType, is_visual, with_newlines
from llava_todre.stage2.masks import causal, context, decode_mask, gather, hide
from llava_todre.stage2.probe import LayerProbe
from llava_todre.stage2.segment import KeyStore, LayerInputs, Segment
from llava_todre.stats import ImageStats, Probe, PruneStats


def _require_finite(layer: int, measured: Mapping[str, float]) -> None:
    """Raise a TodreError if what a method has measured is no number: it compares with nothing."""
    for key, value in measured.items():
        if not math.isfinite(value):
            raise TodreError(
                f"{key} after decoder layer {layer} is {value}; it must be finite: the weights or "
                "the config are damaged, or half precision overflows (try float32 or bfloat16)."
            )


class DecoderPruning:
    """Stage 2 for one batch of prompts: calls the method after its probe layers, drops tokens."""

    def __init__(self, pruner: Pruner, spans: Spans, num_layers: int, cached: int = 0) -> None:
        """Start with every layer holding the whole prompt.

        Args:
            pruner: the method; its ``probe_layers`` and ``at_layer`` are used.
            spans: kinds of the (B, L) positions of the prompt.
            num_layers: number of decoder layers.
            cached: positions of the prompt whose keys the cache holds when the prefill begins.
        """
        self.pruner = pruner
        self.cached = cached
        self.num_layers = num_layers
        self.probe_layers = frozenset(pruner.probe_layers(num_layers))
        batch, length = spans.kinds.shape
        positions = torch.arange(length, device=spans.kinds.device).expand(batch, length)
        self.segments = [Segment(0, positions, spans.valid, spans.kinds)]
        self.row_id = spans.row_id
        self.patches = spans.patches
        self.probes: list[list[Probe]] = [[] for _ in range(batch)]
        self.probe_flops = [0] * batch
        self.prefilling = True
        self.prompt_embeds: Tensor | None = None
        """(B, L, D), held until the last probe layer has run."""
        self._query_output: Tensor | None = None
        """(B, Q, heads * E) output of the query projection of the probe layer that runs."""
        self._query_hook: Any = None

    # ------------------------------------------------------------------ calls of the decoder

    def begin(self, hidden_states: Tensor, cache: KeyStore | None) -> None:
        """Start a forward call, before layer 0.

        Raises:
            TodreError: the prompt arrives in pieces.
        """
        self.prefilling = cache is None or cache.num_seen == self.cached
        for segment in self.segments:
            segment.decode_mask = None
        if not self.prefilling:
            return
        batch, length = hidden_states.shape[:2]
        if self.probe_layers:
            self.prompt_embeds = hidden_states
        prompt = self.segments[0]
        expected = prompt.positions.shape[1] - self.cached
        if length != expected:
            raise TodreError(
                f"prompt of {length} tokens, expected {expected}: chunked prefill "
                "and assisted decoding cannot be combined with withdrawal inside the decoder; "
                "set probe_depths=() or switch them off."
            )
        copies = batch // len(prompt.positions)  # beam search repeats every sample
        if copies > 1:
            prompt.positions, prompt.valid, prompt.kinds = (
                tensor.repeat_interleave(copies, dim=0)
                for tensor in (prompt.positions, prompt.valid, prompt.kinds)
            )
            self.row_id = self.row_id.repeat_interleave(copies, dim=0)
            self.patches = tuple(counts for counts in self.patches for _ in range(copies))
        self.segments = [prompt]
        self.probes = [[] for _ in range(batch)]
        self.probe_flops = [0] * batch

    def enter(
        self,
        layer: int,
        inputs: LayerInputs,
        cache: KeyStore | None,
        flash: bool,
        module: Any = None,
    ) -> LayerInputs:
        """Return the inputs of ``layer`` in terms of the tokens it holds.

        Args:
            layer: 0-based index of the layer about to run.
            inputs: hidden states as the previous layer left them; mask and positions as built for
                layer 0.
            cache: the KV cache of the call, if any.
            flash: whether the attention implementation takes (B, keys) masks.
            module: the layer itself, whose queries are kept where the method is called after it;
                :meth:`remove_query_hook` must follow, whatever happens.
        """
        if module is not None and self.prefilling and layer in self.probe_layers:
            self._add_query_hook(module)
        segment = self.segment(layer)
        if segment.start == 0:
            return inputs
        if not self.prefilling:
            assert cache is not None, "only a cached call follows the prefill"
            if segment.decode_mask is None:
                segment.decode_mask = decode_mask(
                    segment,
                    inputs.attention_mask,
                    range(self.segments[0].positions.shape[1], cache.num_seen),
                    inputs.hidden_states.shape[1],
                    flash,
                )
            return replace(inputs, attention_mask=segment.decode_mask)
        if self.cached:
            assert cache is not None, "the stored keys are in a cache"
            return self._enter_after_prefix(layer, segment, inputs, cache, flash)
        hidden_states = inputs.hidden_states
        if layer == segment.start:
            assert segment.gather_idx is not None
            for sample, (present, merged) in segment.merged_hidden.items():
                hidden_states = hidden_states.clone()
                hidden_states[sample, present.to(hidden_states.device)] = merged.to(hidden_states)
            segment.merged_hidden.clear()
            hidden_states = gather(hidden_states, segment.gather_idx, dim=1)
            segment.prompt_context = context(segment, inputs, flash)
        assert segment.prompt_context is not None
        return LayerInputs(hidden_states, *segment.prompt_context)

    def leave(
        self,
        layer: int,
        decoder: Any,
        inputs: LayerInputs,
        output: Tensor,
        cache: KeyStore | None,
    ) -> None:
        """Call the method after a probe layer; if it drops tokens, a segment starts at the next.

        Args:
            layer: the layer that has run.
            decoder: the Llama decoder, of which ``layers`` and ``norm`` are used.
            inputs: what :meth:`enter` returned for it.
            output: (B, M, D) its output.
            cache: the KV cache, already updated by the layer.
        """
        if not self.prefilling or layer not in self.probe_layers:
            return
        self.remove_query_hook()
        embeds = self.prompt_embeds
        assert embeds is not None, "set when the prefill began"
        segment = self.segment(layer)
        keep = segment.valid.clone()
        merged = {}
        for sample in range(len(keep)):
            present = segment.present(sample)
            queries, method = self._query_output, type(self.pruner).__name__
            probe = LayerProbe(
                segment, sample, layer, decoder, inputs, output, cache, queries, method
            )
            view = probe.view(self.num_layers, self.segments[0], embeds, self.patches[sample])
            decision = self.pruner.at_layer(view)
            dropped = 0
            ends_with_image = bool(view.visual[-1])  # and its last token predicts the answer
            if decision is not None and layer + 1 < self.num_layers and not ends_with_image:
                kept = Keep.checked(decision, f"{method}.at_layer", len(present))
                if kept.features is not None:
                    merged[sample] = present[kept.indices], kept.features
                stays = segment.kinds[sample, present] != TokenType.VISUAL
                stays[kept.indices] = True
                stays = self._with_newlines(segment, sample, present, stays)
                keep[sample, present] = stays
                dropped = len(present) - int(stays.sum())
            _require_finite(layer, view.measured)
            self.probe_flops[sample] += probe.tally.flops + view.tally.flops
            if view.measured or dropped:
                self.probes[sample].append(Probe(layer=layer, dropped=dropped, **view.measured))
        self._query_output = None
        if layer == max(self.probe_layers):
            self.prompt_embeds = None
        if merged or not torch.equal(keep, segment.valid):
            self._start_segment(layer + 1, segment, keep, merged)

    def _add_query_hook(self, module: Any) -> None:
        """Keep the queries that a layer computes for itself, so that a method has them for free."""
        thread = get_ident()

        def keep_queries(projection: Any, args: Any, output: Tensor) -> None:
            if get_ident() == thread:  # other threads may run the layer meanwhile
                self._query_output = output

        self._query_hook = module.self_attn.q_proj.register_forward_hook(keep_queries)

    def remove_query_hook(self) -> None:
        """Remove the hook, if there is one."""
        if self._query_hook is not None:
            self._query_hook.remove()
            self._query_hook = None

    # ------------------------------------------------------------------ what each layer holds

    def segment(self, layer: int) -> Segment:
        """Return the segment that ``layer`` belongs to."""
        return next(segment for segment in reversed(self.segments) if segment.start <= layer)

    def tokens_per_layer(self, sample: int) -> tuple[int, ...]:
        """Return how many prompt tokens each layer processes for a sample."""
        return self._count([segment.valid[sample] for segment in self.segments])

    def visual_tokens_per_layer(self, sample: int) -> tuple[int, ...]:
        """Return how many patch and newline tokens each layer processes for a sample."""
        return self._count([is_visual(segment.kinds[sample]) for segment in self.segments])

    def stats(self, images: Sequence[tuple[ImageStats, ...]]) -> tuple[PruneStats, ...]:
        """Return what happened to each sample of the batch.

        Args:
            images: Stage 1 on the images of each sample.
        """
        copies = len(self.probes) // len(images)  # beam search repeats samples
        newlines = (self.segments[0].kinds == TokenType.NEWLINE).sum(dim=1)[::copies].tolist()
        return tuple(
            PruneStats(
                images=of_sample,
                newline_tokens=newlines[index],
                probes=tuple(self.probes[index * copies]),
                prompt_tokens_per_layer=self.tokens_per_layer(index * copies),
                visual_tokens_per_layer=self.visual_tokens_per_layer(index * copies),
                probe_flops=self.probe_flops[index * copies],
            )
            for index, of_sample in enumerate(images)
        )

    def _count(self, chosen: list[Tensor]) -> tuple[int, ...]:
        starts = [segment.start for segment in self.segments]
        counts = dict(zip(starts, (int(held.sum()) for held in chosen), strict=True))
        return tuple(counts[self.segment(layer).start] for layer in range(self.num_layers))

    # ------------------------------------------------------------------ mechanics

    def _enter_after_prefix(
        self, layer: int, segment: Segment, inputs: LayerInputs, cache: KeyStore, flash: bool
    ) -> LayerInputs:
        """Drop tokens from the keys stored for ``layer``; all rows that run stay."""
        num_rows = inputs.hidden_states.shape[1]
        cache.keep(layer, segment.positions[:, : segment.positions.shape[1] - num_rows])
        if layer == segment.start:
            mask = inputs.attention_mask
            if mask is not None:
                mask = hide(gather(mask, segment.positions, dim=-1), segment.valid)
            elif segment.ragged:
                valid = segment.valid
                mask = valid if flash else causal(num_rows, valid.shape[1], valid)
            segment.prompt_context = mask, inputs.position_embeddings, inputs.position_ids
        assert segment.prompt_context is not None
        return LayerInputs(inputs.hidden_states, *segment.prompt_context)

    def _with_newlines(
        self, segment: Segment, sample: int, present: Tensor, keep: Tensor
    ) -> Tensor:
        """Let newline tokens follow the decision about patch tokens, as ``newlines`` says.

        Args:
            segment: what the layer that was probed holds.
            sample: index in the batch.
            present: (N,) places of its tokens among the M.
            keep: (N,) bool, the method's decision.
        """
        kinds = segment.kinds[sample, present]
        is_patch, is_newline = kinds == TokenType.VISUAL, kinds == TokenType.NEWLINE
        row_id = self.row_id[sample].to(kinds.device)[segment.positions[sample, present]]
        return with_newlines(keep, is_patch, is_newline, row_id, self.pruner.newlines)

    def _start_segment(
        self,
        start: int,
        previous: Segment,
        keep: Tensor,
        merged: dict[int, tuple[Tensor, Tensor]],
    ) -> None:
        """Pack what is kept (B, M bool) to the right, as much as the longest sample needs.

        After a stored prefix, only the prefix is packed.
        """
        num_rows = self.segments[0].positions.shape[1] - self.cached
        end = keep.shape[1] - (num_rows if self.cached else 0)
        counts = keep[:, :end].sum(dim=-1)
        length = int(counts.max())
        order = keep[:, :end].to(torch.int8).argsort(dim=-1, stable=True)[:, end - length :]
        valid = torch.arange(length, device=keep.device) >= (length - counts)[:, None]
        if self.cached:
            rows = torch.arange(end, keep.shape[1], device=keep.device).expand(len(keep), -1)
            order = torch.cat([order, rows], dim=1)
            valid = torch.cat([valid, previous.valid[:, end:]], dim=1)
        kinds = previous.kinds.gather(1, order).masked_fill(~valid, TokenType.PADDING)
        positions = previous.positions.gather(1, order)
        self.segments.append(Segment(start, positions, valid, kinds, order, merged))
