"""LLaVA on a Llama decoder, as users of the original know it, with both pruning stages built in.

Symbols: B batch, L prompt length, V views of one image, S side of a view in pixels, D decoder
    width.

Stage 1 happens in ``prepare_inputs_labels_for_multimodal``, Stage 2 in the forward of the decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from llava_todre.errors import TodreError, unknown
from llava_todre.flops import DecoderShape
from llava_todre.model.decoder import PruningLlamaModel
from llava_todre.model.images import Size, anyres_grid_shape
from llava_todre.model.multimodal import (
    EncodedVisual,
    PackedVisual,
    build_projector,
    merge_slots,
    needs_selection,
    prune,
)
from llava_todre.model.prompt import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_todre.model.vision import VisionTower
from llava_todre.pruners import Pruner, create_pruner
from llava_todre.spans import Kind, Spans, text_kinds
from llava_todre.stats import Clock, PruneStats
from llava_todre.withdrawal import Withdrawal

MODALITIES = ("image", "video")
Images = Tensor | Sequence[Tensor] | Sequence[EncodedVisual]
Prepared = tuple[
    Tensor | None, Tensor | None, Tensor | None, Cache | None, Tensor | None, Tensor | None
]


class LlavaConfig(LlamaConfig):
    """Llama's configuration, LLaVA's ``mm_*`` keys, and the tower's as ``vision_config``."""

    model_type = "llava_llama"

    mm_projector_type: str = "linear"
    mm_hidden_size: int = 1024
    mm_vision_tower: str | None = None
    mm_vision_select_layer: int = -2
    mm_vision_select_feature: str = "patch"
    mm_patch_merge_type: str = "flat"
    image_aspect_ratio: str = "square"
    image_grid_pinpoints: Any = None
    tokenizer_model_max_length: int | None = None
    tokenizer_padding_side: str = "right"
    vision_config: Any = None


class LlavaLlamaModel(PruningLlamaModel):
    """The decoder together with tower, projector and newline embedding."""

    config_class = LlavaConfig

    def __init__(self, config: LlavaConfig) -> None:
        """Build without weights; nothing is downloaded."""
        super().__init__(config)
        self.vision_tower = VisionTower(
            config.vision_config, config.mm_vision_select_layer, config.mm_vision_select_feature
        )
        self.mm_projector = build_projector(
            config.mm_projector_type, config.mm_hidden_size, config.hidden_size
        )
        self.image_newline = None
        if "unpad" in config.mm_patch_merge_type:
            self.image_newline = nn.Parameter(torch.empty(config.hidden_size))


@dataclass
class _Prompt:
    """One spliced sample, or the growing list of its pieces."""

    embeds: list[Tensor]
    kinds: list[Tensor]
    labels: list[Tensor]
    visuals: list[PackedVisual]


class LlavaLlamaForCausalLM(LlamaForCausalLM):
    """LLaVA-1.5 and LLaVA-NeXT (1.6) with a Llama decoder.

    ``model.set_pruner("todre", retain_ratio=0.1)`` chooses the method for all later calls;
    ``model.last_stats`` tells what happened in the last one.
    """

    config_class = LlavaConfig

    def __init__(self, config: LlavaConfig) -> None:
        """Build without weights; nothing is pruned until :meth:`set_pruner`."""
        super(LlamaForCausalLM, self).__init__(config)
        self.model = LlavaLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.pruner: Pruner = create_pruner("vanilla")
        self.clock = Clock()
        self._last: tuple[list[_Prompt], Withdrawal] | None = None
        self.post_init()

    def get_model(self) -> LlavaLlamaModel:
        """Return the decoder with its multimodal parts."""
        return self.model

    def get_vision_tower(self) -> VisionTower:
        """Return the vision tower."""
        return self.model.vision_tower

    def set_pruner(self, method: str | Pruner, **knobs: Any) -> Pruner:
        """Choose the pruning method by name and options, or as an object; returns it."""
        self.pruner = method if isinstance(method, Pruner) else create_pruner(method, **knobs)
        return self.pruner

    # ------------------------------------------------------------------ images

    def encode_images(
        self,
        images: Images,
        image_sizes: Sequence[Size] | None = None,
        modalities: Sequence[str] | None = None,
    ) -> list[EncodedVisual]:
        """Run tower and projector; the result serves as ``images`` for any number of questions.

        Args:
            images: one entry per image or video: (3, S, S), (V, 3, S, S) with the thumbnail first,
                or for a video (frames, 3, S, S); or one tensor stacking entries of equal shape.
            image_sizes: (width, height) of each image in pixels; needed to remove padding.
            modalities: ``"image"`` or ``"video"`` for each entry; all images when left out.

        Raises:
            TodreError: shapes, sizes or modalities that do not fit each other.
        """
        entries: list[Any] = list(images)
        if entries and isinstance(entries[0], EncodedVisual):
            return entries
        views: list[Tensor] = [entry if entry.ndim == 4 else entry[None] for entry in entries]
        sizes: list[Any] = [None] * len(views) if image_sizes is None else list(image_sizes)
        kinds = list(modalities or ["image"] * len(views))
        if not len(views) == len(sizes) == len(kinds):
            raise TodreError(
                f"images has {len(views)} entries, but image_sizes {len(sizes)} and modalities "
                f"{len(kinds)}; they must agree."
            )
        for kind in kinds:
            if kind not in MODALITIES:
                raise unknown("modality", kind, MODALITIES)
        tower = self.get_vision_tower()
        slots = [
            self._slots(len(view), size, kind == "video")
            for view, size, kind in zip(views, sizes, kinds, strict=True)
        ]
        wanted = "cls_attention" in self.pruner.needs and needs_selection(self.pruner, slots)
        parameter = next(tower.parameters())
        with self.clock.stage("vision"):
            pixels = torch.cat([view.to(parameter.device, parameter.dtype) for view in views])
            encoded = tower(pixels, self.pruner.cls_layer if wanted else None)
            projected = self.model.mm_projector(encoded.patches)  # (all views, P, D)
        counts = [len(view) for view in views]
        attention = [None] * len(views) if not wanted else encoded.cls_attention.split(counts)
        return [
            EncodedVisual(
                projected=features.flatten(0, 1),
                slots=slot.to(features.device),
                side=tower.side,
                is_video=kind == "video",
                cls_attention=None if score is None else score.flatten(),
            )
            for features, slot, kind, score in zip(
                projected.split(counts), slots, kinds, attention, strict=True
            )
        ]

    def _slots(self, num_views: int, size: Size | None, is_video: bool) -> Tensor:
        config, tower = self.config, self.get_vision_tower()
        merge_type = config.mm_patch_merge_type
        grid = None
        if not is_video and config.image_aspect_ratio == "anyres" and merge_type != "flat":
            if size is None:
                raise TodreError(
                    "image_sizes is missing; AnyRes needs the (width, height) of every image."
                )
            grid = anyres_grid_shape(size, config.image_grid_pinpoints, tower.config.image_size)
        return merge_slots(num_views, tower.side, grid, size, merge_type)

    # ------------------------------------------------------------------ prompts

    def prepare_inputs_labels_for_multimodal(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        labels: Tensor | None,
        images: Images | None,
        image_sizes: Sequence[Size] | None = None,
        modalities: Sequence[str] | None = None,
        padding_side: str | None = None,
    ) -> Prepared:
        """Replace each image placeholder by the visual tokens that Stage 1 keeps.

        Args:
            input_ids: (B, T) with :data:`IMAGE_TOKEN_INDEX` where an image or video goes.
            position_ids: passed through as None unless given.
            attention_mask: (B, T), 1 for real tokens; None when nothing is padded.
            past_key_values: a cache to use; an empty one is created when a method works inside the
                decoder.
            labels: (B, T) or None.
            images: see :meth:`encode_images`; images of all samples in order of appearance.
            image_sizes: see :meth:`encode_images`.
            modalities: see :meth:`encode_images`.
            padding_side: ``"left"`` or ``"right"``; the checkpoint's own when left out.

        Returns:
            As the original: (input_ids, position_ids, attention_mask, past_key_values,
            inputs_embeds, labels), where input_ids is None once embeddings replace it. The cache
            carries the state of Stage 2.
        """
        self._last = None
        if images is None:
            if bool((input_ids == IMAGE_TOKEN_INDEX).any()):
                raise TodreError("images is missing, but the prompt contains '<image>'.")
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        visuals = self.encode_images(images, image_sizes, modalities)
        real = (
            torch.ones_like(input_ids, dtype=torch.bool)
            if attention_mask is None
            else attention_mask.bool()
        )
        ids = [row[keep] for row, keep in zip(input_ids, real, strict=True)]
        targets = (
            [None] * len(ids)
            if labels is None
            else [row[keep] for row, keep in zip(labels, real, strict=True)]
        )
        expected = sum(int((row == IMAGE_TOKEN_INDEX).sum()) for row in ids)
        if expected != len(visuals):
            raise TodreError(
                f"prompt has {expected} '<image>' placeholders, "
                f"but {len(visuals)} images were given."
            )
        with self.clock.stage("selection"):
            remaining = iter(visuals)
            packed: dict[int, PackedVisual] = {}
            prompts = [
                self._splice(row, target, remaining, packed)
                for row, target in zip(ids, targets, strict=True)
            ]
        left = (padding_side or self.config.tokenizer_padding_side) == "left"
        embeds = self._pad([torch.cat(prompt.embeds) for prompt in prompts], 0.0, left)
        kinds = self._pad([torch.cat(prompt.kinds) for prompt in prompts], Kind.PADDING, left)
        spans = Spans(kinds)
        limit = self.config.max_position_embeddings
        if embeds.shape[1] > limit:
            raise TodreError(
                f"prompt of {embeds.shape[1]} tokens is longer than the {limit} the model can read."
            )
        if labels is not None:
            labels = self._pad([torch.cat(prompt.labels) for prompt in prompts], IGNORE_INDEX, left)
        withdrawal = Withdrawal(self.pruner, spans, self.config.num_hidden_layers)
        self._last = prompts, withdrawal
        if withdrawal.probe_layers:
            if past_key_values is None:
                past_key_values = DynamicCache(config=self.config)
            past_key_values.withdrawal = withdrawal
        mask = None if bool(spans.valid.all()) else spans.valid.long()
        return None, position_ids, mask, past_key_values, embeds, labels

    def _splice(
        self, ids: Tensor, labels: Tensor | None, visuals: Any, packed: dict[int, PackedVisual]
    ) -> _Prompt:
        """Build one prompt from (T,) ids, taking its images from the iterator ``visuals``."""
        prompt = _Prompt([], [], [], [])
        places = (ids == IMAGE_TOKEN_INDEX).nonzero()[:, 0].tolist()
        text = self.get_input_embeddings()(
            ids.clamp_min(0)
        )  # (T, D); placeholders are cut out below
        for start, stop in zip([-1, *places], [*places, len(ids)], strict=True):
            if start >= 0:
                visual = next(visuals)
                self._append_visual(
                    prompt, visual, text[places[0] + 1 :][ids[places[0] + 1 :] >= 0], packed
                )
            piece = slice(start + 1, stop)
            prompt.embeds.append(text[piece])
            prompt.kinds.append(text_kinds(stop - start - 1, start >= 0, ids.device))
            if labels is not None:
                prompt.labels.append(labels[piece])
        return prompt

    def _append_visual(
        self, prompt: _Prompt, visual: EncodedVisual, text: Tensor, packed: dict[int, PackedVisual]
    ) -> None:
        """Append one image; ``packed`` remembers selections that do not depend on the question."""
        needs_text = "text_embeds" in self.pruner.needs
        if needs_text or id(visual) not in packed:
            newline = self.model.image_newline
            packed[id(visual)] = prune(visual, self.pruner, newline, text if needs_text else None)
        chosen = packed[id(visual)]
        count = len(chosen.embeds)
        device = prompt.kinds[0].device
        prompt.visuals.append(chosen)
        prompt.embeds.append(chosen.embeds.to(text))
        prompt.kinds.append(torch.full((count,), Kind.VISUAL, dtype=torch.int8, device=device))
        if prompt.labels:
            prompt.labels.append(torch.full((count,), IGNORE_INDEX, device=device))

    @staticmethod
    def _pad(rows: list[Tensor], value: float, left: bool) -> Tensor:
        return pad_sequence(
            rows, batch_first=True, padding_value=value, padding_side="left" if left else "right"
        )

    # ------------------------------------------------------------------ running

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        images: Images | None = None,
        image_sizes: Sequence[Size] | None = None,
        modalities: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits for prompts with images, or run one step of a generation.

        Logits cover the prompt as the decoder saw it: shorter than unpruned after Stage 1. When
        Stage 2 withdrew tokens, only the remaining ones have logits, right-aligned in a batch.
        """
        if inputs_embeds is None and images is not None:
            if input_ids is None:
                raise TodreError("input_ids is missing; give it together with images.")
            prepared = self.prepare_inputs_labels_for_multimodal(
                input_ids,
                position_ids,
                attention_mask,
                past_key_values,
                labels,
                images,
                image_sizes,
                modalities,
            )
            input_ids, position_ids, attention_mask, past_key_values, inputs_embeds, labels = (
                prepared
            )
        withdrawal = getattr(past_key_values, "withdrawal", None)
        if withdrawal is not None and (self.training or labels is not None):
            raise TodreError(
                "training and losses are not supported with withdrawal inside the decoder; "
                "set probe_depths=()."
            )
        if use_cache is False:
            past_key_values = None
        new = past_key_values is None or past_key_values.get_seq_length() == 0
        with self.clock.stage("prefill" if new else "decode"):
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                labels=labels,
                use_cache=use_cache,
                withdrawal=withdrawal,
                **kwargs,
            )

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        images: Images | None = None,
        image_sizes: Sequence[Size] | None = None,
        modalities: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Generate answers.

        Args:
            inputs: (B, T) token ids with image placeholders, padded on either side where
                ``attention_mask`` says so.
            images: see :meth:`encode_images`.
            image_sizes: see :meth:`encode_images`.
            modalities: see :meth:`encode_images`.
            kwargs: everything ``transformers``' ``generate`` takes, ``attention_mask`` included.

        Returns:
            (B, new tokens) ids, without the prompt, as the original. Without images: as
            ``transformers``.
        """
        if "inputs_embeds" in kwargs:
            raise TodreError("inputs_embeds is not accepted; give inputs and images.")
        if images is None or inputs is None:
            return super().generate(inputs, **kwargs)
        prepared = self.prepare_inputs_labels_for_multimodal(
            inputs,
            None,
            kwargs.pop("attention_mask", None),
            kwargs.pop("past_key_values", None),
            None,
            images,
            image_sizes,
            modalities,
            padding_side="left",
        )
        _, _, attention_mask, past_key_values, inputs_embeds, _ = prepared
        if past_key_values is not None:
            kwargs["past_key_values"] = past_key_values
        return super().generate(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs
        )

    @property
    def decoder_shape(self) -> DecoderShape:
        """The decoder's dimensions, for counting FLOPs."""
        config = self.config
        return DecoderShape(
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            mlp_width=config.intermediate_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            vocab=config.vocab_size,
        )

    @property
    def last_stats(self) -> tuple[PruneStats, ...]:
        """What happened to each sample of the last call with images."""
        if self._last is None:
            return ()
        prompts, withdrawal = self._last
        copies = len(withdrawal.probes) // len(prompts)  # beam search repeats samples
        return tuple(
            PruneStats(
                images=tuple(visual.stats for visual in prompt.visuals),
                text_tokens=sum(len(embeds) for embeds in prompt.embeds)
                - sum(len(visual.embeds) for visual in prompt.visuals),
                newline_tokens=sum(visual.num_newlines for visual in prompt.visuals),
                probes=tuple(withdrawal.probes[index * copies]),
                prompt_tokens_per_layer=withdrawal.tokens_per_layer(index * copies),
                visual_tokens_per_layer=withdrawal.tokens_per_layer(index * copies, Kind.VISUAL),
            )
            for index, prompt in enumerate(prompts)
        )
