"""What test_tensor_parallel.py looks at, in this process or in each of two."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from eval.mini import held_out
from llava_todre.model.images import process_images
from llava_todre.model.load import load_pretrained_model
from llava_todre.model.prompt import build_prompt, tokenizer_image_token
from llava_todre.pruners import PRUNERS, LayerView, Pruner, create_pruner
from llava_todre.vlm import Request, answer

LAYERS = 10
METHODS = {
    **{name: {} for name in PRUNERS if create_pruner(name).probe_layers(LAYERS)},
    "vanilla": {},
    "todre": {"tau": 1.0, "probe_depths": (0.3, 0.6)},
    "divprune+pyramiddrop": {"inside.retain_ratio": 0.3},
}
SAMPLED = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 12, "min_new_tokens": 12}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Look(Pruner):
    """Notes what a method is shown after a layer; drops nothing."""

    shown: dict[str, Tensor] = dataclasses.field(default_factory=dict, hash=False)

    def probe_layers(self, num_layers: int) -> tuple[int, ...]:
        return (2,)

    def at_layer(self, view: LayerView) -> None:
        rows = torch.tensor([0, len(view.kinds) - 1])
        self.shown["queries"] = view.queries(rows).clone()
        self.shown["keys"] = view.keys().clone()
        self.shown["attention ahead"] = view.decoder.next_layer_attention(rows).clone()


def observe(checkpoint: str, **arguments: Any) -> dict[str, Any]:
    """Return what a model holds, and what it says with each method."""
    tokenizer, model, processor, _ = load_pretrained_model(checkpoint, **arguments)
    sizes = {
        name: (weight.to_local() if hasattr(weight, "to_local") else weight).numel()
        for name, weight in model.named_parameters()
    }
    samples = held_out(2)
    requests = [Request(each.questions[k].text, [each.image]) for k, each in enumerate(samples)]
    prompt = build_prompt(samples[0].questions[1].text, 1)
    image = samples[0].image
    inputs = {
        "input_ids": torch.tensor(tokenizer_image_token(prompt, tokenizer))[None],
        "images": process_images([image], processor, model.config),
        "image_sizes": [image.size],
    }
    seen: dict[str, Any] = {}
    for method, knobs in METHODS.items():
        model.set_pruner(method, **{"retain_ratio": 0.4, **knobs} if method != "vanilla" else knobs)
        with torch.inference_mode():
            logits: Tensor = model(**inputs).logits
        answers = answer(model, tokenizer, requests)
        stats = [each.stats for each in answers]
        seen[method] = {
            "logits": logits.clone(),
            "texts": [each.text for each in answers],
            "tokens": [each.prompt_tokens_per_layer for each in stats],
            "ratios": torch.tensor(
                [
                    (probe.text_to_visual or 0.0, probe.visual_to_text or 0.0)
                    for each in stats
                    for probe in each.probes
                ]
            ),
        }
    look = Look(retain_ratio=1.0)
    model.set_pruner(look)
    with torch.inference_mode():
        model(**inputs)
    model.set_pruner("todre", retain_ratio=0.4)
    torch.manual_seed(0)
    drawn = [each.text for each in answer(model, tokenizer, requests, **SAMPLED)]
    return {"sizes": sizes, "seen": seen, "shown": look.shown, "drawn": drawn}
