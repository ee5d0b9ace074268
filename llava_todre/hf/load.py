"""Load stock models of transformers, and recognise which checkpoints are theirs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from llava_todre.errors import TodreError, unknown
from llava_todre.hf.families import FAMILIES, family_named
from llava_todre.hf.stock import StockModel
from llava_todre.load_options import LoadOptions
from llava_todre.model.adapters import check_parts, merged
from llava_todre.model.bounded import check_tokenizer
from llava_todre.model.checkpoint import (
    check_shard_names,
    find_checkpoint,
    first_line,
    has_weights,
    read_json,
    read_weights,
)
from llava_todre.model.config_check import (
    GENERATION,
    PROCESSOR,
    check_config,
    check_tokens,
    check_values,
)
from llava_todre.model.convert import loads
from llava_todre.model.placement import (
    check_attention,
    check_spread,
    parse_dtype,
    spreads,
    target_device,
)
from llava_todre.model.quantised import quantisation, require, stated_method

BACKENDS = ("auto", "llava", "transformers")
"""Which class runs a model: ours, the one of transformers, or whichever fits."""
_TABLES = {
    "preprocessor_config.json": PROCESSOR,
    "processor_config.json": PROCESSOR,
    "generation_config.json": GENERATION,
}
# Of transformers, and of what it builds: types and ranges that it does not look at itself.
_LOADING_ERRORS = (
    *(OSError, ValueError, ImportError, RuntimeError, SafetensorError),
    *(TypeError, AttributeError, KeyError, AssertionError, NotImplementedError),
    *(IndexError, OverflowError, StrictDataclassError),
)


def load_stock_model(path: str, options: LoadOptions | None = None, **changes: Any) -> StockModel:
    """Load a model and its processor through transformers.

    Args:
        path: a folder or a hub id, such as ``llava-hf/llava-v1.6-mistral-7b-hf``; also of weights
            that were quantised before they were saved.
        options: how; ``model_base`` is the model that an adapter of peft, in ``path``, was trained
            on, into which it is merged. dtype auto is the checkpoint's own on a GPU, float32 on a
            CPU.
        changes: fields of ``options`` by name.

    Raises:
        TodreError: one line saying what about the arguments or the checkpoint is wrong.
    """
    how = LoadOptions.of(options, changes)
    how.refuse_own(path)
    revision, device_map = how.revision, how.device_map
    path = os.path.expanduser(path)
    model_base = None if how.model_base is None else os.path.expanduser(how.model_base)
    check_shard_names(Path(model_base or path))
    target = target_device(how.device, device_map)
    check_attention(how.attn_implementation, target)
    wanted = parse_dtype(how.dtype) or (torch.float32 if target.type == "cpu" else "auto")
    running = wanted if isinstance(wanted, torch.dtype) else None
    quantised = quantisation(how.load_8bit, how.load_4bit, how.quantization_config, running)
    part = _part(path, revision, model_base, quantised)
    base, of_base = (path, revision) if model_base is None else (model_base, None)
    try:
        raw, _ = PreTrainedConfig.get_config_dict(base, revision=of_base)
        family_named(_stock_class(raw))  # before gigabytes are loaded
        _check_stored(base, raw)
        is_quantised = quantised is not None or stated_method(raw) is not None
        spread = device_map if spreads(device_map) else None
        if is_quantised:
            require(stated_method(raw) or "transformers")
            spread = spread or {"": target}  # each weight is quantised where it is to stay
        model, loading = AutoModelForImageTextToText.from_pretrained(
            base,
            revision=of_base,
            dtype=wanted,
            device_map=spread,
            attn_implementation=how.attn_implementation,
            output_loading_info=True,
            # None would hide what the checkpoint says.
            **({} if quantised is None else {"quantization_config": quantised}),
        )
        processor = AutoProcessor.from_pretrained(base, revision=of_base)
        check_tokenizer(base, processor.tokenizer)
    except _LOADING_ERRORS as error:
        raise _does_not_load(path, error) from error
    _check_loaded(base, model, processor, loading)
    if spreads(device_map):
        check_spread(getattr(model, "hf_device_map", {}))
    elif not is_quantised:
        model.to(target)
    return StockModel((model if part is None else merged(part, model)).eval(), processor)


def _part(path: str, revision: str | None, model_base: str | None, quantised: Any) -> Path | None:
    """Return the folder of an adapter for ``model_base``; None where ``path`` is a whole model."""
    if model_base is None:
        if os.path.isdir(path):
            check_parts(Path(path), has_base=False)
        return None
    if quantised is not None:
        raise TodreError("model_base and quantisation were both given; merge and save first.")
    folder = find_checkpoint("pretrained", path, revision)
    check_parts(folder, has_base=True)
    return folder


def _does_not_load(path: str, error: BaseException) -> TodreError:
    if "requires the Torchvision library" in str(error):
        return TodreError(
            f"pretrained {path!r} has a processor that needs torchvision, also for images; "
            f"install the release that fits torch {torch.__version__}."
        )
    reason = first_line(error)
    if isinstance(error, StrictDataclassError):  # its first line names the key only
        reason = " ".join(str(error).split())
    return TodreError(f"pretrained {path!r} does not load: {reason}")


def _check_loaded(path: str, model: Any, processor: Any, loading: Mapping[str, Any]) -> None:
    """Raise unless all weights were there, and the processor writes what the model reads."""
    missing = sorted(loading["missing_keys"])
    if missing:  # transformers draws them at random
        raise TodreError(
            f"pretrained {path!r} lacks {len(missing)} tensors of the model, such as {missing[0]}."
        )
    read = getattr(model.config, "image_token_id", None)
    written = getattr(processor, "image_token_id", None)
    if read is not None and written is not None and read != written:
        raise TodreError(
            f"{path}/config.json has image_token_id {read}, but its processor writes {written}; "
            "they must agree."
        )


def _check_stored(path: str, raw: dict[str, Any]) -> None:
    """Raise for values no model can be built from, and for sizes far beyond what is stored."""
    check_config(f"{path}/config.json", raw)
    for name, table in _TABLES.items():
        if (Path(path) / name).exists():
            values = read_json(Path(path) / name)
            check_values(f"{path}/{name}", values, table)
            check_tokens(f"{path}/{name}", values, 2**24)
    if stated_method(raw) is not None or not has_weights(Path(path)):
        return
    stored = sum(tensor.numel() for tensor in read_weights(Path(path)).values())
    described = _num_parameters(AutoConfig.from_pretrained(path))
    if described > 2 * stored:  # tied weights may be stored once
        raise TodreError(
            f"{path}/config.json describes a model of {described:,} parameters, but the weights "
            f"next to it have {stored:,}; a size is wrong or left out."
        )


def _num_parameters(config: Any) -> int:
    """Return how many parameters a model has, of which two layers are built, without data."""
    decoder = config.get_text_config()
    layers, counts = decoder.num_hidden_layers, []
    for few in (1, 2):
        decoder.num_hidden_layers = few
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
        counts.append(sum(parameter.numel() for parameter in model.parameters()))
    one, two = counts
    return one + (layers - 1) * (two - one)


def _stock_class(config: Mapping[str, Any]) -> str:
    """Return the class of transformers that a checkpoint goes to, or what it says it is."""
    kind = str(config.get("model_type"))
    return str(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(kind, kind))


def uses_stock(
    backend: str, path: str, revision: str | None = None, model_base: str | None = None
) -> bool:
    """Return whether transformers' own class is to run a checkpoint.

    Args:
        backend: llava, transformers, or auto: :func:`needs_stock` decides.
        path: folder or hub id.
        revision: branch, tag or commit on the hub.
        model_base: what the checkpoint is laid over, if it is a part of a model.

    Raises:
        TodreError: another backend.
    """
    if backend not in BACKENDS:
        raise unknown("backend", backend, BACKENDS)
    if backend == "auto" and model_base is not None:  # ours knows the original's parts
        return needs_stock(model_base, needs_part=True)
    return backend == "transformers" or (backend == "auto" and needs_stock(path, revision))


def needs_stock(path: str, revision: str | None = None, needs_part: bool = False) -> bool:
    """Return whether a checkpoint is one that transformers' own classes run, and ours does not.

    Our class runs LLaVA-1.5 and LLaVA-NeXT on Llama or Mistral decoders, in either layout, as far
    as :func:`llava_todre.model.convert.loads` knows.

    Args:
        path: folder or hub id.
        revision: branch, tag or commit on the hub.
        needs_part: whether an adapter is laid over it, in the same layout.
    """
    path = os.path.expanduser(path)
    file = Path(path) / "config.json"
    try:
        raw = (
            read_json(file)
            if os.path.exists(file)
            else PreTrainedConfig.get_config_dict(path, revision=revision)[0]
        )
    except (OSError, ValueError):
        return False  # ours says what is wrong
    if not any(_stock_class(raw) in family.models for family in FAMILIES):
        return False
    if raw.get("model_type") not in ("llava", "llava_next"):
        return True
    return "text_config" in raw and (needs_part or not loads(raw))
