"""Hand-made views of one sample between decoder layers, and slow attention to compare with.

Symbols: L tokens of the prompt, N of them present, H = 8 query heads, G = 4 key heads, E head
    width, D width, P patch tokens present.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llava_todre.pruners.base import Keep, Pruner
from llava_todre.pruners.view import DecoderView, LayerView, PromptView
from llava_todre.relevance import attention_rows
from llava_todre.spans import TokenType

SYSTEM, VISUAL, TEXT, NEWLINE = (
    TokenType.SYSTEM,
    TokenType.VISUAL,
    TokenType.TEXT,
    TokenType.NEWLINE,
)
HEADS, GROUPS = 8, 4

LLAVA_15 = [SYSTEM] * 35 + [VISUAL] * 576 + [TEXT] * 20
ANYRES = [SYSTEM] * 35 + [VISUAL] * 576 + ([VISUAL] * 48 + [NEWLINE]) * 48 + [TEXT] * 40
TWO_IMAGES = [SYSTEM] * 9 + [VISUAL] * 576 + [TEXT] * 8 + [VISUAL] * 144 + [TEXT] * 14
PROMPTS = {"LLaVA-1.5": LLAVA_15, "AnyRes": ANYRES, "two images": TWO_IMAGES}
ENTERED = {"LLaVA-1.5": (576,), "AnyRes": (2880,), "two images": (576, 144)}
GONE = [i for i, kind in enumerate(ANYRES) if kind != VISUAL or i % 2]
INSIDE: list[Any] = [
    ({"retain_ratio": ratio}, PROMPTS[name], ENTERED[name])
    for ratio in (0.25, 0.10)
    for name in PROMPTS
]
INSIDE += [({"retain_tokens": count}, LLAVA_15, (576,)) for count in (1, 575)]
INSIDE += [({"retain_ratio": 0.10}, ANYRES, (2880,), GONE)]
"""Budgets, prompts, what of them entered the decoder, and what is left (all unless given)."""


@dataclass(frozen=True)
class Case:
    """What a view gives access to, of the tokens that are present."""

    view: LayerView
    queries: np.ndarray
    """(H, N, E) float64, as all below."""
    keys: np.ndarray
    """(G, N, E)."""
    queries_ahead: np.ndarray
    keys_ahead: np.ndarray
    hidden: np.ndarray
    """(N, D)."""
    embeds: np.ndarray
    """(L, D) of the whole prompt."""
    kinds: list[int]
    positions: list[int]

    def where(self, kind: int) -> list[int]:
        return [i for i, other in enumerate(self.kinds) if other == kind]


def make_case(
    kinds: list[int],
    entered: tuple[int, ...] | None = None,
    present: list[int] | None = None,
    layer: int = 1,
    num_layers: int = 32,
    head_width: int = 16,
    width: int = 64,
    seed: int = 0,
    hidden: Tensor | None = None,
    rope_theta: float = 10_000.0,
    **given: Any,
) -> Case:
    """Return random data of a prompt of which the positions ``present`` are left (None: all)."""
    generator = torch.Generator().manual_seed(seed)
    length = len(kinds)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    left = torch.arange(length) if present is None else torch.tensor(present)
    queries, ahead_queries = (2 * noise(HEADS, length, head_width)[:, left] for _ in range(2))
    keys, ahead_keys = (noise(GROUPS, length, head_width)[:, left] for _ in range(2))
    clusters = torch.randint(30, (length,), generator=generator)
    states = (noise(30, width)[clusters] + 0.5 * noise(length, width) + noise(width))[left]
    states = states if hidden is None else hidden
    embeds = 0.3 * noise(length, width)
    norm_weight = 1 + 0.2 * noise(width)
    scaling = head_width**-0.5
    prompt_kinds = torch.tensor(kinds, dtype=torch.int8)

    def final_norm(rows: Tensor) -> Tensor:
        return rows * rows.square().mean(-1, keepdim=True).add(1e-6).rsqrt() * norm_weight

    options: dict[str, Any] = {
        "layer": layer,
        "num_layers": num_layers,
        "kinds": prompt_kinds[left],
        "hidden_states": lambda: states,
        "queries": lambda rows: queries[:, rows],
        "keys": lambda: keys,
        "scaling": scaling,
        "positions": left,
        "prompt_kinds": prompt_kinds,
        "prompt_embeds": lambda: embeds,
        "visual_counts": entered or (kinds.count(VISUAL),),
        "next_layer_attention": lambda rows: attention_rows(
            ahead_queries[:, rows], ahead_keys, rows, scaling
        ),
        "final_norm": final_norm,
        "rope_frequencies": rope_frequencies(head_width, rope_theta),
    }
    options |= given
    named = {key: options.pop(key) for key in ("prompt_kinds", "positions", "prompt_embeds")}
    prompt = PromptView(*named.values())
    names = ("next_layer_attention", "rope_frequencies", "final_norm")
    decoder = DecoderView(*(options.pop(name) for name in names))
    arrays = (queries, keys, ahead_queries, ahead_keys, states, embeds)
    return Case(
        LayerView(prompt=prompt, decoder=decoder, **options),
        *(tensor.double().numpy() for tensor in arrays),
        kinds=[kinds[i] for i in left.tolist()],
        positions=left.tolist(),
    )


def rope_frequencies(head_width: int, theta: float) -> Tensor:
    """Return (E / 2,) float64."""
    pairs = range(head_width // 2)
    return torch.tensor([theta ** (-2 * i / head_width) for i in pairs], dtype=torch.float64)


def attention_row(queries: np.ndarray, keys: np.ndarray, head: int, row: int) -> np.ndarray:
    """Return (N,) the causal softmax attention of one query in one head."""
    key = keys[head * len(keys) // len(queries)]
    logits = key @ queries[head, row] / queries.shape[-1] ** 0.5
    logits[row + 1 :] = -np.inf
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def best(scores: np.ndarray, positions: list[int], count: int) -> set[int]:
    """Return the ``count`` of ``positions`` with the highest of ``scores`` (N,)."""
    return set(sorted(positions, key=lambda position: (-scores[position], position))[:count])


def kept_patches(case: Case, decision: Any) -> set[int]:
    """Return the positions of the patches that stay; no other token is named."""
    kept = Keep.checked(decision, "at_layer", len(case.kinds)).indices.tolist()
    assert set(kept) <= set(case.where(VISUAL))
    return set(kept)


def assert_keeps(
    method: type[Pruner], reference: Callable[[Case, int], set[int]], inside: Any, layer: int
) -> None:
    """Compare what a method keeps after ``layer`` with a reference, for one of ``INSIDE``."""
    options, kinds, entered, *present = inside
    case, pruner = make_case(kinds, entered, *present, layer=layer), method(**options)
    count = sum(map(pruner.num_keep, entered))
    kept = kept_patches(case, pruner.at_layer(case.view))
    assert len(kept) == count
    assert kept == reference(case, count)


def patches_per_layer(pruner: Pruner, kinds: list[int], num_layers: int, **options: Any) -> list:
    """Return how many patches each layer works on when ``pruner`` is called after its layers."""
    present = list(range(len(kinds)))
    layers, counts = pruner.probe_layers(num_layers), []
    for layer in range(num_layers):
        counts.append(sum(kinds[i] == VISUAL for i in present))
        if layer in layers:
            case = make_case(kinds, None, present, layer, num_layers, **options)
            decision = pruner.at_layer(case.view)
            if decision is not None:
                kept = kept_patches(case, decision)
                present = [
                    position
                    for i, position in enumerate(present)
                    if kinds[position] != VISUAL or i in kept
                ]
    return counts
