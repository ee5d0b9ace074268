"""Twelve prompts against what the original LLaVA code computed for them (tests/golden)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MeasureAll
from reference import IMAGE
from safetensors.torch import load_file
from torch import Tensor

from llava_todre.model.llava import LlavaConfig, LlavaLlamaForCausalLM

GOLDEN = Path(__file__).parents[1] / "golden"
CHECKPOINTS = {"v16": "llava-v1.6-tiny", "v15": "llava-v1.5-tiny"}
CASES = [(variant, number) for variant in CHECKPOINTS for number in range(6)]
TOWER = "model.vision_tower.vision_tower."

LAST = ("cls_attention", -1)


@cache
def checkpoint(variant: str, attention: str) -> LlavaLlamaForCausalLM:
    """Load a tiny checkpoint by hand, independently of llava_todre.model.load."""
    folder, tower = GOLDEN / CHECKPOINTS[variant], GOLDEN / f"clip-{variant}"
    config = json.loads((folder / "config.json").read_text())
    config.pop("model_type")
    config["vision_config"] = json.loads((tower / "config.json").read_text())
    model = LlavaLlamaForCausalLM(LlavaConfig(**config)).eval()
    model.config._attn_implementation = attention
    weights = load_file(folder / "model.safetensors")
    if not any(name.startswith(TOWER) for name in weights):
        beside = load_file(tower / "model.safetensors")
        weights |= {TOWER + name: weight for name, weight in beside.items()}
    weights = {name.replace("vision_tower.vision_model.", "vision_tower."): weight
               for name, weight in weights.items()}  # fmt: skip
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not missing
    assert all(name.startswith("model.vision_tower") for name in unexpected), unexpected
    return model


@cache
def expected_tensors(variant: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{variant}_expected.safetensors")


@dataclass(frozen=True)
class Case:
    """One golden prompt."""

    ids: Tensor
    pixels: Tensor
    size: tuple[int, int]
    counts: tuple[int, int, int]
    """System, visual and text tokens."""
    expected: dict[str, Tensor]

    @property
    def inputs(self) -> dict[str, Any]:
        return {"images": self.pixels, "image_sizes": [self.size]}


def case_of(variant: str, number: int) -> Case:
    facts = json.loads((GOLDEN / f"{variant}_cases.json").read_text())[number]
    expected = {
        name.removeprefix(f"{number}."): tensor
        for name, tensor in expected_tensors(variant).items()
        if name.startswith(f"{number}.")
    }
    counts = (facts["system_tokens"], facts["visual_tokens"], facts["text_tokens"])
    size = tuple(facts["size_wh"])
    return Case(expected["input_ids"], expected["pixel_values"], size, counts, expected)


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def case(request: pytest.FixtureRequest, attention: str) -> tuple[LlavaLlamaForCausalLM, Case]:
    variant, number = request.param
    model = checkpoint(variant, attention)
    model.set_pruner("vanilla")
    return model, case_of(variant, number)


@torch.no_grad()
def test_prompts_equal_the_original(case):
    model, golden = case
    prepared = model.prepare_inputs_labels_for_multimodal(
        golden.ids, None, None, None, None, *golden.inputs.values()
    )
    torch.testing.assert_close(prepared[4], golden.expected["inputs_embeds"], rtol=0, atol=1e-5)
    stats = model.last_stats[0]
    system, visual, text = golden.counts
    assert stats.text_tokens == system + text
    assert stats.visual_tokens + stats.newline_tokens == visual
    assert int((golden.ids[0] == IMAGE).nonzero()) == system


@torch.no_grad()
def test_logits_equal_the_original(case):
    model, golden = case
    logits = model(golden.ids, **golden.inputs).logits
    torch.testing.assert_close(logits, golden.expected["logits"], rtol=0, atol=1e-4)


def test_answers_equal_the_original(case):
    model, golden = case
    new = model.generate(golden.ids, **golden.inputs, do_sample=False, max_new_tokens=12)
    assert new[0].tolist() == golden.expected["generated_ids"].tolist()


@torch.no_grad()
def test_cls_attention_equals_the_original(case):
    model, golden = case
    views = golden.pixels.flatten(0, -4)
    got = model.get_vision_tower()(views, [LAST]).measured[LAST]
    expected = golden.expected["cls_attention_last_layer"]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_attention_ratios_equal_the_original(case):
    model, golden = case
    unmeasured = model(golden.ids, **golden.inputs).logits
    model.set_pruner(MeasureAll())
    assert torch.equal(model(golden.ids, **golden.inputs).logits, unmeasured)
    probes = model.last_stats[0].probes
    to_visual = torch.tensor([probe.text_to_visual for probe in probes], dtype=torch.float64)
    torch.testing.assert_close(to_visual, golden.expected["alpha_t_to_v"], rtol=0, atol=1e-5)
    assert [probe.visual_to_text for probe in probes] == [0.0] * 8
    assert golden.expected["alpha_v_to_t_after"].tolist() == [0.0] * 8


@torch.no_grad()
def test_attention_to_all_text_equals_the_original(case):
    """With the system prompt in T, visual tokens do attend to text."""
    model, golden = case
    model.set_pruner(MeasureAll(all_text=True))
    model(golden.ids, **golden.inputs)
    to_text = [probe.visual_to_text for probe in model.last_stats[0].probes]
    expected = golden.expected["alpha_v_to_all_text"]
    torch.testing.assert_close(torch.tensor(to_text).double(), expected, rtol=0, atol=1e-5)
    assert min(to_text) > 0.05
