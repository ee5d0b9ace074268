"""What pruning adds, part by part: selection, probes, the row of [CLS], and being attached at all.

What is judged by a bar of few percent is measured as computing time on one thread, turn by turn: on
a CPU with other work the clock says more about that work.

Symbols: N candidate tokens, D width, K kept tokens, V views.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from eval.bench.answers import SYSTEM_TOKENS, random_image
from eval.bench.timing import (
    computing,
    in_turns,
    kind_of_time,
    one_thread,
    percentiles,
    ratios,
    say,
    seconds,
)
from llava_todre.model.images import process_images
from llava_todre.model.llava import LlavaLlamaForCausalLM
from llava_todre.model.vision import cls_attention
from llava_todre.pruners import create_pruner
from llava_todre.selection import greedy_diverse
from llava_todre.spans import Spans, TokenType
from llava_todre.stage2 import DecoderPruning, LayerInputs, PrunedCache
from llava_todre.stage2.cache import CACHE_ARGUMENT
from llava_todre.stage2.segment import KeyStore

SELECTIONS = (
    (2880, 4096, 288),
    (2880, 4096, 720),
    (2880, 1024, 288),
    (576, 4096, 58),
    (64, 4096, 6),
)
"""(N, D, K)."""
TEXT_TOKENS = 60
"""After the image, in the prompts of this file."""
DECODED = 4
"""Tokens decoded when an attached model is compared with an untouched one."""
_SHORT_S = 2e-3
"""Runs shorter than this are timed several at a time."""


def selection(repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """Compare the selection with the loop anyone would write first."""
    made = []
    for num_tokens, width, budget in SELECTIONS:
        say(f"selection of {budget} from {num_tokens} tokens of width {width}")
        features = torch.randn(num_tokens, width, device=device)
        runs = {
            "loop": partial(plain_greedy, features, budget),
            "ours": partial(greedy_diverse, features, budget, 0, "max_sum"),
        }
        same = torch.equal(runs["loop"](), runs["ours"]())
        timed = in_turns({name: partial(_steady, run) for name, run in runs.items()}, repeats)
        made.append(
            {
                "tokens": num_tokens,
                "width": width,
                "kept": budget,
                "same_picks": same,
                "ms": percentiles([1e3 * each for each in timed["ours"]]),
                "speedup": ratios(timed["loop"], timed["ours"]),
            }
        )
    return made


def plain_greedy(features: Tensor, budget: int) -> Tensor:
    """Return (K,) picks of max-sum from token 0, with a product ``X @ x_c`` in every step."""
    rows = features / features.norm(dim=-1, keepdim=True)  # (N, D)
    picked = [0]
    closeness = torch.zeros(len(rows), device=rows.device)
    while len(picked) < budget:
        closeness = closeness + rows @ rows[picked[-1]]
        closeness[picked[-1]] = torch.inf
        picked.append(int(closeness.argmin()))
    return torch.tensor(picked, device=rows.device)


def _steady(
    run: Callable[[], object], measure: Callable[[Callable[[], object]], float] = seconds
) -> float:
    """Return the seconds of one call; short ones are repeated, or the clock would be measured."""
    spent = measure(run)
    if spent > _SHORT_S:
        return spent
    times = int(_SHORT_S / max(spent, 1e-7)) + 1
    return measure(lambda: [run() for _ in range(times)]) / times


class _TimedPruning(DecoderPruning):
    """Adds up the seconds of its own calls between the layers."""

    spent = 0.0

    def begin(self, hidden_states: Tensor, cache: KeyStore | None) -> None:
        self.spent += computing(lambda: super(_TimedPruning, self).begin(hidden_states, cache))

    def enter(
        self,
        layer: int,
        inputs: LayerInputs,
        cache: KeyStore | None,
        flash: bool,
        module: Any = None,
    ) -> LayerInputs:
        entered = []
        enter = super().enter
        self.spent += computing(lambda: entered.append(enter(layer, inputs, cache, flash, module)))
        return entered[0]

    def leave(
        self, layer: int, decoder: Any, inputs: LayerInputs, output: Tensor, cache: KeyStore | None
    ) -> None:
        self.spent += computing(
            lambda: super(_TimedPruning, self).leave(layer, decoder, inputs, output, cache)
        )


def probe(model: LlavaLlamaForCausalLM, visual: Mapping[int, int]) -> list[dict[str, Any]]:
    """Measure every layer from the middle on, never withdraw, and compare with no probe at all.

    Args:
        model: of which the decoder is used.
        visual: number of visual tokens of a prompt -> turns.

    Returns:
        A row per prompt: ``inside``, the time spent between the layers over that of the prefill
        without; and ``added``, how much longer the prefill with probes took, which is the truth on
        a GPU but drowns in the noise of a CPU.
    """
    layers = model.config.num_hidden_layers
    depths = tuple((layer + 0.5) / layers for layer in range(layers // 2, layers))
    pruner = create_pruner("todre", probe_depths=depths, tau=0.0)

    def prefill(count: int, kind: type[DecoderPruning] | None) -> tuple[float, float]:
        embeds, spans = prompt(model, count)
        state = None if kind is None else kind(pruner, spans, layers)
        cache = PrunedCache(model.config, state)
        given = {"inputs_embeds": embeds, CACHE_ARGUMENT: cache, "use_cache": True}
        with torch.inference_mode():
            spent = computing(lambda: model.model(**given))
        assert state is None or len(state.probes[0]) == len(depths)
        return spent, getattr(state, "spent", 0.0)

    made = []
    for count, repeats in visual.items():
        say(f"probes in a prompt of {count} visual tokens")
        kinds = {"without": None, "with": DecoderPruning, "inside": _TimedPruning}
        with one_thread():
            timed = in_turns(
                {name: partial(prefill, count, kind) for name, kind in kinds.items()}, repeats
            )
        plain = [spent for spent, _ in timed["without"]]
        made.append(
            {
                "visual_tokens": count,
                "probes": len(depths),
                "clock": kind_of_time(),
                "inside": ratios([inside for _, inside in timed["inside"]], plain),
                "added": _added(ratios([spent for spent, _ in timed["with"]], plain)),
            }
        )
    return made


def prompt(model: LlavaLlamaForCausalLM, visual: int) -> tuple[Tensor, Spans]:
    """Return random (1, length, D) embeddings of system, image and text, and what is where."""
    length = SYSTEM_TOKENS + visual + TEXT_TOKENS
    kinds = torch.full((1, length), TokenType.VISUAL, dtype=torch.int8, device=model.device)
    kinds[:, :SYSTEM_TOKENS], kinds[:, -TEXT_TOKENS:] = TokenType.SYSTEM, TokenType.TEXT
    embeds = torch.randn(1, length, model.config.hidden_size).to(model.device, model.dtype)
    return embeds, Spans.without_newlines(kinds)


def cls_row(model: LlavaLlamaForCausalLM, repeats: int) -> dict[str, Any]:
    """Time the attention of [CLS] in one layer, as a share of the tower that runs anyway."""
    say("attention of [CLS]")
    tower = model.get_vision_tower()
    sides = random_image(model, 0)
    pixels = process_images([sides], tower.image_processor, model.config)[0]
    pixels = pixels.to(model.device, model.dtype)
    pixels = pixels if pixels.ndim == 4 else pixels[None]
    layer = tower.vision_tower.encoder.layers[-1]
    with torch.inference_mode(), one_thread():
        hidden = tower.vision_tower.pre_layrnorm(tower.vision_tower.embeddings(pixels))
        timed = in_turns(
            {
                "without": lambda: computing(lambda: tower(pixels)),
                "with": lambda: computing(lambda: tower(pixels, [("cls_attention", -1)])),
                "inside": lambda: _steady(lambda: cls_attention(layer, hidden), computing),
            },
            repeats,
        )
    return {
        "views": len(pixels),
        "inside": ratios(timed["inside"], timed["without"]),
        "added": _added(ratios(timed["with"], timed["without"])),
    }


def attached_but_off(model: LlavaLlamaForCausalLM, visual: int, repeats: int) -> dict[str, Any]:
    """Compare our model, nothing pruned, with ``LlamaForCausalLM`` on the very same modules.

    Both read the same embeddings and decode a few tokens; their logits must be equal bit for bit.
    """
    say("attached but off")
    plain = untouched(model)
    embeds, _ = prompt(model, visual)
    logits: dict[str, Tensor] = {}

    def run(name: str, of: LlamaForCausalLM) -> float:
        def decode() -> None:
            cache = PrunedCache(model.config)
            always = {CACHE_ARGUMENT: cache, "use_cache": True, "logits_to_keep": 1}
            given: dict[str, Tensor] = {"inputs_embeds": embeds}
            for _ in range(DECODED + 1):
                output = of(**given, **always)
                given = {"input_ids": output.logits[:, -1].argmax(-1, keepdim=True)}
            logits[name] = output.logits

        with torch.inference_mode():
            return computing(decode)

    model.set_pruner("todre", retain_ratio=1.0, probe_depths=())
    with one_thread():
        timed = in_turns(
            {"plain": partial(run, "plain", plain), "ours": partial(run, "ours", model)}, repeats
        )
    return {
        "visual_tokens": visual,
        "same_logits": torch.equal(logits["plain"], logits["ours"]),
        "added": _added(ratios(timed["ours"], timed["plain"])),
    }


def untouched(model: LlavaLlamaForCausalLM) -> LlamaForCausalLM:
    """Return transformers' own model around the decoder modules of ours."""
    with torch.device("meta"):
        plain = LlamaForCausalLM(model.config)
    for name in ("embed_tokens", "layers", "norm", "rotary_emb"):
        setattr(plain.model, name, getattr(model.model, name))
    plain.lm_head = model.lm_head
    return plain.eval()


def _added(ratio: dict[str, float]) -> dict[str, float]:
    """Return ratio - 1, what came on top."""
    return {key: value if key == "count" else value - 1 for key, value in ratio.items()}
