"""One method on one stock model: what its ``generate`` does while a method is attached.

Symbols: B batch, L prompt length, M prompt length after pruning, D decoder width.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import DynamicCache

from llava_todre.errors import TodreError
from llava_todre.hf.capture import Captured, capture, decoder_of
from llava_todre.hf.decoder import withdrawing
from llava_todre.hf.deepstack import adding
from llava_todre.hf.families import family_of
from llava_todre.hf.family import STATES, Family
from llava_todre.hf.layout import Layout
from llava_todre.pruners import Pruner, Selection
from llava_todre.spans import Kind, Spans, VisualTokens, is_visual
from llava_todre.stats import ImageStats, PruneStats
from llava_todre.withdrawal import Withdrawal

_PLACEHOLDERS = {
    "image": ("image_token_id", "image_token_index"),
    "video": ("video_token_id", "video_token_index"),
}
_MANY = 10**9  # visual tokens: more than any image has
_NOTHING = Layout.of_slots(torch.empty(0, dtype=torch.int64), 0, 1)
_REFUSED = (
    "assistant_model",
    "assistant_early_exit",
    "prompt_lookup_num_tokens",
    "use_mtp",
    "prefill_chunk_size",
    "past_key_values",
    "custom_generate",
)
_REFUSED_INSIDE = ("cache_implementation",)  # together with a method inside the decoder


@dataclass(frozen=True)
class _Visual:
    """One image or video in the prompt of one sample."""

    layout: Layout
    columns: Tensor
    """(S,) where its tokens stand in the sample's prompt."""
    patches: slice
    """Its part of what was measured in the tower."""


@dataclass(frozen=True)
class _Prompt:
    """One sample after Stage 1."""

    columns: Tensor
    """(M,) kept positions of the original prompt."""
    embeds: Tensor
    """(M, D)."""
    kinds: Tensor
    """(M,) int8 of :class:`~llava_todre.spans.Kind`."""
    line: Tensor
    """(M,) see :class:`~llava_todre.spans.Spans`."""
    images: tuple[ImageStats, ...]


class _Streamer:
    """Passes on what is generated, behind the prompt as it was given."""

    def __init__(self, streamer: Any, prompt: Tensor) -> None:
        self.streamer = streamer
        self.ahead = [prompt.cpu()]

    def put(self, value: Tensor) -> None:
        self.streamer.put(self.ahead.pop() if self.ahead else value)

    def end(self) -> None:
        self.streamer.end()


class Attachment:
    """A method at work on a model."""

    def __init__(self, model: Any, pruner: Pruner, own: Any) -> None:
        """Check that the method and the model fit each other.

        Args:
            model: a model of transformers.
            pruner: the method.
            own: the model's ``generate`` without any method.

        Raises:
            TodreError: the model's family is not supported, or cannot give what the method needs.
        """
        self.model, self.pruner, self.own = model, pruner, own
        self.family: Family = family_of(model)
        for need in pruner.needs:
            quantity = need[0] if isinstance(need, tuple) else need
            served = self.family.served
            if quantity not in served:
                raise TodreError(
                    f"{type(pruner).__name__} needs {quantity}, which models of the family "
                    f"{self.family.name} do not give; allowed needs: {', '.join(sorted(served))}."
                )
        deep = self.family.deep_layers(model)
        probes = pruner.probe_layers(decoder_of(model).config.num_hidden_layers)
        if probes and min(probes) < deep:
            raise TodreError(
                f"{type(pruner).__name__} drops tokens after decoder layer {min(probes)}, but the "
                f"family {self.family.name} adds image features to them up to layer {deep - 1}; "
                f"allowed: after layer {deep} or later."
            )
        self.last_stats: tuple[PruneStats, ...] = ()
        """What happened to each sample of the last call."""

    # ------------------------------------------------------------------ generate

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Do what the model's own ``generate`` does, with fewer visual tokens."""
        if args:
            given = inspect.signature(self.own).bind_partial(inputs, *args).arguments
            kwargs |= {key: value for key, value in given.items() if key != "inputs"}
        self.last_stats = ()
        ids = kwargs.get("input_ids") if inputs is None else inputs
        layers = decoder_of(self.model).config.num_hidden_layers
        probes = self.pruner.probe_layers(layers)
        if ids is None or kwargs.get("inputs_embeds") is not None:
            return self.own(inputs, **kwargs)
        mask = kwargs.get("attention_mask")
        real = self._real(ids, kwargs) if mask is None else mask.bool()
        if all(kwargs.get(key) is None for key in self.family.inputs):
            if probes or self.pruner.will_select(_MANY):
                self._refuse(("past_key_values",), kwargs)  # it may be that of a pruned call
            self.last_stats = _untouched(real, [[] for _ in ids], layers)
            return self.own(inputs, **kwargs)
        if not probes and not self._selects(ids):
            shown = {**kwargs, "input_ids": ids, "attention_mask": real.long()}
            try:
                self.last_stats = _untouched(real, self._visuals(ids, real, shown), layers)
            except TodreError:  # nothing is pruned, so nothing is refused either
                self.last_stats = ()
            return self.own(inputs, **kwargs)
        self._check(kwargs, inside=bool(probes))
        for key in ("input_ids", "attention_mask"):
            kwargs.pop(key, None)
        with torch.no_grad():
            return self._generate(ids, real, kwargs)

    def _selects(self, ids: Tensor) -> bool:
        lengths = (ids[:, :, None] == self._placeholder_ids(ids)).any(-1).sum(dim=1)
        # A budget that keeps the visual tokens of a whole prompt keeps those of each image.
        return any(self.pruner.will_select(int(length)) for length in lengths)

    def _refuse(self, keys: Iterable[str], kwargs: Mapping[str, Any]) -> None:
        for key in keys:
            if self._setting(key, kwargs) not in (None, False):
                raise TodreError(f"{key} is not supported together with pruning; leave it out.")

    def _check(self, kwargs: Mapping[str, Any], inside: bool) -> None:
        """Refuse what would be answered wrongly.

        Args:
            kwargs: arguments of ``generate``.
            inside: whether the method works inside the decoder.
        """
        if self.model.training:
            raise TodreError("a model in training mode is not pruned; call model.eval() first.")
        self._refuse((*_REFUSED, *(_REFUSED_INSIDE if inside else ())), kwargs)
        if inside and self._setting("use_cache", kwargs) is False:
            raise TodreError(
                "use_cache False is not supported with pruning inside the decoder; allowed: True, "
                "or a method that only selects."
            )
        if inside and any(DynamicCache(config=decoder_of(self.model).config).is_sliding):
            raise TodreError(
                "a decoder with sliding_window cannot drop tokens per layer; allowed: a method "
                "that only selects."
            )

    def _setting(self, key: str, kwargs: Mapping[str, Any]) -> Any:
        """Return what ``generate`` takes for ``key``: its argument, or what configurations say."""
        for source in (kwargs.get("generation_config"), self.model.generation_config):
            if kwargs.get(key) is None and getattr(source, key, None) is not None:
                return getattr(source, key)
        return kwargs.get(key)

    def _real(self, ids: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """Return (B, L) bool, which tokens count when no mask is given, as transformers does."""
        pad, eos = self._setting("pad_token_id", kwargs), self._setting("eos_token_id", kwargs)
        if pad is None or pad in (eos if isinstance(eos, list) else [eos]):
            return torch.ones_like(ids, dtype=torch.bool)
        return ids != pad

    def _generate(self, ids: Tensor, real: Tensor, kwargs: dict[str, Any]) -> Any:
        needs = [need for need in self.pruner.needs if isinstance(need, tuple)]
        if "vision_features" in self.pruner.needs:
            assert self.family.feature_layer is not None, "checked when it was attached"
            needs.append((STATES, self.family.feature_layer(self.model)))
        given = {"input_ids": ids, "attention_mask": real.long(), **kwargs}
        visuals = self._visuals(ids, real, given)
        captured = capture(self.model, self.family, given, needs)
        prompts = [
            self._prune(row, ids, real, captured, of_row) for row, of_row in enumerate(visuals)
        ]
        settings = {key: value for key, value in kwargs.items() if key not in self._consumed}
        short, spans = _left_padded(prompts, ids, self._pad_id(kwargs))
        decoder = decoder_of(self.model)
        withdrawal = Withdrawal(self.pruner, spans, decoder.config.num_hidden_layers)
        if captured.position_ids is not None:
            short["position_ids"] = _positions(captured.position_ids, prompts)
        if withdrawal.probe_layers:
            cache = DynamicCache(config=decoder.config)
            cache.withdrawal = withdrawal
            short["past_key_values"] = cache
        if kwargs.get("streamer") is not None:
            settings["streamer"] = _Streamer(kwargs["streamer"], ids)
        removed = ids.shape[1] - short["input_ids"].shape[1]
        for key, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            length = self._setting(key, kwargs)
            if length is not None and self._setting(new, kwargs) is None:
                settings[key] = max(1, length - removed)
        with ExitStack() as stack:
            if withdrawal.probe_layers:
                stack.enter_context(withdrawing(decoder))
            if captured.deepstack is not None:
                kept = _deep_features(captured, prompts)
                stack.enter_context(adding(decoder, is_visual(spans.kinds), kept))
            output = self.own(**short, **settings)
        self.last_stats = _stats(prompts, withdrawal)
        return _with_whole_prompt(output, ids, short["input_ids"].shape[1])

    @property
    def _consumed(self) -> set[str]:
        return {*self.family.inputs, "mm_token_type_ids", "position_ids"}

    # ------------------------------------------------------------------ prompts

    def _placeholder_ids(self, like: Tensor) -> Tensor:
        return torch.tensor(list(self._placeholders.values()), device=like.device)

    @property
    def _placeholders(self) -> dict[str, int]:
        found = {}
        for modality, names in _PLACEHOLDERS.items():
            ids = [getattr(self.model.config, name, None) for name in names]
            known = [token for token in ids if isinstance(token, int)]
            if known:
                found[modality] = known[0]
        return found

    def _visuals(self, ids: Tensor, real: Tensor, inputs: Mapping[str, Any]) -> list[list[_Visual]]:
        """Return the images and videos of every sample, in the order of their tokens."""
        layouts = self.family.layouts(self.model, inputs)
        start, parts = 0, {}
        for modality in ("image", "video"):  # the order in which the tower sees them
            ends = []
            for layout in layouts.get(modality, ()):
                ends.append((layout, slice(start, start + layout.num_patches)))
                start += layout.num_patches
            parts[modality] = iter(ends)
        visuals: list[list[_Visual]] = []
        for row, keep in zip(ids, real, strict=True):
            found = []
            for modality, token in self._placeholders.items():
                columns = ((row == token) & keep).nonzero()[:, 0]
                while len(columns):
                    layout, patches = next(parts[modality], (_NOTHING, slice(0)))
                    if not 0 < len(layout) <= len(columns):
                        raise TodreError(
                            f"prompt has {len(columns)} {modality} tokens where its next "
                            f"{modality} has {len(layout)}; allowed: what the model's processor "
                            "makes of the same images."
                        )
                    found.append(_Visual(layout, columns[: len(layout)], patches))
                    columns = columns[len(layout) :]
            visuals.append(sorted(found, key=lambda visual: int(visual.columns[0])))
        return visuals

    def _prune(
        self, row: int, ids: Tensor, real: Tensor, captured: Captured, visuals: list[_Visual]
    ) -> _Prompt:
        """Stage 1 on every image of a sample."""
        embeds = captured.embeds[row]
        stays = real[row].clone()
        kinds = torch.full_like(ids[row], Kind.SYSTEM, dtype=torch.int8)
        line = torch.full_like(ids[row], -1)
        images, num_lines = [], 0
        is_visual = torch.zeros_like(stays)
        for visual in visuals:
            is_visual[visual.columns] = True
        if visuals:
            kinds[int(visuals[0].columns[0]) :] = Kind.TEXT
        text = embeds[(kinds == Kind.TEXT) & ~is_visual & real[row]]
        for visual in visuals:
            layout, columns = visual.layout, visual.columns
            tokens = self._tokens(visual, embeds, captured, text)
            selection = Selection(torch.arange(len(tokens)))
            if self.pruner.will_select(len(tokens)):
                selection = self.pruner.select(tokens, self.pruner.budget(len(tokens)))
            kept = selection.keep_idx.cpu()
            if selection.features is not None:
                embeds = embeds.clone()
                places = columns[~layout.is_newline][kept]
                embeds[places] = selection.features.to(embeds)
            keep = layout.keep(kept)
            stays[columns] = keep.to(stays.device)
            kinds[columns] = torch.where(layout.is_newline, Kind.NEWLINE, Kind.VISUAL).to(kinds)
            own = torch.where(layout.line < 0, -1, layout.line + num_lines)
            line[columns] = own.to(line)
            images.append(_image_stats(layout, kept))
            num_lines += images[-1].num_newlines
        columns = stays.nonzero()[:, 0]
        return _Prompt(columns, embeds[columns], kinds[columns], line[columns], tuple(images))

    def _tokens(
        self, visual: _Visual, embeds: Tensor, captured: Captured, text: Tensor
    ) -> VisualTokens:
        """Return what a method selects from."""
        layout, device = visual.layout, embeds.device

        def of_tokens(measured: Tensor) -> Tensor:  # mean over the patches under a token
            patches = measured[visual.patches][layout.sources.to(measured.device)]  # (N, C, ...)
            if layout.weights is None:
                return patches.mean(dim=1)
            weights = layout.weights.to(patches)
            return torch.einsum("nc,nc...->n...", weights, patches)

        measured = dict(captured.measured)
        given: dict[str, Any] = {}
        for need in [need for need in measured if need[0] == STATES]:
            states = measured.pop(need)  # (views of all images, 1 + P, W)
            num_patches = states.shape[1] - 1
            views = slice(visual.patches.start // num_patches, visual.patches.stop // num_patches)
            given = {
                "vision_features": of_tokens(states[:, 1:].flatten(0, 1)).to(device),
                "cls_features": states[views, 0].to(device),
                "project": self.model.model.multi_modal_projector,
            }
        return VisualTokens(
            features=embeds[visual.columns[~layout.is_newline]],
            view=layout.view.to(device),
            row=layout.row.to(device),
            column=layout.column.to(device),
            is_video=layout.is_video,
            grid=layout.grid,
            vision={need: of_tokens(value).to(device) for need, value in measured.items()},
            text_embeds=text if "text_embeds" in self.pruner.needs else None,
            **given,
        )

    def _pad_id(self, kwargs: Mapping[str, Any]) -> int:
        pad, eos = self._setting("pad_token_id", kwargs), self._setting("eos_token_id", kwargs)
        pad = eos if pad is None else pad
        return int(pad[0] if isinstance(pad, list) else pad or 0)


def _untouched(real: Tensor, visuals: list[list[_Visual]], layers: int) -> tuple[PruneStats, ...]:
    """Return the statistics of a call in which nothing is dropped."""
    found = []
    for of_sample, length in zip(visuals, real.sum(dim=1).tolist(), strict=True):
        every = [torch.arange(len(visual.layout.view)) for visual in of_sample]
        images = tuple(
            _image_stats(visual.layout, kept) for visual, kept in zip(of_sample, every, strict=True)
        )
        shown = sum(len(visual.columns) for visual in of_sample)
        newlines = sum(image.num_newlines for image in images)
        found.append(PruneStats(images, newlines, (), (length,) * layers, (shown,) * layers))
    return tuple(found)


def _image_stats(layout: Layout, kept: Tensor) -> ImageStats:
    patches = layout.view * layout.side**2 + layout.row * layout.side + layout.column
    return ImageStats(patches, layout.side, kept, int(layout.is_newline.sum()))


def _stats(prompts: list[_Prompt], withdrawal: Withdrawal) -> tuple[PruneStats, ...]:
    copies = len(withdrawal.probes) // len(prompts)  # beam search repeats samples
    return tuple(
        PruneStats(
            images=prompt.images,
            newline_tokens=int((prompt.kinds == Kind.NEWLINE).sum()),
            probes=tuple(withdrawal.probes[index * copies]),
            prompt_tokens_per_layer=withdrawal.tokens_per_layer(index * copies),
            visual_tokens_per_layer=withdrawal.visual_tokens_per_layer(index * copies),
        )
        for index, prompt in enumerate(prompts)
    )


def _left_padded(
    prompts: list[_Prompt], ids: Tensor, pad_id: int
) -> tuple[dict[str, Tensor], Spans]:
    """Return arguments of ``generate`` for the pruned batch, and what its positions hold."""

    def pad(rows: list[Tensor], value: float) -> Tensor:
        return pad_sequence(rows, True, value, padding_side="left")

    kinds = pad([prompt.kinds for prompt in prompts], Kind.PADDING)
    kept = [row[prompt.columns] for row, prompt in zip(ids, prompts, strict=True)]
    spans = Spans(
        kinds,
        pad([prompt.line for prompt in prompts], -1),
        tuple(tuple(len(image.keep_idx) for image in prompt.images) for prompt in prompts),
    )
    arguments = {
        "input_ids": pad(kept, pad_id),
        "inputs_embeds": pad([prompt.embeds for prompt in prompts], 0.0),
        "attention_mask": spans.valid.long(),
    }
    return arguments, spans


def _positions(position_ids: Tensor, prompts: list[_Prompt]) -> Tensor:
    """Return (4, B, M): plain positions, then those in time, height and width of the kept tokens.

    Args:
        position_ids: (3 or 4, B, L) of the whole prompts.
        prompts: B of them.
    """
    spatial = position_ids[-3:]
    rows = [spatial[:, row, prompt.columns].T for row, prompt in enumerate(prompts)]
    kept = pad_sequence(rows, True, 0, padding_side="left")  # (B, M, 3)
    plain = [torch.arange(len(prompt.columns), device=kept.device) for prompt in prompts]
    counted = pad_sequence(plain, True, 0, padding_side="left")
    return torch.cat([counted[None], kept.permute(2, 0, 1)])


def _deep_features(captured: Captured, prompts: list[_Prompt]) -> list[Tensor]:
    """Return what is added behind the first decoder layers, for the kept tokens of all samples."""
    assert captured.deepstack is not None and captured.deepstack_at is not None
    stays = torch.zeros_like(captured.deepstack_at)
    for row, prompt in zip(stays, prompts, strict=True):
        row[prompt.columns] = True
    kept = stays[captured.deepstack_at]
    return [features[kept.to(features.device)] for features in captured.deepstack]


def _with_whole_prompt(output: Any, ids: Tensor, short: int) -> Any:
    """Put the original prompt in front of what was generated, as ``generate`` returns it."""
    is_tensor = isinstance(output, Tensor)
    sequences = output if is_tensor else output.sequences
    prompt = ids.repeat_interleave(len(sequences) // len(ids), dim=0)
    whole = torch.cat([prompt.to(sequences), sequences[:, short:]], dim=1)
    if is_tensor:
        return whole
    output.sequences = whole
    return output
