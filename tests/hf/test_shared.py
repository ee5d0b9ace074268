"""Stock models: what is shared between questions about an image changes no answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import FAMILIES, QWEN, inputs_for, model_of
from torch import Tensor

from llava_todre import hf
from llava_todre.stage2.prefix import PrefixStore

STEPS = 6
IMAGE: list[Any] = [3, (112, 100), 9]
METHODS: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "divprune": {"retain_ratio": 0.25},
    "todre": {"retain_ratio": 0.25, "tau": 0.0},
    "todre, withdrawing": {"retain_ratio": 0.25, "tau": 1.0, "probe_depths": (0.5,)},
    "vtw": {},
}
AFRESH: dict[str, dict[str, Any]] = {
    "fastv": {"retain_ratio": 0.25, "layer": 4},
    "trimtokenator": {"retain_ratio": 0.25},
}
TOLERANCE = {"rtol": 0, "atol": 1e-4}


def questions(inputs: dict[str, Any], lengths: list[int], seed: int = 0) -> list[dict[str, Any]]:
    """Return inputs with other words after the image, each a prompt of its own."""
    draw = torch.Generator().manual_seed(seed)
    ids = inputs["input_ids"]
    end = int((ids[0] >= 296).nonzero()[-1]) + 1
    rows = [torch.randint(2, 290, (1, length), generator=draw) for length in lengths]
    found = []
    for row in rows:
        whole = torch.cat([ids[:, :end], row], dim=1)
        shorter = inputs | {"attention_mask": torch.ones_like(whole)}
        found.append(without_types(shorter, whole))
    return found


def without_types(inputs: dict[str, Any], ids: Tensor) -> dict[str, Any]:
    given = inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in given:
        given["mm_token_type_ids"] = (ids == 299).int() + 2 * (ids == 298).int()
    return given


def batched(prompts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return prompts, padded on the left, without their pixels."""
    keys = ("input_ids", "attention_mask", "mm_token_type_ids")
    found = {
        key: torch.nn.utils.rnn.pad_sequence(
            [prompt[key][0] for prompt in prompts], True, 0, padding_side="left"
        )
        for key in keys
        if key in prompts[0]
    }
    for key in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts"):
        if key in prompts[0]:
            found[key] = torch.cat([prompt[key] for prompt in prompts])
    return found


def answered(model: Any, given: dict[str, Any], **more: Any) -> tuple[Tensor, Tensor]:
    """Return (B, steps) tokens and (B, steps, vocabulary) logits."""
    output = model.generate(
        **given, **more, do_sample=False, max_new_tokens=STEPS, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    return output.sequences[:, -STEPS:], torch.stack(output.logits, dim=1)


def asked_afresh(model: Any, prompts: list[dict[str, Any]]) -> tuple[Tensor, Tensor, list[Any]]:
    found, stats = [], []
    for prompt in prompts:
        found.append(answered(model, prompt))
        stats += hf.last_stats(model)
    tokens, logits = (torch.cat(each) for each in zip(*found, strict=True))
    return tokens, logits, stats


def count_towers(model: Any, family: str) -> list[int]:
    calls: list[int] = []
    tower = model.model.visual if family in QWEN else model.model.vision_tower
    tower.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_questions_about_an_image_are_answered_as_if_each_were_the_first(family, name, attention):
    model = model_of(family, attention)
    prompts = questions(inputs_for(model, [IMAGE]), [9, 4, 1, 12])
    with hf.prune(model, name.split(",")[0], **METHODS[name]):
        tokens, logits, stats = asked_afresh(model, prompts)
        (image,) = hf.encode(model, **prompts[0])
        store = PrefixStore()
        for batch in ([0], [1, 2], [0, 1, 2, 3]):
            given = batched([prompts[index] for index in batch])
            shared = answered(model, given, encoded=[image] * len(batch), prefixes=store)
            assert torch.equal(shared[0], tokens[batch])
            torch.testing.assert_close(shared[1], logits[batch], **TOLERANCE)
            for ours, index in zip(hf.last_stats(model), batch, strict=True):
                theirs = stats[index]
                assert ours.prompt_tokens_per_layer == theirs.prompt_tokens_per_layer
                assert [each.keep_idx.tolist() for each in ours.images] == [
                    each.keep_idx.tolist() for each in theirs.images
                ]
        assert (len(store), store.hits) == (1, 6)
