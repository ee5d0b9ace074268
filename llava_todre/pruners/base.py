"""The contract of a pruning method: a frozen dataclass with at most two hooks.

Symbols: N tokens now present, L tokens of the whole prompt, D width, H query heads, G key heads, E
    head width, R rows.

``select`` sees the visual tokens of one image before the decoder; ``at_layer`` sees one sample
between two decoder layers during prefill. A method overrides the hooks it uses and declares what it
``needs``; nothing else is computed for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from llava_todre.errors import TodreError
from llava_todre.pruners.options import Option, options_of
from llava_todre.pruners.options import option as option
from llava_todre.pruners.view import LayerView as LayerView
from llava_todre.spans import NewlineRule, VisualTokens

VISION_NEEDS = {
    "cls_attention": "(N,) softmax attention of [CLS], mean over heads",
    "cls_logits": "(N,) the same before the softmax: scaled products, mean over heads",
    "cls_attention_unsplit": "(N,) softmax attention of [CLS] with all heads taken as one",
    "received_attention": "(N,) attention a token receives, mean over queries and heads",
    "keys": "(N, heads, head width)",
}
"""What one layer of the vision tower can give, as ``(quantity, layer)``. Layer -1 is the
last, 0.5 the one half-way up; softmax is over [CLS] and all patches of a view."""

NEEDS = frozenset({"text_embeds", "clip_similarity", "vision_features", "resized"})
"""What else the model can compute for :meth:`Pruner.select`: see
:class:`~llava_todre.spans.VisualTokens`."""

TEXT_NEEDS = frozenset({"text_embeds", "clip_similarity"})
"""Those that depend on the text of the prompt."""

Need = str | tuple[str, int | float]
Needs = Set[Need]
Count = Literal["exact", "at most", "own"]


@dataclass(frozen=True)
class About:
    """What a reader of a comparison has to know about a method; the tables of the docs show it."""

    paper: str
    """Name, venue, arXiv number."""
    budget_note: str
    """How the published budget is carried over to any ``retain_ratio``."""
    count: Count = "exact"
    """Whether the number of tokens kept is the budget, at most the budget, or the method's own."""
    reads_text: bool | None = None
    """Whether what is dropped depends on the text of the prompt; None: if the method ``needs`` text
    or acts inside the decoder."""
    deviations: tuple[str, ...] = ()
    """Where this implementation departs from the released code, and why."""


@dataclass(frozen=True)
class Keep:
    """Which patch tokens stay, and what stands in their places; both hooks return it.

    A hook that changes no token may return the indices alone.
    """

    indices: Tensor
    """(K,) int64, in any order, each once: into the tokens of the image (``select``), or into those
    present in the layer (``at_layer``)."""
    features: Tensor | None = None
    """(K, D) for methods that merge, in the order of ``indices``; None is the tokens' own."""

    @classmethod
    def checked(cls, kept: Keep | Tensor, hook: str, num_tokens: int) -> Keep:
        """Return what ``hook`` kept of ``num_tokens``, with indices ascending and on the CPU.

        Raises:
            TodreError: indices of another type, out of range or repeated, or features of another
                number.
        """
        kept = kept if isinstance(kept, Keep) else cls(kept)
        indices, features = kept.indices, kept.features
        if not isinstance(indices, Tensor) or indices.dtype != torch.int64 or indices.ndim != 1:
            got = getattr(indices, "dtype", type(indices).__name__)
            shape = tuple(getattr(indices, "shape", ()))
            raise TodreError(f"{hook} must return (K,) int64 indices, got {got} {shape}.")
        indices, order = indices.cpu().sort()
        if len(indices) and (indices[0] < 0 or indices[-1] >= num_tokens):
            got = f"{int(indices[0])} to {int(indices[-1])}"
            raise TodreError(f"{hook} must return indices from 0 to {num_tokens - 1}, got {got}.")
        if bool((indices.diff() == 0).any()):
            twice = int(indices[1:][indices.diff() == 0][0])
            raise TodreError(f"{hook} must return each index once, got {twice} twice.")
        if features is not None:
            expected = f"features for its {len(indices)} indices"
            if len(features) != len(indices):
                raise TodreError(f"{hook} must return {expected}, got {len(features)}.")
            features = features[order.to(features.device)]
        return cls(indices, features)


@dataclass(frozen=True, kw_only=True)
class Pruner:
    """Base of all methods; its fields are the budget, which every method shares."""

    retain_ratio: float = option(
        0.10,
        "Share of the patch tokens kept per image or video; newline tokens are not counted.",
        above=0,
        high=1,
    )
    retain_tokens: int | None = option(
        None,
        "Number of patch tokens kept per image or video; replaces retain_ratio when given.",
        low=1,
    )
    newlines: NewlineRule = option(
        "row",
        "Which newline tokens stay once patch tokens are dropped: those of rows that keep a patch "
        "token (row), all, or none.",
        choices=get_args(NewlineRule),
    )

    about: ClassVar[About] = About(paper="", budget_note="")
    reads: ClassVar[tuple[str, ...]] = ()
    """What :meth:`select` reads but the features: names of :data:`NEEDS`, and of
    :data:`VISION_NEEDS` in the layer of the option ``cls_layer``."""

    @property
    def needs(self) -> Needs:
        """All that :meth:`select` reads but the features: names of :data:`NEEDS`, (name, layer)."""
        layer = getattr(self, "cls_layer", -1)
        return {(name, layer) if name in VISION_NEEDS else name for name in self.reads}

    @property
    def count(self) -> Count:
        """What :meth:`select` promises of the number it keeps: see :class:`About`."""
        return self.about.count

    @property
    def selects(self) -> bool:
        """Whether the budget holds before the decoder, by :meth:`select`."""
        return type(self).select is not Pruner.select

    @property
    def withdraws_all(self) -> bool:
        """Whether :meth:`at_layer` keeps all visual tokens or none.

        It must then read no rows but those of the text after the last visual token.
        """
        return False

    def prefix_cacheable(self, num_layers: int) -> bool:
        """Whether questions about one image may share its part of the KV cache.

        They may when neither the tokens that enter the decoder nor their states in later layers
        depend on the question.
        """
        reads_question = bool(self.needs & TEXT_NEEDS)
        return not reads_question and (self.withdraws_all or not self.probe_layers(num_layers))

    def __post_init__(self) -> None:
        """Take numbers as Python has them, and check the options."""
        for key, declared in options_of(type(self)).items():
            object.__setattr__(self, key, plain(getattr(self, key)))
            declared.check(key, getattr(self, key))

    def num_keep(self, num_tokens: int) -> int:
        """Return how many of ``num_tokens`` patch tokens to keep; half rounds up, at least one."""
        wanted = self.retain_tokens or round_half_up(self.retain_ratio * num_tokens)
        return min(num_tokens, max(1, wanted))

    def will_select(self, num_tokens: int) -> bool:
        """Return whether :meth:`select` will be called for an image of that many patch tokens."""
        return self.selects and self.num_keep(num_tokens) < num_tokens

    def select(self, tokens: VisualTokens, num_keep: int) -> Keep | Tensor:
        """Choose ``num_keep`` of the tokens of one image or video; called only to drop some."""
        raise NotImplementedError(
            f"{type(self).__name__} does not select tokens before the decoder."
        )

    def select_all(
        self, images: Sequence[VisualTokens], num_keeps: Sequence[int]
    ) -> Sequence[Keep | Tensor]:
        """Do :meth:`select` for several images; a method may have a faster way on a GPU."""
        return [self.select(*pair) for pair in zip(images, num_keeps, strict=True)]

    def keep(self, images: Sequence[VisualTokens]) -> list[Keep]:
        """Return what stays of each image or video: ascending, on the CPU, as many as promised.

        Raises:
            TodreError: :meth:`select` has returned something else.
        """
        every = [Keep(torch.arange(len(tokens))) for tokens in images]
        chosen = [i for i, tokens in enumerate(images) if self.will_select(len(tokens))]
        counts = [self.num_keep(len(images[i])) for i in chosen]
        kept = self.select_all([images[i] for i in chosen], counts) if chosen else ()
        hook = f"{type(self).__name__}.select"
        for i, count, one in zip(chosen, counts, kept, strict=True):
            every[i] = Keep.checked(one, hook, len(images[i]))
            got = len(every[i].indices)
            allowed = {"exact": got == count, "at most": 0 < got <= count, "own": got > 0}
            if not allowed[self.count]:
                raise TodreError(f"{hook} must keep {count} of {len(images[i])} tokens, got {got}.")
        return every

    def probe_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return the decoder layers after which :meth:`at_layer` is called; () means never.

        These are the ones at the option ``probe_depths``, if there is one.
        """
        return layers_at(getattr(self, "probe_depths", ()), num_layers)

    def at_layer(self, view: LayerView) -> Keep | Tensor | None:
        """Return which patch tokens the next layers keep; None keeps all.

        Text always stays, and newline tokens follow the patch tokens, see ``newlines``. A prompt
        that ends with an image, whose last token predicts the answer, keeps everything.
        """
        del view
        return None


def plain(value: Any) -> Any:
    """Return an option with its numbers as Python has them, and its lists as tuples."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return tuple(map(plain, value)) if isinstance(value, (list, tuple)) else value


def require(key: str, value: Any, low: float, high: float, low_included: bool = True) -> None:
    """Raise a TodreError unless ``value`` is a number from ``low`` to ``high``."""
    at_least, above = (low, None) if low_included else (None, low)
    Option("", float, at_least, high, above).check(key, value)


def require_int(key: str, value: Any, low: int | None = None) -> None:
    """Raise a TodreError unless ``value`` is a whole number, not below ``low`` if that is given."""
    Option("", int, low=low).check(key, value)


def check_layer(layer: int, highest: int, num_layers: int) -> None:
    """Raise a TodreError if ``layer`` is above the ``highest`` of a decoder of that depth."""
    if layer > highest:
        where = f"from 1 to {highest} in a decoder of {num_layers} layers"
        raise TodreError(f"layer must be {where}, got {layer}.")


def round_half_up(value: float) -> int:
    """Return the nearest whole number, the upper one of two."""
    return math.floor(value + 0.5)


def layers_at(depths: tuple[float, ...], num_layers: int) -> tuple[int, ...]:
    """Return the 0-based layers ``floor(depth * num_layers)``, the last one at most."""
    return tuple(sorted({min(num_layers - 1, math.floor(depth * num_layers)) for depth in depths}))


def top(scores: Tensor, count: int) -> Tensor:
    """Return (count,) indices of the highest of ``scores`` (N,), best first, ties lowest first."""
    return scores.argsort(descending=True, stable=True)[:count]
