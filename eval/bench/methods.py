"""A whole answer, method by method: time of each stage, memory, FLOPs, and what they would allow.

Symbols: L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from eval.bench.answers import QUESTION_TOKENS, Timed, answer, questions, random_image
from eval.bench.dims import Size, build, thin, tower_shape
from eval.bench.memory import peak_mib
from eval.bench.roofline import kv_bytes, step_bytes
from eval.bench.timing import in_turns, percentiles, ratios, say
from eval.results.published import rows
from llava_todre.errors import TodreError
from llava_todre.flops import (
    DecoderShape,
    TowerShape,
    decoder_decode_flops,
    decoder_prefill_flops,
    paper_prefill_flops,
    projector_flops,
    tower_flops,
)
from llava_todre.model.llava import LlavaLlamaForCausalLM
from llava_todre.pruners import Pruner, create_pruner
from llava_todre.stage2 import PrunedCache
from llava_todre.stage2.cache import CACHE_ARGUMENT

TABLE3_RATIO = 0.10


@dataclass(frozen=True)
class Contender:
    """One line of the comparison."""

    label: str
    method: str
    options: Mapping[str, Any]

    @property
    def pruner(self) -> Pruner:
        """The method."""
        return create_pruner(self.method, **self.options)


def contenders(methods: Sequence[str], shares: Sequence[float]) -> list[Contender]:
    """Return the unpruned model first, then every method at every share of the tokens.

    Raises:
        TodreError: an unknown method or a share out of range.
    """
    made = [Contender("vanilla", "vanilla", {})]
    for share in shares:
        for method in dict.fromkeys(methods):
            if method != "vanilla":
                options = {"retain_ratio": share}
                made.append(Contender(f"{method} {share:.0%}", method, options))
    for each in made:
        _ = each.pruner
    return made


def table3() -> list[Contender]:
    """Return the rows of Table 3, and ToDRE when its Stage 2 withdraws for certain.

    With random weights text never looks away from the image, so the plain rows of ToDRE show it
    without withdrawal and the last one with it; a trained model lies between the two.
    """
    made = [Contender(row.label, row.method, row.options) for row in rows("3")]
    options = {"retain_ratio": TABLE3_RATIO, "tau": 1.0}
    return [*made, Contender(f"todre {TABLE3_RATIO:.0%}, withdrawn", "todre", options)]


def compare(
    model: LlavaLlamaForCausalLM, chosen: Sequence[Contender], repeats: int, new_tokens: int
) -> list[dict[str, Any]]:
    """Return a row per method, timed in turns on one question about one image."""
    ids, mask = questions(model, [QUESTION_TOKENS])
    images = [random_image(model, 0)]

    def run(each: Contender, length: int = new_tokens, **kwargs: Any) -> Timed:
        say(each.label)
        model.set_pruner(each.pruner)
        return answer(model, images, ids, mask, length, **kwargs)

    shape, tower = model.decoder_shape, tower_shape(model)
    itemsize = model.lm_head.weight.element_size()
    skips_masked = model.config._attn_implementation != "eager"
    made = []
    for each in chosen:
        cache = PrunedCache(model.config)
        peak = peak_mib(partial(run, each, 1, **{CACHE_ARGUMENT: cache}), model)
        row = described(each) | {
            "measured": True,
            "peak_memory_mib": peak,
            "kv_cache_bytes": cache.num_bytes,
        }
        (stats,) = model.last_stats
        layers = stats.prompt_tokens_per_layer
        views = stats.visual_tokens // tower.patches
        row |= counted(shape, tower, views, layers, new_tokens, itemsize, skips_masked)
        made.append(row | {"kept_tokens": stats.kept_tokens, "visual_tokens": stats.visual_tokens})
    timed = in_turns({each.label: partial(run, each) for each in chosen}, repeats, warm=True)
    for row in made:
        row |= _times(timed[row["label"]])
        row |= _against(row, made[0], timed[row["label"]], timed[made[0]["label"]])
    return made


def count_only(
    size: Size, chosen: Sequence[Contender], new_tokens: int, itemsize: int, attention: str
) -> list[dict[str, Any]]:
    """Return the rows of :func:`compare` without what needs the device: FLOPs and bytes.

    How many tokens each layer processes is not assumed: a model of the same depth and of next to no
    width runs every method.
    """
    model = build(thin(size), torch.device("cpu"), torch.float32, "sdpa")
    ids, mask = questions(model, [QUESTION_TOKENS])
    images = [random_image(model, 0)]
    made: list[dict[str, Any]] = []
    for each in chosen:
        say(f"{each.label}: counting")
        model.set_pruner(each.pruner)
        answer(model, images, ids, mask, 1)
        (stats,) = model.last_stats
        layers = stats.prompt_tokens_per_layer
        views = stats.visual_tokens // size.tower.patches
        row = described(each) | {"measured": False}
        row |= counted(
            size.decoder, size.tower, views, layers, new_tokens, itemsize, attention != "eager"
        )
        row |= {"kept_tokens": stats.kept_tokens, "visual_tokens": stats.visual_tokens}
        made.append(row | {"limit": _limits(row, (made or [row])[0])})
    return made


def described(each: Contender) -> dict[str, Any]:
    """Return what a row is about."""
    return {"label": each.label, "method": each.method, "options": dict(each.options)}


def counted(
    shape: DecoderShape,
    tower: TowerShape,
    views: int,
    layers: Sequence[int],
    new_tokens: int,
    itemsize: int,
    skips_masked: bool,
) -> dict[str, Any]:
    """Return exact FLOPs and bytes of one sample.

    Args:
        shape: the decoder.
        tower: the vision tower.
        views: of the image.
        layers: (L,) prompt tokens each layer processes.
        new_tokens: of the answer.
        itemsize: bytes per number.
        skips_masked: whether attention leaves out what the causal mask hides.
    """
    patches = views * tower.patches
    return {
        "prompt_tokens_per_layer": list(layers),
        "flops": {
            "vision": tower_flops(tower, views)
            + projector_flops(tower.width, shape.width, patches),
            "prefill": decoder_prefill_flops(shape, layers),
            "prefill_causal": decoder_prefill_flops(shape, layers, causal=True),
            "decode": decoder_decode_flops(shape, layers, new_tokens - 1),
            "paper_prefill": paper_prefill_flops(shape, layers),
            "attention_skips_masked": skips_masked,
        },
        "prompt_kv_bytes": kv_bytes(shape, layers, itemsize),
        "bytes_per_step": step_bytes(shape, layers, itemsize),
    }


def _prefill_flops(row: Mapping[str, Any]) -> float:
    """Return what the attention implementation has to compute."""
    flops = row["flops"]
    return flops["prefill_causal" if flops["attention_skips_masked"] else "prefill"]


def _limits(row: Mapping[str, Any], full: Mapping[str, Any]) -> dict[str, float]:
    """Return the speed-ups over ``full`` that FLOPs, and in decoding bytes, would allow."""
    prefill, unpruned = _prefill_flops(row), _prefill_flops(full)
    vision = full["flops"]["vision"]
    return {
        "prefill": unpruned / prefill,
        "first_token": (vision + unpruned) / (vision + prefill),
        "decode": full["bytes_per_step"] / row["bytes_per_step"],
    }


def _times(timed: Sequence[Timed]) -> dict[str, Any]:
    """Return percentiles over the turns of one method."""
    stages = {
        name: percentiles([each.stages_ms.get(name, 0.0) for each in timed])
        for name in timed[0].stages_ms
    }
    firsts = [each.first_token_ms for each in timed if each.first_token_ms is not None]
    tokens = [1e3 / each.token_ms for each in timed if each.token_ms]
    return {
        "stages_ms": stages,
        "total_ms": percentiles([each.total_ms for each in timed]),
        "first_token_ms": percentiles(firsts),
        "tokens_per_s": percentiles(tokens),
        "samples_per_s": percentiles([1e3 / each.total_ms for each in timed]),
    }


def _against(
    row: Mapping[str, Any],
    full: Mapping[str, Any],
    timed: Sequence[Timed],
    unpruned: Sequence[Timed],
) -> dict[str, Any]:
    """Return speed-ups over the unpruned model, turn by turn, and what would be possible."""
    if not all(each.first_token_ms and each.token_ms for each in (*timed, *unpruned)):
        raise TodreError("new_tokens is out of range; allowed: 3 or more.")

    def speedup(name: str) -> dict[str, float]:
        def of(each: Timed) -> float:
            return each.stages_ms[name] if name == "prefill" else getattr(each, name)

        return ratios([of(each) for each in unpruned], [of(each) for each in timed])

    limit = _limits(row, full)
    prefill = speedup("prefill")
    selection = [each.stages_ms["selection"] for each in timed]
    return {
        "speedup": {
            "prefill": prefill,
            "first_token": speedup("first_token_ms"),
            "decode": speedup("token_ms"),
            "total": speedup("total_ms"),
        },
        "limit": limit,
        "prefill_of_limit": {
            key: value if key == "count" else value / limit["prefill"]
            for key, value in prefill.items()
        },
        "selection_of_prefill": ratios(selection, [each.stages_ms["prefill"] for each in unpruned]),
    }
