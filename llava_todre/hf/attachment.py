"""One method on one stock model: what its ``generate`` does while a method is attached.

Symbols: B batch, L prompt length with every visual token.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llava_todre.errors import TodreError
from llava_todre.finite import finite_prefill, require_finite_pixels
from llava_todre.hf.arguments import check, fitting_inputs
from llava_todre.hf.capture import DecoderInputs, Need, capture, decoder_of
from llava_todre.hf.encoded import (
    EncodedImage,
    encoded_images,
    in_prompts,
    layouts_of,
    position_inputs,
    with_deepstack,
)
from llava_todre.hf.families import family_of
from llava_todre.hf.family import STATES, Family
from llava_todre.hf.generate_output import Streamer, with_whole_prompt
from llava_todre.hf.prompts import (
    Visuals,
    features_of,
    find_visuals,
    placeholders_of,
    prune_batch,
    unpruned_stats,
)
from llava_todre.hf.pruned_call import PrunedCall
from llava_todre.locking import Latest, turn
from llava_todre.pruners import Pruner
from llava_todre.settings import checked, real_tokens, refuse
from llava_todre.stage1.select import ImageFeatures
from llava_todre.stage2.cache import CACHE_ARGUMENT
from llava_todre.stage2.hooks import require_readable
from llava_todre.stage2.prefix import PrefixStore
from llava_todre.stats import PruneStats

MANY = 10**9  # visual tokens: more than any image has

Outcome = tuple[Any, tuple[PruneStats, ...]]
"""What ``generate`` returns, and what happened to each sample."""
Read = tuple[Tensor, Tensor, Visuals]
"""(B, L) ids, (B, L) bool which are not padding, and the images of each prompt."""


class Attachment:
    """A method that is active on a model."""

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
        self.family.require(model, pruner)
        self.num_layers: int = decoder_of(model).config.num_hidden_layers
        self.probe_layers = pruner.probe_layers(self.num_layers)
        deep = self.family.deep_layers(model)
        if self.probe_layers:
            require_readable(decoder_of(model))
        if self.probe_layers and min(self.probe_layers) < deep:
            raise TodreError(
                f"{type(pruner).__name__} must drop tokens after decoder layer {deep} or later, "
                f"as the family {self.family.name} adds image features to them up to layer "
                f"{deep - 1}, got layer {min(self.probe_layers)}."
            )
        self._last = Latest[tuple[PruneStats, ...]](())

    @property
    def last_stats(self) -> tuple[PruneStats, ...]:
        """What happened to each sample of this thread's last call, or of any where it made none."""
        return self._last.get()

    # ------------------------------------------------------------------ generate

    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        encoded: Sequence[EncodedImage] | None = None,
        prefixes: PrefixStore | None = None,
        **kwargs: Any,
    ) -> Any:
        """Do what the model's own ``generate`` does, with fewer visual tokens.

        Args:
            inputs: as in the model's own.
            args: as in the model's own.
            encoded: the images and videos of all prompts, from :meth:`encode`, in order of
                appearance; nothing else then describes them.
            prefixes: where the keys of prompts up to their images are kept for later questions
                about the same encoded images; not read where it would change an answer.
            kwargs: as in the model's own.
        """
        if args:
            signature = inspect.signature(self.own)
            signature.bind_partial(inputs, *args, **kwargs)  # raises where one is given twice
            given = signature.bind_partial(inputs, *args).arguments
            kwargs |= {key: value for key, value in given.items() if key != "inputs"}
        if prefixes is not None and encoded is None:
            raise TodreError("prefixes is given without encoded; give both or neither.")
        with turn(self.model), finite_prefill(self.model):
            self._last.put(())
            kwargs = checked(self.model, kwargs)
            ids: Any = kwargs.get("input_ids") if inputs is None else inputs
            if encoded is None:
                output, stats = self._fresh(inputs, ids, kwargs)
            else:
                output, stats = self._from_encoded(ids, kwargs, encoded, prefixes)
            self._last.put(stats)  # whatever calls were made within this one
            return output

    @torch.no_grad()
    def encode(self, **inputs: Any) -> list[EncodedImage]:
        """Run tower and projector for the images and videos of one prompt.

        Args:
            inputs: what the processor returns for it.
        """
        with turn(self.model):
            ids = inputs.get("input_ids")
            if not isinstance(ids, Tensor) or ids.ndim != 2 or len(ids) != 1:
                got = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
                raise TodreError(f"input_ids must be those of one prompt, (1, L), got {got}.")
            given = {**inputs, "attention_mask": self._real(ids, inputs).long()}
            _, (visuals,), captured = self._captured_prompts(ids, given)
            (features,) = self._features([visuals], captured)
            return encoded_images(visuals, features, captured, inputs, self.family.positioned_by)

    def _fresh(self, inputs: Tensor | None, ids: Any, kwargs: dict[str, Any]) -> Outcome:
        """Prune a call that brings its own images, if it does."""
        shows = any(kwargs.get(key) is not None for key in self.family.inputs)
        if self.probe_layers or self.pruner.will_select(MANY):
            # The cache may be that of a pruned call, and in embeddings no image can be found.
            refuse(self.model, (CACHE_ARGUMENT, *(("inputs_embeds",) if shows else ())), kwargs)
        if ids is None or kwargs.get("inputs_embeds") is not None:
            return self.own(inputs, **kwargs), ()
        real = self._real(ids, kwargs)
        given = {**kwargs, "input_ids": ids, "attention_mask": real.long()}
        if not shows:
            stats = unpruned_stats(real, [[] for _ in ids], self.num_layers)
            return self.own(inputs, **kwargs), stats
        if not self.probe_layers and not self._selects(ids):
            self._check_pixels(kwargs)
            try:
                with fitting_inputs(self.model):
                    _, real, visuals = self._read(ids, real, given)
                stats = unpruned_stats(real, visuals, self.num_layers)
            except TodreError:  # nothing is pruned, so nothing is refused either
                stats = ()
            return self.own(inputs, **kwargs), stats
        check(self.model, decoder_of(self.model), kwargs, inside=bool(self.probe_layers))
        with torch.no_grad():
            read, visuals, captured = self._captured_prompts(ids, given)
            features = self._features(visuals, captured)
            return self._run(given, read, visuals, captured, features)

    def _from_encoded(
        self,
        ids: Any,
        kwargs: dict[str, Any],
        encoded: Sequence[EncodedImage],
        prefixes: PrefixStore | None,
    ) -> Outcome:
        """Prune a call whose images were encoded before."""
        check(self.model, decoder_of(self.model), kwargs, inside=bool(self.probe_layers))
        pixels = [key for key in self.family.inputs if "pixel" in key]
        refuse(self.model, [*pixels, "inputs_embeds"], kwargs, "encoded")
        shown: Sequence[Any] = encoded
        for image in shown:
            if not isinstance(image, EncodedImage):
                raise TodreError(f"encoded must hold what encode returns, got {image!r:.60}.")
        store: Any = prefixes
        if not isinstance(store, PrefixStore | None):
            kind = type(store).__name__
            raise TodreError(f"prefixes must be a PrefixStore (cache.prefixes), got {kind}.")
        real = self._real(ids, kwargs)
        visuals = find_visuals(ids, real, self._placeholders, layouts_of(encoded))
        images = in_prompts(encoded, visuals)
        given = {key: kwargs[key] for key in kwargs.keys() - self._consumed}
        given |= {"input_ids": ids, "attention_mask": real.long()}
        with torch.no_grad():
            read = given | position_inputs(ids, visuals, images)
            captured = with_deepstack(capture(self.model, self.family, read, ()), visuals, images)
            features = [[image.features for image in row] for row in images]
            return self._run(given, (ids, real), visuals, captured, features, prefixes)

    def _run(
        self,
        given: dict[str, Any],
        read: tuple[Tensor, Tensor],
        visuals: Visuals,
        captured: DecoderInputs,
        features: list[list[ImageFeatures]],
        prefixes: PrefixStore | None = None,
    ) -> Outcome:
        """Prune the prompts and call ``generate`` with what is left.

        Args:
            given: its arguments as they came.
            read: (B, L) ids, and which of them count.
            visuals: where the images stand in each prompt.
            captured: what the decoder would have read of the prompts.
            features: the images of each prompt as Stage 1 reads them; released before generating.
            prefixes: a store of the prompts' first parts.
        """
        ids, real = read
        prompts = prune_batch(ids, real, visuals, captured.embeds, features, self.pruner)
        for of_prompt in features:
            of_prompt.clear()
        settings = {key: given[key] for key in given.keys() - self._consumed}
        call = PrunedCall.of(self.model, self.pruner, prompts, captured, ids, settings, prefixes)
        with call.hooks(decoder_of(self.model)):
            return self._call(given, call.short, call.settings), call.stats

    def _captured_prompts(
        self, ids: Tensor, given: dict[str, Any]
    ) -> tuple[tuple[Tensor, Tensor], Visuals, DecoderInputs]:
        """Return ids and which of them count, the images, and what the decoder would have read."""
        self._check_pixels(given)
        with fitting_inputs(self.model):
            ids, real, visuals = self._read(ids, given["attention_mask"].bool(), given)
            captured = self._captured(given, self._needs, ids.shape[1])
        return (ids, real), visuals, captured

    def _check_pixels(self, inputs: Mapping[str, Any]) -> None:
        for key in self.family.inputs:
            require_finite_pixels(key, inputs.get(key))

    def _selects(self, ids: Tensor) -> bool:
        placeholders = torch.tensor(list(self._placeholders.values()), device=ids.device)
        lengths = torch.isin(ids, placeholders).sum(dim=1)
        # A budget that keeps the visual tokens of a whole prompt keeps those of each image.
        return any(self.pruner.will_select(int(length)) for length in lengths)

    def _real(self, ids: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """Return (B, L) bool, which tokens count."""
        return real_tokens(self.model, ids, kwargs)

    def _features(self, visuals: Visuals, captured: DecoderInputs) -> list[list[ImageFeatures]]:
        """Return the images of each prompt as Stage 1 reads them."""
        project, needs = partial(self.family.project, self.model), frozenset(self.pruner.needs)
        return [
            [features_of(each, row, captured, needs, project) for each in of_row]
            for row, of_row in enumerate(visuals)
        ]

    @property
    def _needs(self) -> list[Need]:
        """What is measured in the tower."""
        needs = [need for need in self.pruner.needs if isinstance(need, tuple)]
        if "vision_features" in self.pruner.needs:
            assert self.family.feature_layer is not None, "checked when it was attached"
            needs.append((STATES, self.family.feature_layer(self.model)))
        return needs

    @property
    def _consumed(self) -> set[str]:
        """Arguments of ``generate`` that the pruned call has no use for, or gets its own of."""
        return {*self.family.inputs, "mm_token_type_ids", "input_ids", "attention_mask"}

    @property
    def _placeholders(self) -> dict[str, int]:
        return placeholders_of(self.model.config)

    # ------------------------------------------------------------------ dialect

    def _read(self, ids: Tensor, real: Tensor, inputs: Mapping[str, Any]) -> Read:
        """Return the prompts with a place for every token, which of them count, and the images."""
        layouts = self.family.layouts(self.model, inputs)
        return ids, real, find_visuals(ids, real, self._placeholders, layouts)

    def _captured(
        self, given: Mapping[str, Any], needs: Sequence[Need], length: int
    ) -> DecoderInputs:
        """Return the prompts as the decoder would have read them, ``length`` tokens each."""
        del length
        return capture(self.model, self.family, given, needs)

    def _call(
        self, given: Mapping[str, Any], short: dict[str, Any], settings: dict[str, Any]
    ) -> Any:
        """Return what ``generate`` is to return.

        Args:
            given: its arguments as they came.
            short: those that describe the pruned prompts.
            settings: all others.
        """
        if settings.get("streamer") is not None:
            settings["streamer"] = Streamer(settings["streamer"], given["input_ids"])
        output = self.own(**short, **settings)
        return with_whole_prompt(output, given["input_ids"], short["input_ids"].shape[1])
