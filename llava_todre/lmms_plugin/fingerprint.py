"""What the answers of a run depend on, apart from the questions.

The model is hashed in memory, so it does not matter from which files it was loaded: equal weights,
equal fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from llava_todre.provenance import provenance
from llava_todre.request import VLM
from llava_todre.source import digests

_CHUNK = 1 << 22
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(vlm: VLM, settings: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return a short name for a run, and what it stands for.

    Runs on devices of the same type ("cpu", "cuda") share a name, although rounding may differ
    between two of them.

    Args:
        vlm: model with its weights, tokenizer and processor.
        settings: all other choices that change answers.
    """
    config = vlm.config.to_dict()
    for key in ("_name_or_path", "transformers_version"):
        config.pop(key, None)
    parts = {
        "settings": dict(settings),
        "weights": weights_digest(vlm.model),
        "config": _digest(json.dumps(config, sort_keys=True, default=str)),
        "generation_config": _digest(str(vlm.model.generation_config)),
        "image_processor": _digest(str(vlm.processor)),
        "tokenizer": _digest(_content(vlm.tokenizer)),
        "source": digests("llava_todre.lmms_plugin.model"),
        "versions": _versions(),
        "device": vlm.device.type,
    }
    return _digest(json.dumps(parts, sort_keys=True, default=str)), parts


def _content(tokenizer: Any) -> str:
    """Return the content of a tokenizer, without the state that its last call left."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return json.dumps(tokenizer.get_vocab(), sort_keys=True)
    known = json.loads(backend.to_str())
    for key in ("padding", "truncation"):
        known.pop(key, None)
    return json.dumps(known, sort_keys=True)


def weights_digest(model: torch.nn.Module) -> str:
    """Return a hash of the names, shapes, formats and values of all weights."""
    digest = hashlib.sha256()
    stored = [part for item in model.state_dict().items() for part in _plain(*item)]
    for name, tensor in sorted(stored, key=lambda part: part[0]):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {_checksum(tensor)}".encode())
    return digest.hexdigest()[:16]


def _plain(name: str, tensor: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that a stored entry is made of: more than one where it is quantised."""
    if hasattr(tensor, "__tensor_flatten__") and not isinstance(tensor, DTensor):
        for part in tensor.__tensor_flatten__()[0]:
            yield from _plain(f"{name}.{part}", getattr(tensor, part))
    elif isinstance(tensor, Tensor):
        yield name, tensor


def _checksum(tensor: Tensor) -> list[int]:
    """Return one number per chunk: the bits of the values, weighted by place, modulo 2**64.

    Computed on the tensor's device, in whole numbers, so it is the same everywhere. A tensor that
    is split over processes is gathered first, in all of them.
    """
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    bits = tensor.detach().contiguous().view(-1).view(_BITS[tensor.element_size()])
    odd = torch.arange(1, 2 * min(_CHUNK, len(bits)), 2, device=bits.device)
    return [int((part.long() * odd[: len(part)]).sum()) for part in bits.split(_CHUNK)]


@cache
def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = provenance()["versions"]
    try:
        return versions | {"av": version("av")}
    except PackageNotFoundError:
        return versions | {"av": None}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
