"""LLaVA on a Llama decoder, as users of the original know it, with both pruning stages built in.

Symbols: B batch, L prompt length, V views of one image, S side of a view in pixels, D decoder
    width.

Stage 1 happens in ``prepare_inputs_labels_for_multimodal``, Stage 2 in the forward of the decoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from llava_todre.errors import PromptTooLongError, TodreError
from llava_todre.finite import finite_prefill
from llava_todre.flops import DecoderShape
from llava_todre.locking import Latest, in_turn, turn
from llava_todre.model.clip_text import ClipText
from llava_todre.model.encode import LlavaConfig, LlavaLlamaModel
from llava_todre.model.inputs import (
    Images,
    check_ids,
    check_pixels,
    clip_similarities,
    padding_mask,
    refuse_placeholders,
    whole_prompts,
)
from llava_todre.model.vision import VisionTower
from llava_todre.pruners import NEEDS, VISION_NEEDS, Pruner, create_pruner, resolve
from llava_todre.settings import (
    REFUSED_WITH_IMAGES,
    checked,
    keeps_cache_rows,
    real_tokens,
    refuse,
    shorter_lengths,
    stated_tokens,
)
from llava_todre.spans import Spans
from llava_todre.stage1.anyres import Size
from llava_todre.stage1.pack import SplicedPrompt, pad_prompts, prune_prompts
from llava_todre.stage1.select import ImageFeatures, require_needs
from llava_todre.stage2 import DecoderPruning, PrunedCache
from llava_todre.stage2.cache import CACHE_ARGUMENT, seen_tokens, state_of
from llava_todre.stage2.prefix import Prefix, PrefixStore, may_share
from llava_todre.stats import Clock, ImageStats, PruneStats

Prepared = tuple[
    Tensor | None, Tensor | None, Tensor | None, Cache | None, Tensor | None, Tensor | None
]


_Record = tuple[list[tuple[ImageStats, ...]], DecoderPruning]
"""Stage 1 on the images of each sample, and the state of Stage 2."""


class LlavaLlamaForCausalLM(LlamaForCausalLM):
    """LLaVA-1.5 and LLaVA-NeXT (1.6) with a Llama decoder.

    ``model.set_pruner("todre", retain_ratio=0.1)`` chooses the method for all later calls;
    ``model.last_stats`` tells what happened in the last one. Threads may share a model: their calls
    wait for each other.

    Modifications (follows transformers 5.23.0): ``forward`` and ``generate`` take images and put
    them into the prompt first; everything after that is ``LlamaForCausalLM``.
    """

    # Residual connections must stay on one device when accelerate spreads the model.
    _no_split_modules = ["LlamaDecoderLayer", "CLIPEncoderLayer"]

    config_class = LlavaConfig
    clip_text: ClipText | None = None
    suggested_template: str | None = None
    """The conversation template that the checkpoint's name or config suggests."""

    def __init__(self, config: LlavaConfig) -> None:
        """Build without weights; nothing is pruned until :meth:`set_pruner`."""
        super(LlamaForCausalLM, self).__init__(config)
        self.model = LlavaLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.pruner: Pruner = create_pruner("vanilla")
        self.clock = Clock()
        self._latest = Latest[_Record | None](None)
        self.post_init()

    def get_model(self) -> LlavaLlamaModel:
        """Return the decoder with its multimodal parts."""
        return self.model

    def get_vision_tower(self) -> VisionTower:
        """Return the vision tower."""
        return self.model.vision_tower

    def set_pruner(self, method: str | Pruner, **options: Any) -> Pruner:
        """Choose the pruning method by name and options, or as an object; returns it.

        Raises:
            TodreError: unknown method or option, a value out of range, or a method that needs
                something this model does not compute.
        """
        method = resolve(method, options)
        if "clip_similarity" in method.needs and self.clip_text is None:
            raise TodreError(
                f"{type(method).__name__} needs CLIP's text tower, which is not loaded; call "
                "load_clip_text first, e.g. with 'openai/clip-vit-large-patch14-336'."
            )
        require_needs(method, NEEDS | VISION_NEEDS.keys(), "models of this class")
        with turn(self):  # not between the images and the prompt of another thread
            self.pruner = method
        return method

    def load_clip_text(self, path: str, revision: str | None = None) -> None:
        """Load CLIP's text tower next to the model, for methods that compare patches with words.

        Args:
            path: folder or hub id of the CLIP model whose vision tower this model uses.
            revision: branch, tag or commit on the hub.
        """
        clip_text = ClipText.from_pretrained(path, revision).to(self.device)
        object.__setattr__(self, "clip_text", clip_text)  # not a part of the module

    # ------------------------------------------------------------------ images

    @in_turn
    def encode_images(
        self,
        images: Images,
        image_sizes: Sequence[Size] | None = None,
        modalities: Sequence[str] | None = None,
    ) -> list[ImageFeatures]:
        """Run tower and projector; the result serves as ``images`` for any number of questions.

        Args:
            images: one entry per image or video: (3, S, S), (V, 3, S, S) with the thumbnail first,
                or for a video (frames, 3, S, S); or one tensor stacking entries of equal shape.
            image_sizes: (width, height) of each image in pixels; needed to remove padding.
            modalities: ``"image"`` or ``"video"`` for each entry; all images when left out.

        Raises:
            TodreError: shapes, sizes or modalities that do not fit each other.
        """
        if not isinstance(images, (Tensor, Sequence, Iterator)):
            raise TodreError(f"images must be a tensor or a list, got {type(images).__name__}.")
        entries: list[Any] = list(images)
        if all(isinstance(entry, ImageFeatures) for entry in entries):
            return entries
        check_pixels(entries, self.get_vision_tower().config.image_size)
        with self.clock.stage("vision"):
            return self.model.encode(entries, image_sizes, modalities, self.pruner)

    # ------------------------------------------------------------------ prompts

    @in_turn
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
        questions: Sequence[str] | None = None,
    ) -> Prepared:
        """Replace each image placeholder by the visual tokens that Stage 1 keeps.

        Args:
            input_ids: (B, T) with :data:`IMAGE_TOKEN_INDEX` where an image or video goes.
            position_ids: None, or anything to have those of the new prompt returned.
            attention_mask: (B, T), 1 for real tokens; None when nothing is padded.
            past_key_values: a cache to use; an empty one is created when a method works inside the
                decoder.
            labels: (B, T) or None.
            images: see :meth:`encode_images`; images of all samples in order of appearance.
            image_sizes: see :meth:`encode_images`.
            modalities: see :meth:`encode_images`.
            padding_side: ``"left"`` or ``"right"``; the checkpoint's own when left out.
            questions: what each of the B prompts asks, in words; for methods that read it with
                CLIP's text tower.

        Returns:
            As the original: (input_ids, position_ids, attention_mask, past_key_values,
            inputs_embeds, labels), where input_ids is None once embeddings replace it. The cache
            carries the state of Stage 2.
        """
        self._latest.put(None)
        continues = seen_tokens(past_key_values) > 0
        if images is None or (continues and input_ids.shape[1] == 1):
            refuse_placeholders(input_ids)
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        real = stated_tokens(input_ids, attention_mask)
        prompts = self._read_prompts(
            input_ids, real, labels, images, image_sizes, modalities, questions
        )
        side = padding_side or self.config.tokenizer_padding_side
        embeds, spans, labels, past_key_values = self._padded(prompts, side, past_key_values)
        if position_ids is not None:
            position_ids = (spans.valid.cumsum(dim=1) - 1).clamp_min(0)
        return None, position_ids, padding_mask(spans), past_key_values, embeds, labels

    def _read_prompts(
        self,
        input_ids: Tensor,
        real: Tensor,
        labels: Tensor | None,
        images: Images,
        image_sizes: Sequence[Size] | None,
        modalities: Sequence[str] | None,
        questions: Sequence[str] | None,
    ) -> list[SplicedPrompt]:
        """Encode the images, prune and splice; see :meth:`prepare_inputs_labels_for_multimodal`."""
        visuals = self.encode_images(images, image_sizes, modalities)
        ids = [row[keep] for row, keep in zip(input_ids, real, strict=True)]
        targets = [
            None if labels is None else labels[index][keep] for index, keep in enumerate(real)
        ]
        check_ids(ids, len(visuals), self.vocab_size)
        with self.clock.stage("selection"):
            prompts = whole_prompts(ids, targets, visuals, self.get_input_embeddings())
            similarities = None
            if "clip_similarity" in self.pruner.needs and self.clip_text is not None:
                similarities = clip_similarities(self.clip_text, prompts, questions)
            return prune_prompts(prompts, self.pruner, similarities)

    def _begin(
        self, prompts: Sequence[SplicedPrompt], spans: Spans, cached: int = 0
    ) -> DecoderPruning:
        """Return the state of Stage 2 for prompts whose first ``cached`` keys are stored."""
        length, limit = spans.kinds.shape[1], self.config.max_position_embeddings
        if length > limit:
            raise PromptTooLongError(
                f"prompt of {length} tokens is longer than the {limit} the model can read."
            )
        state = DecoderPruning(self.pruner, spans, self.config.num_hidden_layers, cached)
        images = [tuple(visual.stats for visual in prompt.visuals) for prompt in prompts]
        self._latest.put((images, state))
        return state

    def _padded(
        self, prompts: Sequence[SplicedPrompt], side: str, past_key_values: Cache | None
    ) -> tuple[Tensor, Spans, Tensor | None, Cache | None]:
        """Return the prompts as one batch, their labels, and a cache with the state of Stage 2."""
        embeds, spans, labels = pad_prompts(prompts, side)
        state = self._begin(prompts, spans)
        if state.probe_layers:
            if seen_tokens(past_key_values) > 0:
                raise TodreError(
                    "past_key_values already holds tokens; withdrawal inside the decoder starts "
                    "with an empty cache: set probe_depths=() for images of later turns."
                )
            if past_key_values is None:
                past_key_values = PrunedCache(self.config, state)
            else:
                past_key_values = PrunedCache.convert(past_key_values, state)
        return embeds, spans, labels, past_key_values

    def _after_prefixes(
        self, prompts: Sequence[SplicedPrompt], store: PrefixStore
    ) -> tuple[Tensor, Spans, Cache]:
        """Return the prompts as one batch, and a cache that holds them up to their questions."""
        store.claim(self)
        embeds, spans, _ = pad_prompts(prompts, "left", by_part=True)
        state = self._begin(prompts, spans, cached=max(prompt.prefix_len for prompt in prompts))
        prefixes = [
            Prefix(prompt.prefix_ids, prompt.visuals, prompt.embeds[: prompt.prefix_len])
            for prompt in prompts
        ]
        with self.clock.stage("prefill"):
            cache = store.cache(prefixes, self.model, state)
        return embeds, spans, cache

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
        logits_to_keep: int | Tensor = 0,
        questions: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits for prompts with images, or run one step of a generation.

        Logits cover the prompt as the decoder saw it: shorter than unpruned after Stage 1. When
        Stage 2 withdrew tokens, only the remaining ones have logits, right-aligned in a batch.
        """
        if images is None and input_ids is not None and input_ids.shape[1] > 1:
            refuse_placeholders(input_ids)
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
                questions=questions,
            )
            input_ids, position_ids, attention_mask, past_key_values, inputs_embeds, labels = (
                prepared
            )
        state = state_of(past_key_values)
        if state is not None and (self.training or labels is not None):
            raise TodreError(
                "training and losses are not supported with withdrawal inside the decoder; "
                "set probe_depths=()."
            )
        if use_cache is False:
            past_key_values = None
        is_prefill = seen_tokens(past_key_values) == 0 or inputs_embeds is not None
        with self.clock.stage("prefill" if is_prefill else "decode"):
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                labels=labels,
                use_cache=use_cache,
                # Named in the signature above, or `generate` would not ask for the last row only.
                logits_to_keep=logits_to_keep,
                pruning=state,
                **{CACHE_ARGUMENT: past_key_values},
                **kwargs,
            )

    @torch.no_grad()
    @in_turn
    def generate(
        self,
        inputs: Tensor | None = None,
        images: Images | None = None,
        image_sizes: Sequence[Size] | None = None,
        modalities: Sequence[str] | None = None,
        questions: Sequence[str] | None = None,
        prefixes: PrefixStore | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Generate answers.

        Args:
            inputs: (B, T) token ids with image placeholders, padded on either side where
                ``attention_mask`` says so.
            images: see :meth:`encode_images`.
            image_sizes: see :meth:`encode_images`.
            modalities: see :meth:`encode_images`.
            questions: see :meth:`prepare_inputs_labels_for_multimodal`.
            prefixes: where the keys of system prompt and images are kept for later questions about
                the same :class:`~llava_todre.stage1.select.ImageFeatures` objects; not read
                where it would change an answer, nor with beam search.
            kwargs: everything ``transformers``' ``generate`` takes, ``attention_mask`` included.

        Returns:
            (B, new tokens) ids, without the prompt, as the original. Without images: as
            ``transformers``.
        """
        if "inputs_embeds" in kwargs:
            raise TodreError("inputs_embeds is not accepted; give inputs and images.")
        if inputs is None:
            inputs = kwargs.pop("input_ids", None)
        kwargs = checked(self, kwargs)
        self._latest.put(None)
        if images is None:
            if inputs is not None and kwargs.get(CACHE_ARGUMENT) is None:
                stated_tokens(inputs, kwargs.get("attention_mask"))
            kwargs["inputs"] = inputs
        elif inputs is None:
            raise TodreError("inputs is missing; give the token ids together with images.")
        else:
            real = real_tokens(self, inputs, kwargs)
            prompts = self._read_prompts(
                inputs, real, None, images, image_sizes, modalities, questions
            )
            kwargs = self._arguments(prompts, prefixes, kwargs)
        own = self._latest.get()
        with finite_prefill(self):
            output: Tensor = super().generate(**kwargs)
        self._latest.put(own)  # whatever calls were made within this one
        return output

    def _arguments(
        self,
        prompts: Sequence[SplicedPrompt],
        prefixes: PrefixStore | None,
        kwargs: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Return what ``transformers``' ``generate`` is given in place of ids and images."""
        refuse(self, REFUSED_WITH_IMAGES, kwargs, "images")
        past_key_values = kwargs.get(CACHE_ARGUMENT)
        if prefixes is not None and past_key_values is None and self._may_share(prompts, kwargs):
            embeds, spans, past_key_values = self._after_prefixes(prompts, prefixes)
        else:
            embeds, spans, _, past_key_values = self._padded(prompts, "left", past_key_values)
        if past_key_values is not None and kwargs.get("cache_implementation") is not None:
            raise TodreError(
                f"cache_implementation {kwargs['cache_implementation']!r} cannot be combined "
                "with past_key_values or withdrawal inside the decoder; leave it out."
            )
        whole = max(prompt.whole_length for prompt in prompts)
        return {
            **kwargs,
            **shorter_lengths(self, kwargs, whole, embeds.shape[1]),
            CACHE_ARGUMENT: past_key_values,
            "inputs_embeds": embeds,
            "attention_mask": padding_mask(spans),
        }

    def _may_share(self, prompts: Sequence[SplicedPrompt], kwargs: Mapping[str, Any]) -> bool:
        """Return whether a call of ``generate`` with these settings can use stored prefixes."""
        return keeps_cache_rows(self, kwargs) and may_share(
            [prompt.kinds for prompt in prompts],
            [prompt.prefix_len for prompt in prompts],
            self.pruner,
            self.config.num_hidden_layers,
        )

    @property
    def decoder_shape(self) -> DecoderShape:
        """The decoder's dimensions, for counting FLOPs."""
        return DecoderShape.of(self.config)

    @property
    def last_stats(self) -> tuple[PruneStats, ...]:
        """What happened to each sample of the last call, if it had images.

        Of the calling thread; where it has made no call, of the last of any thread.
        """
        latest = self._latest.get()
        if latest is None:
            return ()
        images, state = latest
        return state.stats(images)

    @property
    def last_state(self) -> DecoderPruning | None:
        """The state of Stage 2 in the call that :attr:`last_stats` describes."""
        latest = self._latest.get()
        return None if latest is None else latest[1]
