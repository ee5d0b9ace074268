"""Write ``docs/models.md``: which stock model of transformers works with what.

``MATRIX`` is read by the tests too: each of its cells that is not ABSENT is one test in
``tests/hf/test_matrix.py``.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from statistics import fmean
from typing import Any

from eval import ROOT
from eval.pages.fill import filled
from eval.tables.render import markdown_lines
from llava_todre.hf.families import FAMILIES
from llava_todre.hf.family import Family
from llava_todre.pruners import PRUNERS

PAGE = ROOT / "docs" / "models.md"
REPRODUCED = ROOT / "docs" / "results" / "reproduce_mini"
STOCK = ROOT / "docs" / "results" / "stock_mini"
"""Made with: todre convert --model checkpoints/mini --out outputs/mini_hf, and for each method

    python -m eval run configs/runs/mini.yaml --out docs/results/stock_mini --offline \\
        --set model.pretrained=outputs/mini_hf --set model.backend=transformers \\
        --set method=todre --set options.retain_ratio=0.1
"""
Record = dict[str, Any]

YES, REFUSED, ABSENT = "yes", "refused", "-"

_WORKS = (
    "one image",
    "several images",
    "video",
    "padded batch, some samples without image",
    "right-padded batch, no attention mask",
    "pruning before the decoder",
    "withdrawal inside the decoder",
    "dropping a part inside the decoder",
    "masks for FlashAttention (emulated)",
    "sampling",
    "beam search",
    "several answers per prompt",
    "end of sequence at different steps",
    "repetition penalty",
    "max_length, min_length",
    "streamer",
    "prompts of text only",
    "conversation given again",
    "output_hidden_states",
    "bfloat16",
    "use_cache=False, before the decoder only",
    "static cache, before the decoder only",
    "sliding window, before the decoder only",
)
_REFUSED = (
    "use_cache=False, inside the decoder",
    "static cache, inside the decoder",
    "sliding window, inside the decoder",
    "past_key_values",
    "assisted decoding, prompt lookup",
    "chunked prefill",
    "training mode",
)
FEATURES = (*_WORKS, *_REFUSED)
_USUAL = dict.fromkeys(_WORKS, YES) | dict.fromkeys(_REFUSED, REFUSED)
_IMAGES_ONLY = _USUAL | {"video": ABSENT}
_QWEN3_LAYERS = (36, 3)
"""Of Qwen3-VL-8B: decoder layers, and how many of the first add features after them."""
_NO_WINDOW = {feature: ABSENT for feature in FEATURES if feature.startswith("sliding window")}

MATRIX: dict[str, dict[str, str]] = {
    "llava": _IMAGES_ONLY,
    "llava_next": _IMAGES_ONLY,
    "llava_next_video": _USUAL,
    "llava_onevision": _USUAL,
    "qwen2_vl": _USUAL,
    "qwen2_5_vl": _USUAL,
    "qwen3_vl": _USUAL | _NO_WINDOW,
    "internvl": _USUAL,
}


def missing_needs(family: Family, method: str) -> list[str]:
    """Return what a method needs and models of a family do not give."""
    names = {need if isinstance(need, str) else need[0] for need in PRUNERS[method]().needs}
    return sorted(names - family.served)


def drops_too_early(method: str, num_layers: int, deep_layers: int) -> bool:
    """Return whether a method by default drops tokens before all image features are added."""
    return min(PRUNERS[method]().probe_layers(num_layers), default=num_layers) < deep_layers


def render() -> str:
    """Return the page."""
    parts = {
        "families": _families(),
        "features": _features(),
        "methods": _methods(),
        "proxies": _proxies(),
        "scores": _scores(),
    }
    return filled("models", parts)


def score_pairs() -> list[tuple[Record, Record]]:
    """Return stored runs of the converted bundled model, each with that of our own class."""
    ours = {_settings(run): run for run in _runs(REPRODUCED)}
    return [(run, ours[_settings(run)]) for run in _runs(STOCK)]


def _runs(folder: Path) -> list[Record]:
    records = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    return sorted(records, key=lambda run: -run["config"]["options"]["retain_ratio"])


def _settings(run: Record) -> str:
    keys = ("method", "options", "benchmarks", "limit", "seed", "batch_size")
    return json.dumps([run["config"][key] for key in keys], sort_keys=True)


def _scores() -> str:
    pairs, means_of, differ = score_pairs(), [], 0
    for stock, ours in pairs:
        means = [fmean(m["score"] for m in run["benchmarks"].values()) for run in (stock, ours)]
        label = f"{stock['config']['method']} {stock['config']['options']['retain_ratio']:.0%}"
        means_of.append(f"{label}: {means[0]:.1f} (our class {means[1]:.1f})")
        for key, mark in stock["benchmarks"].items():
            others = ours["benchmarks"][key]["items"]
            differ += sum(a != b for a, b in zip(mark["items"], others, strict=True))
    questions = sum(mark["num_samples"] for mark in pairs[0][0]["benchmarks"].values())
    return textwrap.fill(
        f"Mean accuracy in % of the converted bundled model over the nine tasks of the mini suite, "
        f"through lmms-eval with `backend=transformers`: {'; '.join(means_of)}. Of {len(pairs)} x "
        f"{questions} questions {differ} were scored differently.",
        116,
        break_on_hyphens=False,
    )


def _families() -> str:
    table = [["family", "classes of transformers"]]
    for family in FAMILIES:
        classes = ", ".join(f"`{name}`" for name in family.models)
        table.append([f"`{family.name}`", classes])
    return "\n".join(markdown_lines(table, left=2))


def _features() -> str:
    table = [["", *(f"`{name}`" for name in MATRIX)]]
    for feature in FEATURES:
        table.append([feature, *(of_family.get(feature, ABSENT) for of_family in MATRIX.values())])
    return "\n".join(markdown_lines(table, left=len(table[0])))


def _methods() -> str:
    table = [["method", *(f"`{family.name}`" for family in FAMILIES)]]
    for method in PRUNERS:
        table.append([f"`{method}`", *(_fit(family, method) for family in FAMILIES)])
    return "\n".join(markdown_lines(table, left=len(table[0])))


def _fit(family: Family, method: str) -> str:
    """Return whether a method with its defaults works on a family, or why not."""
    missing = missing_needs(family, method)
    if missing:
        return f"no {', '.join(f'`{name}`' for name in missing)}"
    early = family.name == "qwen3_vl" and drops_too_early(method, *_QWEN3_LAYERS)
    return "later" if early else YES


def _proxies() -> str:
    lines = [
        f"- `{family.name}`: `{other}` in place of `{quantity}`."
        for family in FAMILIES
        for quantity, other in family.proxies.items()
    ]
    return "\n".join(lines)
