"""``python -m eval bench``: options, what is measured in which order, and what is printed."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from eval.bench.dims import SIZES, build
from eval.bench.methods import Contender, compare, contenders, count_only, table3
from eval.bench.overhead import attached_but_off, cls_row, probe, selection
from eval.bench.report import as_text
from eval.bench.stock import stock_loads
from eval.bench.targets import judged
from eval.bench.throughput import loads
from eval.bench.timing import say
from llava_todre.errors import TodreError
from llava_todre.model.llava import LlavaLlamaForCausalLM
from llava_todre.model.load import load_pretrained_model
from llava_todre.model.placement import DTYPES, check_attention, parse_dtype, target_device
from llava_todre.provenance import provenance
from llava_todre.settings import whole

FORMAT = 1
COMPARED = ("todre", "fastv")
SHARES = (0.25, 0.10)
PROBED = (2880, 288)
"""Visual tokens of the prompts in which every layer from the middle on is probed."""
_CHEAP = 4
"""Parts that take little time are repeated that many times as often."""


def add_parser(commands: Any) -> None:
    """Add ``bench`` to the commands of ``python -m eval``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="time every stage of an answer on this machine, and what the FLOPs would allow",
        description="Methods are timed interleaved in one process. The last line is JSON.",
    )
    add = parser.add_argument
    add("--size", choices=SIZES, default="cpu", help="dimensions, with random weights")
    add("--checkpoint", metavar="PATH", help="a real model instead: folder or hub id")
    add("--protocol", default="paper", help="of a checkpoint: paper (2 x 2 crops) or native")
    add(
        "--compare",
        nargs="+",
        default=list(COMPARED),
        metavar="METHOD",
        help="methods; the unpruned model always comes first",
    )
    add("--ratios", nargs="+", type=float, default=list(SHARES), help="shares of tokens kept")
    add("--table3", action="store_true", help="only the methods of Table 3, at 10 %%")
    add("--repeats", type=int, default=3, help="measured repeats, after one warm-up")
    add("--new-tokens", type=int, default=8, help="tokens of an answer, in the comparison")
    add("--dtype", default="auto", help="auto (float16 on a GPU, float32 on a CPU) or one of torch")
    add("--attention", default="auto", help="auto (flash_attention_2 if installed), sdpa, eager")
    add("--threads", type=int, help="of the CPU (default: PyTorch's choice)")
    add("--dry-run", action="store_true", help="print the plan only")
    add("--out", type=Path, help="also write the JSON here")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    _check(options)
    chosen = table3() if options.table3 else contenders(options.compare, options.ratios)
    device = target_device("auto", None)
    attention = chosen_attention(options.attention, device)
    timed = bool(options.checkpoint or device.type == "cuda" or not SIZES[options.size].needs_gpu)
    if options.dry_run:
        how = "timed" if timed else "FLOPs only, not measured: needs a GPU"
        for each in chosen:
            print(f"{options.checkpoint or options.size} {each.label}: {how}, {attention}")
        return 0
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    dtype = parse_dtype(options.dtype)
    if dtype is None:
        dtype = torch.float16 if device.type == "cuda" or not timed else torch.float32
    result = _settings(options, device, dtype, attention)
    if timed:
        model = _model(options, device, dtype, attention)
        result["decoder"] = model.decoder_shape.as_dict()
        result |= measured(model, chosen, options.repeats, options.new_tokens, options.table3)
    else:
        size = SIZES[options.size]
        result["decoder"] = size.decoder.as_dict()
        result["methods"] = count_only(size, chosen, options.new_tokens, dtype.itemsize, attention)
    result["bars"] = [] if options.table3 else judged(result)
    _tell(result | provenance(), options.out)
    return 0


def _settings(
    options: argparse.Namespace, device: torch.device, dtype: torch.dtype, attention: str
) -> dict[str, Any]:
    """Return the settings; of a folder its name only, as paths belong to one machine."""
    path = options.checkpoint
    return {
        "what": "bench",
        "format": FORMAT,
        "size": "checkpoint" if path else options.size,
        "checkpoint": Path(path).name if path and Path(path).exists() else path,
        "on_gpu": device.type == "cuda",
        "attention": attention,
        "dtype": str(dtype).removeprefix("torch."),
        "table3": options.table3,
        "repeats": options.repeats,
        "new_tokens": options.new_tokens,
    }


def _tell(result: dict[str, Any], out: Path | None) -> None:
    """Print the tables and then the JSON, and write it."""
    print(as_text(result))
    if out is not None:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise TodreError(f"out {str(out)!r} cannot be written: {error.strerror}.") from None
    print(json.dumps(result))


def measured(
    model: LlavaLlamaForCausalLM,
    chosen: Sequence[Contender],
    repeats: int,
    new_tokens: int,
    methods_only: bool = False,
) -> dict[str, Any]:
    """Return everything that is timed on a model."""
    result: dict[str, Any] = {"methods": compare(model, chosen, repeats, new_tokens)}
    if methods_only:
        return result
    device = model.device
    return result | {
        "loads": loads(model, repeats),
        "stock_loads": stock_loads(model, repeats),
        "probe": probe(model, {PROBED[0]: repeats, PROBED[1]: _CHEAP * repeats}),
        "cls_row": cls_row(model, _CHEAP * repeats),
        "attached_but_off": attached_but_off(model, PROBED[-1], 4 * _CHEAP * repeats),
        "selection": selection(repeats, device),
    }


def chosen_attention(wanted: str, device: torch.device) -> str:
    """Return the attention implementation; FlashAttention where it is installed."""
    if wanted != "auto":
        check_attention(wanted, device)
        return wanted
    if device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None:
        return "flash_attention_2"
    say("FlashAttention is not used: it needs a GPU and flash-attn; SDPA takes its place")
    return "sdpa"


def _model(
    options: argparse.Namespace, device: torch.device, dtype: torch.dtype, attention: str
) -> LlavaLlamaForCausalLM:
    if options.checkpoint is None:
        say(f"building {options.size}")
        return build(SIZES[options.size], device, dtype, attention)
    _, model, _, _ = load_pretrained_model(
        options.checkpoint,
        dtype=dtype,
        attn_implementation=attention,
        protocol=options.protocol,
    )
    return model


def _check(options: argparse.Namespace) -> None:
    for key, low in (("repeats", 1), ("new_tokens", 3), ("threads", 1)):
        if getattr(options, key) is not None:
            whole(key.replace("_", "-"), getattr(options, key), low)
    if options.dtype != "auto" and options.dtype not in DTYPES:
        parse_dtype(options.dtype)
