"""Pruning on stock ``transformers`` models: attach in one line, detach without a trace.

    import llava_todre as todre

    with todre.prune(model, method="todre", retain_ratio=0.1):
        model.generate(**inputs)

Stage 1 runs the model up to its decoder, drops visual tokens, and calls ``generate`` with what is
left; Stage 2 uses hooks that exist only during that call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llava_todre.errors import TodreError
from llava_todre.hf.attachment import Attachment
from llava_todre.hf.encoded import EncodedImage
from llava_todre.hf.families import family_of
from llava_todre.hf.original import ORIGINAL
from llava_todre.hf.original_attachment import OriginalAttachment
from llava_todre.locking import in_turn, turn
from llava_todre.model.adapters import unwrapped
from llava_todre.pruners import Pruner, resolve
from llava_todre.stats import PruneStats

_STACK = "_todre_attachments"


def attach(model: Any, method: str | Pruner = "todre", **options: Any) -> Pruner:
    """Let ``model.generate`` prune visual tokens from now on; returns the method.

    Signature and return type of ``generate`` stay. Attaching again covers the earlier method until
    the later one is detached.

    Args:
        model: a vision-language model of transformers, e.g. ``LlavaNextForConditionalGeneration``,
            or of the original ``llava`` package; or a ``PeftModel`` around one.
        method: a name from ``todre list``, A+B, or a method object.
        options: options of the method.

    Raises:
        TodreError: a model that is not supported, a wrong option, or a method that needs something
            this family of models does not compute.
    """
    model = unwrapped(model)
    kind = OriginalAttachment if family_of(model) is ORIGINAL else Attachment
    pruner = resolve(method, options)
    with turn(model):
        stack = model.__dict__.get(_STACK, [])
        own = stack[0].own if stack else getattr(model, "generate", None)
        attachment = kind(model, pruner, own)
        model.__dict__[_STACK] = [*stack, attachment]
        model.__dict__["generate"] = attachment.generate
    return pruner


def detach(model: Any) -> None:
    """Undo the latest :func:`attach`.

    Raises:
        TodreError: nothing is attached.
    """
    _remove(unwrapped(model), _stack(model)[-1])


@contextmanager
def prune(model: Any, method: str | Pruner = "todre", **options: Any) -> Iterator[Any]:
    """Prune while the block runs; see :func:`attach` for the arguments.

    What is attached or detached within the block stays so.
    """
    attach(model, method, **options)
    own = _stack(model)[-1]
    try:
        yield model
    finally:
        _remove(unwrapped(model), own)


def last_stats(model: Any) -> tuple[PruneStats, ...]:
    """Return what happened to each sample of this thread's last ``generate`` with images.

    For a thread that has made no call: of the last of any thread.

    Raises:
        TodreError: nothing is attached.
    """
    return _stack(model)[-1].last_stats


def encode(model: Any, **inputs: Any) -> list[EncodedImage]:
    """Return the images and videos of one prompt after tower and projector.

    Any number of calls can show them: ``model.generate(ids, encoded=..., prefixes=...)``.

    Args:
        model: with a method attached.
        inputs: what the model's processor returns for the prompt.

    Raises:
        TodreError: nothing is attached, or the inputs do not fit the model.
    """
    return _stack(model)[-1].encode(**inputs)


@in_turn
def _remove(model: Any, attachment: Attachment) -> None:
    """Take one of the attachments away, if it is still there."""
    stack = model.__dict__.get(_STACK, [])
    rest = [other for other in stack if other is not attachment]
    if len(rest) == len(stack):
        return
    if rest:
        model.__dict__.update({_STACK: rest, "generate": rest[-1].generate})
        return
    del model.__dict__["generate"], model.__dict__[_STACK]
    if model.generate != attachment.own:  # someone else had replaced it
        model.__dict__["generate"] = attachment.own


def _stack(model: Any) -> list[Attachment]:
    """Return what is attached, the latest last."""
    model = unwrapped(model)
    stack: list[Attachment] = getattr(model, "__dict__", {}).get(_STACK, [])
    if not stack:
        raise TodreError(f"nothing is attached to this {type(model).__name__}; call attach first.")
    return stack
