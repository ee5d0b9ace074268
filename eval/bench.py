"""Time the selection kernel and the prefill it shortens, as ratios taken in one process.

Random weights and features: speed does not depend on their values. Pairs take turns, so that a
noisy machine disturbs both alike; reported are median, 20th and 80th percentile of the ratios.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from llava_todre.flops import decoder_prefill_flops
from llava_todre.model.llava import LlavaConfig, LlavaLlamaForCausalLM
from llava_todre.provenance import provenance
from llava_todre.pruners import create_pruner
from llava_todre.selection import greedy_diverse, unit_rows
from llava_todre.spans import Kind, Spans
from llava_todre.withdrawal import Withdrawal

SELECTIONS = ((576, 1024, 58), (2880, 1024, 288), (2880, 1024, 720))
"""(candidate tokens, width, kept tokens)."""
VISUAL_TOKENS = (2880, 720, 288)
TEXT_TOKENS = 60
SYSTEM_TOKENS = 35


def bench(repeats: int, out: Path | None = None) -> dict[str, Any]:
    """Run everything, print a line per measurement and the JSON last."""
    results: dict[str, Any] = {"selection": [], "prefill": [], **provenance()}
    for size in SELECTIONS:
        results["selection"].append(_selection(*size, repeats))
        print(_line("selection " + "x".join(map(str, size)), results["selection"][-1]))
    for row in _prefill(repeats):
        results["prefill"].append(row)
        print(_line(f"prefill {row['visual_tokens']} visual tokens, {row['mode']}", row))
    if out is not None:
        out.write_text(json.dumps(results, indent=1))
    print(json.dumps(results))
    return results


def _line(name: str, row: dict[str, Any]) -> str:
    ratio = row["speedup"]
    bound = f", FLOPs allow {row['flops_ratio']:.2f}x" if "flops_ratio" in row else ""
    spread = f"{ratio['p20']:.2f} to {ratio['p80']:.2f}"
    return f"{name}: {ratio['median']:.2f}x ({spread}) vs {row['against']}{bound}"


def _ratios(
    slow: Callable[[], object], fast: Callable[[], object], repeats: int
) -> dict[str, float]:
    """Return percentiles of time(slow) / time(fast), taken in turns after a warm-up."""
    ratios = []
    for turn in range(repeats + 1):
        spent = []
        for run in (slow, fast):
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            spent.append(time.perf_counter() - start)
        if turn:
            ratios.append(spent[0] / spent[1])
    cuts = statistics.quantiles(ratios, n=5) if len(ratios) > 1 else ratios * 4
    return {"median": statistics.median(ratios), "p20": cuts[0], "p80": cuts[3], "count": repeats}


def _selection(num_tokens: int, width: int, budget: int, repeats: int) -> dict[str, Any]:
    features = torch.randn(num_tokens, width)

    def plain_loop() -> Tensor:
        rows = unit_rows(features)
        closeness = torch.zeros(num_tokens)
        newest, picked = 0, [0]
        for _ in range(budget - 1):
            closeness += rows @ rows[newest]
            closeness[newest] = torch.inf
            newest = int(closeness.argmin())
            picked.append(newest)
        return torch.tensor(picked)

    speedup = _ratios(plain_loop, lambda: greedy_diverse(features, budget, 0, "max_sum"), repeats)
    return {
        "tokens": num_tokens,
        "width": width,
        "kept": budget,
        "against": "a loop that multiplies by the newest token in every step",
        "speedup": speedup,
    }


def _prefill(repeats: int) -> list[dict[str, Any]]:
    """Compare prefills of pruned and unpruned prompts, and of a probe at every layer."""
    config = LlavaConfig(
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=1024,
        mm_hidden_size=32,
        vision_config={"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
        | {"num_hidden_layers": 1, "image_size": 28, "patch_size": 14},
    )
    model = LlavaLlamaForCausalLM(config).eval()
    probing = create_pruner("todre", probe_depths=tuple(i / 8 for i in range(4, 8)), tau=0.0)

    def run(visual: int, probe: bool) -> None:
        length = SYSTEM_TOKENS + visual + TEXT_TOKENS
        embeds = torch.randn(1, length, config.hidden_size)
        cache = DynamicCache(config=config)
        if probe:
            kinds = torch.full((1, length), Kind.VISUAL, dtype=torch.int8)
            kinds[:, :SYSTEM_TOKENS], kinds[:, -TEXT_TOKENS:] = Kind.SYSTEM, Kind.TEXT
            cache.withdrawal = Withdrawal(
                probing, Spans.without_newlines(kinds), config.num_hidden_layers
            )
        with torch.inference_mode():
            model.model(inputs_embeds=embeds, past_key_values=cache, use_cache=True)

    def flops(visual: int) -> float:
        tokens = [SYSTEM_TOKENS + visual + TEXT_TOKENS] * config.num_hidden_layers
        return decoder_prefill_flops(model.decoder_shape, tokens)

    full = VISUAL_TOKENS[0]
    rows = []
    for visual in VISUAL_TOKENS:
        modes = [("probing every layer from L/2", True, visual)]
        if visual < full:
            modes.insert(0, ("pruned", False, full))
        for mode, probe, other in modes:
            rows.append(
                {
                    "visual_tokens": visual,
                    "mode": mode,
                    "against": f"{other} visual tokens, no probe",
                    "flops_ratio": flops(other) / flops(visual),
                    "speedup": _ratios(
                        partial(run, other, False), partial(run, visual, probe), repeats
                    ),
                }
            )
    return rows
