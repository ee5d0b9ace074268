"""One method on one stock model: what its ``generate`` does while a method is attached."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from llava_todre.errors import TodreError
from llava_todre.finite import finite_prefill, require_finite_pixels
from llava_todre.hf.arguments import check
from llava_todre.hf.capture import DecoderInputs, Need, capture, decoder_of
from llava_todre.hf.deepstack import adding
from llava_todre.hf.encoded import (
    EncodedImage,
    encoded_images,
    in_prompts,
    layouts_of,
    position_inputs,
    prefixes_of,
    with_deepstack,
)
from llava_todre.hf.families import family_of
from llava_todre.hf.family import STATES, Family
from llava_todre.hf.generate_output import Streamer, with_whole_prompt
from llava_todre.hf.prompts import Visual, features_of, find_visuals
from llava_todre.locking import Latest, turn, uncompiled
from llava_todre.model.checkpoint import first_line
from llava_todre.pruners import Pruner
from llava_todre.settings import (
    checked,
    keeps_cache_rows,
    pad_id,
    real_tokens,
    refuse,
    setting,
    shorter_lengths,
)
from llava_todre.spans import is_visual
from llava_todre.stage1.pack import (
    Prompt,
    SplicedPrompt,
    kept_deep_features,
    kept_positions,
    pad_prompts,
    padded,
    prune_prompts,
)
from llava_todre.stage1.select import ImageFeatures
from llava_todre.stage2 import DecoderPruning, PrunedCache
from llava_todre.stage2.cache import CACHE_ARGUMENT, has_sliding_window
from llava_todre.stage2.hooks import pruning_hooks, require_readable
from llava_todre.stage2.prefix import PrefixStore, may_share
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


Visuals = list[list[Visual]]
"""The images and videos of each sample, in the order of their first tokens."""
Read = tuple[Tensor, Tensor, Visuals]


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
        self.family.require(model, pruner)
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
            raise TodreError("prefixes is given without encoded; give both or none of them.")
        with turn(self.model), finite_prefill(self.model):
            self._last.put(())
            kwargs = checked(self.model, kwargs)
            if encoded is None:
                output, stats = self._in_turn(inputs, kwargs)
            else:
                output, stats = self._from_encoded(inputs, kwargs, encoded, prefixes)
            self._last.put(stats)  # whatever calls were made within this one
            return output

    @torch.no_grad()
    def encode(self, **inputs: Any) -> list[EncodedImage]:
        """Run tower and projector for the images and videos of one prompt.

        Args:
            inputs: what the processor returns for it.
        """
        with turn(self.model):
            ids = inputs["input_ids"]
            real = self._real(ids, inputs)
            for key in self.family.inputs:
                require_finite_pixels(key, inputs.get(key))
            given = {**inputs, "attention_mask": real.long()}
            with self._fitting_inputs():
                ids, real, (visuals,) = self._read(ids, real, given)
                captured = self._captured(given, self._needs, ids.shape[1])
            (features,) = self._features([visuals], captured)
            return encoded_images(visuals, features, captured, inputs, self.family.positioned_by)

    def _from_encoded(
        self,
        inputs: Tensor | None,
        kwargs: dict[str, Any],
        encoded: Sequence[EncodedImage],
        prefixes: PrefixStore | None,
    ) -> tuple[Any, tuple[PruneStats, ...]]:
        """Return what ``generate`` returns, and what happened to each sample."""
        ids: Any = kwargs.pop("input_ids", None) if inputs is None else inputs
        decoder = decoder_of(self.model)
        probes = self.pruner.probe_layers(decoder.config.num_hidden_layers)
        check(self.model, decoder, kwargs, inside=bool(probes))
        real = self._real(ids, kwargs)
        refuse(self.model, [key for key in self.family.inputs if "pixel" in key], kwargs, "encoded")
        kwargs = {key: kwargs[key] for key in kwargs.keys() - {"attention_mask", *self._consumed}}
        visuals = find_visuals(ids, real, self._placeholders, layouts_of(encoded))
        images = in_prompts(encoded, visuals)
        with torch.no_grad():
            given = {"input_ids": ids, "attention_mask": real.long(), **kwargs}
            given |= position_inputs(ids, visuals, images)
            captured = capture(self.model, self.family, given, ())
            captured = with_deepstack(captured, visuals, images)
            features = [[image.features for image in row] for row in images]
            prompts = self._stage1(ids, real, visuals, captured, features)
            if prefixes is not None and self._may_share(prompts, kwargs):
                prefixes.claim(self.model)
            else:
                prefixes = None
            return self._run(given, ids.shape[1], prompts, captured, kwargs, prefixes)

    def _may_share(self, prompts: Sequence[SplicedPrompt], kwargs: Mapping[str, Any]) -> bool:
        """Return whether a call of ``generate`` with these settings can use stored prefixes."""
        config = decoder_of(self.model).config
        return (
            keeps_cache_rows(self.model, kwargs)
            and not has_sliding_window(config)
            and may_share(
                [prompt.kinds for prompt in prompts],
                [prompt.prefix_len for prompt in prompts],
                self.pruner,
                config.num_hidden_layers,
            )
        )

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
            refuse(self.model, (CACHE_ARGUMENT, *(("inputs_embeds",) if shows else ())), kwargs)
        if ids is None or kwargs.get("inputs_embeds") is not None:
            return self.own(inputs, **kwargs), ()
        real = self._real(ids, kwargs)
        for key in self.family.inputs:
            require_finite_pixels(key, kwargs.get(key))
        if not shows:
            return self.own(inputs, **kwargs), _untouched(real, [[] for _ in ids], layers)
        if not probes and not self._selects(ids):
            shown = {**kwargs, "input_ids": ids, "attention_mask": real.long()}
            try:
                with self._fitting_inputs():
                    _, real, visuals = self._read(ids, real, shown)
                stats = _untouched(real, visuals, layers)
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
        given = {"input_ids": ids, "attention_mask": real.long(), **kwargs}
        with self._fitting_inputs():
            ids, real, visuals = self._read(ids, real, given)
            captured = self._captured(given, self._needs, ids.shape[1])
        prompts = self._stage1(ids, real, visuals, captured, self._features(visuals, captured))
        return self._run(given, ids.shape[1], prompts, captured, kwargs)

    @property
    def _needs(self) -> list[Need]:
        """What is measured in the tower."""
        needs = [need for need in self.pruner.needs if isinstance(need, tuple)]
        if "vision_features" in self.pruner.needs:
            assert self.family.feature_layer is not None, "checked when it was attached"
            needs.append((STATES, self.family.feature_layer(self.model)))
        return needs

    def _run(
        self,
        given: dict[str, Any],
        whole: int,
        prompts: Sequence[SplicedPrompt],
        captured: DecoderInputs,
        kwargs: dict[str, Any],
        prefixes: PrefixStore | None = None,
    ) -> tuple[Any, tuple[PruneStats, ...]]:
        """Return what ``generate`` returns for pruned prompts, and what happened to each.

        Args:
            given: its arguments as they came.
            whole: tokens of the whole prompts, their padding included.
            prompts: the pruned ones.
            captured: what the decoder would have read of the whole ones.
            kwargs: arguments of ``generate``.
            prefixes: a store of the prompts' first parts.
        """
        settings = {key: value for key, value in kwargs.items() if key not in self._consumed}
        embeds, spans, _ = pad_prompts(prompts, by_part=prefixes is not None)
        pruned, filler = embeds.shape[1], pad_id(self.model, kwargs)
        ids = padded([prompt.ids for prompt in prompts], filler)
        short = {
            # The decoder reads the embeddings; the ids are for penalties of what repeats.
            "input_ids": pad(ids, (pruned - ids.shape[1], 0), value=filler),
            "inputs_embeds": embeds,
            "attention_mask": spans.valid.long(),
        }
        device = given["input_ids"].device
        short |= {key: short[key].to(device) for key in ("input_ids", "attention_mask")}
        decoder = decoder_of(self.model)
        cached = 0 if prefixes is None else max(prompt.prefix_len for prompt in prompts)
        state = DecoderPruning(self.pruner, spans, decoder.config.num_hidden_layers, cached)
        if captured.position_ids is not None:
            # After stored prefixes the last ones are read, which stand at the right in any case.
            short["position_ids"] = kept_positions(captured.position_ids, prompts)
        if prefixes is not None:
            short[CACHE_ARGUMENT] = prefixes.cache(prefixes_of(prompts, captured), decoder, state)
        elif state.probe_layers:
            short[CACHE_ARGUMENT] = PrunedCache(decoder.config, state)
            if setting(self.model, "cache_implementation", kwargs) is not None:
                settings["cache_implementation"] = None  # it is that cache
        settings |= shorter_lengths(self.model, kwargs, whole, pruned)
        with ExitStack() as stack:
            if state.probe_layers:
                stack.enter_context(pruning_hooks(decoder, state))
                # Layers of changing lengths: what was compiled would be compiled again and again.
                stack.enter_context(uncompiled())
            if prefixes is not None:
                pass  # deep features are in the stored keys
            elif captured.deepstack is not None and captured.deepstack_at is not None:
                kept = kept_deep_features(captured.deepstack, captured.deepstack_at, prompts)
                stack.enter_context(adding(decoder, is_visual(spans.kinds), kept))
            output = self._call(given, short, settings)
        images = [tuple(visual.stats for visual in prompt.visuals) for prompt in prompts]
        return output, state.stats(images)

    def _features(self, visuals: Visuals, captured: DecoderInputs) -> list[list[ImageFeatures]]:
        """Return the images of each prompt as Stage 1 reads them."""
        project = partial(self.family.project, self.model)
        return [
            [
                features_of(each, row, captured, frozenset(self.pruner.needs), project)
                for each in of_row
            ]
            for row, of_row in enumerate(visuals)
        ]

    def _stage1(
        self,
        ids: Tensor,
        real: Tensor,
        visuals: Visuals,
        captured: DecoderInputs,
        features: list[list[ImageFeatures]],
    ) -> list[SplicedPrompt]:
        """Let the method select from the images of all prompts."""
        prompts = []
        for row, (of_row, keep) in enumerate(zip(visuals, real.cpu(), strict=True)):
            image = torch.full_like(keep, -1, dtype=torch.int64)
            for number, visual in enumerate(of_row):
                image[visual.columns] = number
            prompts.append(
                Prompt(
                    ids[row].cpu(),
                    captured.embeds[row],
                    features[row],
                    source=keep.nonzero()[:, 0],
                    image=image[keep],
                )
            )
        return prune_prompts(prompts, self.pruner)

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


def _untouched(real: Tensor, visuals: Visuals, layers: int) -> tuple[PruneStats, ...]:
    """Return the statistics of a call in which nothing is dropped.

    Args:
        real: (B, L) bool, False for padding.
        visuals: the images and videos of each sample.
        layers: how many the decoder has.
    """
    found = []
    for of_sample, length in zip(visuals, real.sum(dim=1).tolist(), strict=True):
        images = tuple(visual.layout.stats() for visual in of_sample)
        shown = sum(len(visual.columns) for visual in of_sample)
        newlines = sum(image.num_newlines for image in images)
        found.append(PruneStats(images, newlines, (), (length,) * layers, (shown,) * layers))
    return tuple(found)
