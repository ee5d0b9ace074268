"""One method on one stock model: what its ``generate`` does while a method is attached."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from llava_todre.errors import TodreError
from llava_todre.finite import finite_prefill, require_finite_pixels
from llava_todre.hf.arguments import check
from llava_todre.hf.capture import DecoderInputs, Need, capture, decoder_of
from llava_todre.hf.deepstack import adding
from llava_todre.hf.families import family_of
from llava_todre.hf.family import STATES, Family
from llava_todre.hf.generate_output import Streamer, with_whole_prompt
from llava_todre.hf.prompts import (
    Visual,
    find_visuals,
    kept_deep_features,
    kept_positions,
    left_padded,
    prune_prompt,
    untouched,
)
from llava_todre.locking import Latest, turn, uncompiled
from llava_todre.model.checkpoint import first_line
from llava_todre.pruners import Pruner
from llava_todre.settings import checked, pad_id, real_tokens, refuse, setting, shorter_lengths
from llava_todre.spans import is_visual
from llava_todre.stage2 import DecoderPruning
from llava_todre.stage2.hooks import require_readable, withdrawing
from llava_todre.stats import PruneStats

_PLACEHOLDERS = {
    "image": ("image_token_id", "image_token_index"),
    "video": ("video_token_id", "video_token_index"),
}
_UNREADABLE = (
    *(AttributeError, IndexError, KeyError, OverflowError),
    *(RuntimeError, TypeError, ValueError),
)
MANY = 10**9  # visual tokens: more than any image has


Read = tuple[Tensor, Tensor, list[list[Visual]]]


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
            self.family.require(model, quantity, type(pruner).__name__)
        deep = self.family.deep_layers(model)
        probes = pruner.probe_layers(decoder_of(model).config.num_hidden_layers)
        if probes:
            require_readable(decoder_of(model))
        if probes and min(probes) < deep:
            raise TodreError(
                f"{type(pruner).__name__} drops tokens after decoder layer {min(probes)}, but the "
                f"family {self.family.name} adds image features to them up to layer {deep - 1}; "
                f"allowed: after layer {deep} or later."
            )
        self._last = Latest[tuple[PruneStats, ...]](())

    @property
    def last_stats(self) -> tuple[PruneStats, ...]:
        """What happened to each sample of this thread's last call, or of any where it made none."""
        return self._last.get()

    # ------------------------------------------------------------------ generate

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Do what the model's own ``generate`` does, with fewer visual tokens."""
        if args:
            signature = inspect.signature(self.own)
            signature.bind_partial(inputs, *args, **kwargs)  # raises where one is given twice
            given = signature.bind_partial(inputs, *args).arguments
            kwargs |= {key: value for key, value in given.items() if key != "inputs"}
        with turn(self.model), finite_prefill(self.model):
            self._last.put(())
            output, stats = self._in_turn(inputs, checked(self.model, kwargs))
            self._last.put(stats)  # whatever calls were made within this one
            return output

    def _in_turn(
        self, inputs: Tensor | None, kwargs: dict[str, Any]
    ) -> tuple[Any, tuple[PruneStats, ...]]:
        """Return what ``generate`` returns, and what happened to each sample."""
        ids = kwargs.get("input_ids") if inputs is None else inputs
        layers = decoder_of(self.model).config.num_hidden_layers
        probes = self.pruner.probe_layers(layers)
        shows = any(kwargs.get(key) is not None for key in self.family.inputs)
        if probes or self.pruner.will_select(MANY):
            # The cache may be that of a pruned call, and in embeddings no image can be found.
            refuse(self.model, ("past_key_values", *(("inputs_embeds",) if shows else ())), kwargs)
        if ids is None or kwargs.get("inputs_embeds") is not None:
            return self.own(inputs, **kwargs), ()
        real = self._real(ids, kwargs)
        for key in self.family.inputs:
            require_finite_pixels(key, kwargs.get(key))
        if not shows:
            return self.own(inputs, **kwargs), untouched(real, [[] for _ in ids], layers)
        if not probes and not self._selects(ids):
            shown = {**kwargs, "input_ids": ids, "attention_mask": real.long()}
            try:
                with self._fitting_inputs():
                    _, real, visuals = self._read(ids, real, shown)
                stats = untouched(real, visuals, layers)
            except TodreError:  # nothing is pruned, so nothing is refused either
                stats = ()
            return self.own(inputs, **kwargs), stats
        check(self.model, decoder_of(self.model), kwargs, inside=bool(probes))
        for key in ("input_ids", "attention_mask"):
            kwargs.pop(key, None)
        with torch.no_grad():
            return self._generate(ids, real, kwargs)

    def _selects(self, ids: Tensor) -> bool:
        placeholders = torch.tensor(list(self._placeholders.values()), device=ids.device)
        lengths = torch.isin(ids, placeholders).sum(dim=1)
        # A budget that keeps the visual tokens of a whole prompt keeps those of each image.
        return any(self.pruner.will_select(int(length)) for length in lengths)

    def _real(self, ids: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """Return (B, L) bool, which tokens count."""
        return real_tokens(self.model, ids, kwargs)

    def _generate(
        self, ids: Tensor, real: Tensor, kwargs: dict[str, Any]
    ) -> tuple[Any, tuple[PruneStats, ...]]:
        needs = [need for need in self.pruner.needs if isinstance(need, tuple)]
        if "vision_features" in self.pruner.needs:
            assert self.family.feature_layer is not None, "checked when it was attached"
            needs.append((STATES, self.family.feature_layer(self.model)))
        given = {"input_ids": ids, "attention_mask": real.long(), **kwargs}
        with self._fitting_inputs():
            ids, real, visuals = self._read(ids, real, given)
            captured = self._captured(given, needs, ids.shape[1])
        project = partial(self.family.project, self.model)
        prompts = [
            prune_prompt(self.pruner, captured, row, real[row], of_row, project)
            for row, of_row in enumerate(visuals)
        ]
        settings = {key: value for key, value in kwargs.items() if key not in self._consumed}
        short, spans = left_padded(prompts, ids, pad_id(self.model, kwargs))
        decoder = decoder_of(self.model)
        withdrawal = DecoderPruning(self.pruner, spans, decoder.config.num_hidden_layers)
        if captured.position_ids is not None:
            short["position_ids"] = kept_positions(captured.position_ids, prompts)
        if withdrawal.probe_layers:
            cache = DynamicCache(config=decoder.config)
            cache.withdrawal = withdrawal
            short["past_key_values"] = cache
            if setting(self.model, "cache_implementation", kwargs) is not None:
                settings["cache_implementation"] = None  # it is that cache
        pruned = short["input_ids"].shape[1]
        settings |= shorter_lengths(self.model, kwargs, ids.shape[1], pruned)
        with ExitStack() as stack:
            if withdrawal.probe_layers:
                stack.enter_context(withdrawing(decoder, withdrawal))
                # Layers of changing lengths: what was compiled would be compiled again and again.
                stack.enter_context(uncompiled())
            if captured.deepstack is not None:
                kept = kept_deep_features(captured, prompts)
                stack.enter_context(adding(decoder, is_visual(spans.kinds), kept))
            output = self._call(given, short, settings)
        return output, withdrawal.stats([prompt.images for prompt in prompts])

    @contextmanager
    def _fitting_inputs(self) -> Iterator[None]:
        """Raise one kind of error for inputs that the model's own code cannot read."""
        try:
            yield
        except (TodreError, torch.OutOfMemoryError):
            raise
        except _UNREADABLE as error:
            raise TodreError(
                f"inputs do not fit {type(self.model).__name__}, which says "
                f"{type(error).__name__}: {first_line(error)}; allowed: what its processor returns."
            ) from error

    @property
    def _consumed(self) -> set[str]:
        return {*self.family.inputs, "mm_token_type_ids"}

    @property
    def _placeholders(self) -> dict[str, int]:
        found = {}
        for modality, names in _PLACEHOLDERS.items():
            ids = [getattr(self.model.config, name, None) for name in names]
            known = [token for token in ids if isinstance(token, int)]
            if known:
                found[modality] = known[0]
        return found

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
