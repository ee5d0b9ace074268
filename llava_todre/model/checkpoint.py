"""Find a checkpoint, on disk or on the Hugging Face hub, and open its files.

Weights are mapped into memory, not read: a tensor's bytes are touched when it is used.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llava_todre.errors import TodreError
from llava_todre.files import JSON_BYTES, read_text

logger = logging.getLogger(__name__)

_SMALL_FILES = ["*.json", "tokenizer.model", "*.jinja"]
# Parts of models, laid over another: see :mod:`llava_todre.model.adapters`.
_PART_FILES = ["adapter_model.bin", "mm_projector.bin", "non_lora_trainables.bin"]
_WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


def bundled_checkpoint() -> Path:
    """Return the checkpoint that comes with a checkout."""
    path = Path(__file__).resolve().parents[2] / "checkpoints" / "mini"
    if not path.is_dir():
        raise TodreError(f"model {str(path)!r} is missing; run from a checkout or give --model.")
    return path


def find_checkpoint(key: str, path: str, revision: str | None = None, weights: bool = True) -> Path:
    """Return the local folder of a checkpoint; download it when ``path`` is a hub id.

    Args:
        key: what the user set, for messages, e.g. ``"model_path"``.
        path: a directory or a hub id ``owner/name``.
        revision: branch, tag or commit on the hub.
        weights: whether the weights are needed too.
    """
    folder = os.path.expanduser(path)
    if os.path.isdir(folder):  # pathlib would raise for a name that is too long
        check_shard_names(Path(folder))
        return Path(folder)
    if os.path.exists(folder):
        raise TodreError(f"{key} {path!r} is a file; give the directory of the checkpoint.")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path):
        raise TodreError(f"{key} {path!r} does not exist; give a directory or a hub id owner/name.")
    return _download(key, path, revision, weights)


def _download(key: str, name: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub import errors as hub

    patterns = [*_SMALL_FILES, "*.safetensors", "*.bin"] if weights else _SMALL_FILES
    where = f"{key} {name!r} is no directory here, and on the Hugging Face hub"
    try:
        if weights:
            try:
                files = HfApi().model_info(name, revision=revision).siblings or []
                patterns = _SMALL_FILES + _weight_patterns([file.rfilename for file in files])
            except hub.HfHubHTTPError:
                raise
            except Exception as error:  # unreachable, by whatever HTTP library the hub package uses
                logger.info("cannot list %s, trying the local cache: %s", name, error)
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except hub.GatedRepoError:
        reason = "it is gated: accept its terms there and log in"
    except hub.RevisionNotFoundError:
        reason = f"it has no revision {revision!r}"
    except hub.RepositoryNotFoundError:
        reason = "there is no such repository (or it is private: log in)"
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled):
        reason = "it cannot be reached, nor is it in the local cache"
    except Exception as error:
        reason = f"the download failed: {first_line(error)}"
    raise TodreError(f"{where} {reason}.")


def _weight_patterns(files: list[str]) -> list[str]:
    """Return the one kind of weight file to download, safetensors when there are any."""
    safe = any(name.endswith(".safetensors") and "/" not in name for name in files)
    return [*(["*.safetensors"] if safe else ["pytorch_model*.bin"]), *_PART_FILES]


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; an error when it is missing, damaged or no object."""
    if not path.exists():
        raise TodreError(f"{path.parent} has no {path.name}; is it a checkpoint?")
    try:
        content = json.loads(read_text(path, "file", JSON_BYTES))
    except (ValueError, RecursionError) as error:
        raise TodreError(f"{path} is not readable JSON: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise TodreError(f"{path} must hold a JSON object, got {type(content).__name__}.")
    return content


def has_weights(folder: Path) -> bool:
    """Return whether a folder holds the weights of a whole model."""
    return any((folder / name).is_file() for name in _WEIGHT_FILES)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of a checkpoint by its name in the file, mapped from disk."""
    tensors: dict[str, Tensor] = {}
    for shard in _shards(folder):
        tensors.update(read_tensors(shard))
    return tensors


def _shards(folder: Path) -> list[Path]:
    """Return the files that hold the weights: of several kinds, the first that is all there."""
    found = [folder / name for name in _WEIGHT_FILES if (folder / name).is_file()]
    if not found:
        raise TodreError(f"{folder} has no weights; one of: {', '.join(_WEIGHT_FILES)}.")
    missing: list[str] = []
    for file in found:
        shards = _listed(file) if file.suffix == ".json" else [file]
        absent = [shard.name for shard in shards if not shard.is_file()]
        if not absent:
            if missing:  # an index that stayed from other files
                logger.warning("%s; reading %s instead.", missing[0], file.name)
            return shards
        missing.append(f"{file} lists {absent[0]}, but that file is missing")
    raise TodreError(f"{missing[0]}.")


def _listed(index: Path) -> list[Path]:
    """Return the shards that an index names."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise TodreError(f"{index} has no weight_map from tensor names to file names.")
    for name in weight_map.values():
        if not isinstance(name, str) or not name or Path(name).name != name:
            raise TodreError(f"{index} names {name!r}; a shard must be a file of its folder.")
    return [index.parent / name for name in sorted(set(weight_map.values()))]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return every tensor of one file, by name: safetensors, or PyTorch's without other objects."""
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_bin(path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    except (SafetensorError, OSError) as error:
        raise TodreError(f"{path} is damaged or cut short: {first_line(error)}") from error


def _read_bin(path: Path) -> dict[str, Tensor]:
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            content = torch.load(
                path, map_location="cpu", weights_only=True
            )  # torch < 1.6 wrote it
    except pickle.UnpicklingError as error:
        raise TodreError(
            f"{path} is damaged, or holds more than tensors and is not loaded for safety; "
            "convert it to safetensors."
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise TodreError(f"{path} is damaged or cut short: {first_line(error)}") from error
    tensors = isinstance(content, dict) and all(isinstance(v, Tensor) for v in content.values())
    if not tensors:
        raise TodreError(f"{path} must hold a dictionary of tensors.")
    return content


def first_line(error: BaseException) -> str:
    """Return what went wrong as one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check_shard_names(folder: Path) -> None:
    """Refuse an index that names a file outside its folder: transformers would open it.

    Raises:
        TodreError: a shard's name is not the plain name of a file.
    """
    for index in sorted(folder.glob("*.index.json")) if os.path.isdir(folder) else ():
        if isinstance(read_json(index).get("weight_map"), dict):
            _listed(index)
