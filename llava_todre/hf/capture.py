"""Capture the decoder inputs of a stock model without running the decoder.

The model's own code runs the tower, projects, packs and scatters the features and computes the
positions; only the decoder is replaced, for one call, by a function that records its arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from llava_todre.hf.family import STATES, Family
from llava_todre.model.vision import layer_index

Need = tuple[str, int | float]
"""A quantity, and the layer of the tower: see :data:`llava_todre.pruners.base.VISION_NEEDS`."""


@dataclass(frozen=True)
class DecoderInputs:
    """The prompt as the decoder would have read it, unpruned."""

    embeds: Tensor
    """(B, L, D)."""
    position_ids: Tensor | None
    """(3 or 4, B, L) where the model has positions in space (M-RoPE)."""
    deepstack: list[Tensor] | None
    """Features added after the first decoder layers: (visual tokens of the batch, D) each."""
    deepstack_at: Tensor | None
    """(B, L) bool, the positions they are added to."""
    measured: dict[Need, Tensor]
    """(patches of all images, then of all videos, ...) for each requested (quantity, layer)."""


def decoder_of(model: Any) -> Any:
    """Return the decoder of a model: what has ``layers``, ``norm`` and ``rotary_emb``."""
    return getattr(model.model, "language_model", model.model)


@torch.no_grad()
def capture(
    model: Any, family: Family, inputs: Mapping[str, Any], needs: Iterable[Need]
) -> DecoderInputs:
    """Run everything but the decoder.

    Args:
        model: a model of the family.
        family: its family.
        inputs: arguments of ``generate``.
        needs: (quantity, layer) pairs to measure in the tower; the quantity ``STATES`` is what
            enters that layer, as it is.

    Raises:
        TodreError: a layer that the tower does not have.
    """
    known = inspect.signature(model.model.forward).parameters
    given = {key: value for key, value in inputs.items() if key in known and value is not None}
    with _recorded(decoder_of(model)) as recorded, measuring(family, model, needs) as measured:
        model.model(**(given | {"use_cache": False}))
    positions = recorded.get("position_ids")
    return DecoderInputs(
        recorded["inputs_embeds"],
        positions if positions is not None and positions.ndim == 3 else None,
        recorded.get("deepstack_visual_embeds"),
        recorded.get("visual_pos_masks"),
        measured,
    )


@contextmanager
def measuring(family: Family, model: Any, needs: Iterable[Need]) -> Iterator[dict[Need, Tensor]]:
    """Measure in the tower while the block runs; the dictionary is full after it.

    Args:
        family: the model's.
        model: the model.
        needs: see :func:`capture`.
    """
    parts: dict[Need, list[Tensor]] = {need: [] for need in needs}
    measured: dict[Need, Tensor] = {}
    with ExitStack() as stack:
        for need, found in parts.items():
            stack.enter_context(_measured(family, model, need, found))
        yield measured
    measured |= {need: torch.cat(found) for need, found in parts.items() if found}


@contextmanager
def _recorded(decoder: Any) -> Iterator[dict[str, Any]]:
    """Record the arguments of the decoder's calls instead of running it."""
    recorded: dict[str, Any] = {}

    def record(*args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        assert not args, "models call their decoder with keywords"
        recorded.update(kwargs)
        return BaseModelOutputWithPast(last_hidden_state=kwargs["inputs_embeds"])

    before = decoder.__dict__.get("forward")  # accelerate puts one there
    decoder.__dict__["forward"] = record
    try:
        yield recorded
    finally:
        if before is None:
            del decoder.__dict__["forward"]
        else:
            decoder.__dict__["forward"] = before


@contextmanager
def _measured(family: Family, model: Any, need: Need, found: list[Tensor]) -> Iterator[None]:
    """Measure one quantity, or its proxy, whenever a layer of the tower is about to run."""
    quantity, depth = need
    layers = family.tower_layers(model)
    index = layer_index(quantity, depth, len(layers))
    quantity = family.proxies.get(quantity, quantity)
    index = family.measured_at(model, quantity, index)

    def measure(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if quantity == STATES:
            found.append(hidden)
        else:
            found.append(family.measure(quantity, layer, hidden, kwargs))

    handle = layers[index].register_forward_pre_hook(measure, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
