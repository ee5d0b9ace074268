"""Methods inside the decoder, in a real model: what they are shown, and what their decisions do.

The oracle is a float64 decoder without cache, padding or batch (reference.LlamaReference), in which
a dropped token is hidden from the later layers and a merged one is put in place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from torch import Tensor

from llava_todre.model.llava import LlavaLlamaForCausalLM
from llava_todre.pruners import Keep, LayerView, Pruner, create_pruner
from llava_todre.spans import TokenType

STEPS = 5
METHODS = {
    "fastv": {"retain_ratio": 0.25},
    "fastv, last layers": {"layer": 6, "retain_ratio": 0.1},
    "sparsevlm": {"retain_ratio": 0.25},
    "sparsevlm_plus": {"retain_ratio": 0.25},
    "dart": {"retain_ratio": 0.25},
    "pyramiddrop": {"retain_ratio": 0.125},
    "vtw": {},
    "divprune+pyramiddrop": {"retain_ratio": 0.5, "inside.retain_ratio": 0.3},
    "todre": {"retain_ratio": 0.25, "tau": 1.0, "probe_depths": (0.5,)},
    "fastervlm+todre": {"tau": 1.0, "probe_depths": (0.25,)},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spy(Pruner):
    """Hands every view and decision of a method over to the test."""

    method: Pruner
    seen: list[tuple[LayerView, Any, dict[str, Tensor]]] = dataclasses.field(hash=False)

    def __getattribute__(self, name: str) -> Any:
        if name in ("needs", "num_keep", "will_select", "select", "probe_layers"):
            return getattr(self.method, name)
        return super().__getattribute__(name)

    def at_layer(self, view: LayerView) -> Keep | Tensor | None:
        rows = torch.tensor([0, len(view.kinds) // 2, len(view.kinds) - 1])
        shown = {
            "hidden_states": view.hidden_states().clone(),
            "prompt_embeds": view.prompt.embeds().clone(),
            "final_norm": view.decoder.final_norm(view.hidden_states()),
            "attention": view.attention(rows),
            "next_layer_attention": view.decoder.next_layer_attention(rows),
        }
        decision = self.method.at_layer(view)
        self.seen.append((view, decision, shown))
        return decision


def prompts() -> dict[str, Any]:
    """Return a padded batch: an AnyRes image with newlines, two images, a video."""
    draw = torch.Generator().manual_seed(3)
    ids = [[1, 5, 9, -200, 7, 8, 11, 12, 60], [1, -200, 13, 14, -200, 6, 21], [1, 4, -200, 9, 8]]
    length = max(map(len, ids))
    padded = torch.tensor([[0] * (length - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in ids])
    return {
        "inputs": padded,
        "attention_mask": mask,
        "images": [torch.randn(views, 3, 56, 56, generator=draw) for views in (5, 5, 3, 3)],
        "image_sizes": [(112, 90), (80, 112), (112, 40), (56, 56)],
        "modalities": ["image", "image", "image", "video"],
    }


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_views_and_decisions_agree_with_the_slow_decoder(
    tiny_llava: Callable[..., LlavaLlamaForCausalLM], attention: str, name: str
) -> None:
    model = tiny_llava(attention)
    seen: list[tuple[LayerView, Any, dict[str, Tensor]]] = []
    method = create_pruner(name.split(",")[0], **METHODS[name])
    model.set_pruner(Spy(method=method, seen=seen))
    batch = prompts()
    output = model.generate(
        **batch, max_new_tokens=STEPS, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    logits = torch.stack(output.logits, dim=1)
    stats = model.last_stats
    model.set_pruner(method)
    _, _, mask, _, embeds, _ = model.prepare_inputs_labels_for_multimodal(
        batch.pop("inputs"), None, batch.pop("attention_mask"), None, None, **batch,
        padding_side="left",
    )  # fmt: skip
    state = model.last_state
    assert state is not None
    decoder = reference.LlamaReference(model)
    assert seen
    for row in range(3):
        real = mask[row].bool()
        kinds = state.segments[0].kinds[row, real]
        line = state.row_id[row, real]
        present = torch.ones(8, len(kinds), dtype=torch.bool)
        replaced = {}
        for view, decision, _ in seen[row::3]:
            if decision is None:
                continue
            kept = Keep.checked(decision, name, len(view.kinds))
            if kept.features is not None:
                replaced[view.layer] = view.prompt.positions[kept.indices], kept.features
            gone = view.kinds == TokenType.VISUAL
            gone[kept.indices] = False
            present[view.layer + 1 :, view.prompt.positions[gone]] = False
            for newline in (kinds == TokenType.NEWLINE).nonzero()[:, 0].tolist():
                of_row = (line == line[newline]) & (kinds == TokenType.VISUAL)
                present[view.layer + 1 :, newline] = bool(present[view.layer + 1][of_row].any())
        tokens, expected = decoder.greedy(embeds[row, real], STEPS, present, replaced)
        assert output.sequences[row].tolist() == tokens
        torch.testing.assert_close(logits[row].double(), expected, rtol=0, atol=5e-5)
        assert stats[row].prompt_tokens_per_layer == tuple(present.sum(1).tolist())
        assert not present[-1].all(), "something was dropped"
        run = decoder.run(embeds[row, real], present, replaced)
        for view, _, shown in seen[row::3]:
            check_view(view, shown, run, decoder, present, kinds, embeds[row, real])
        assert seen[row][0].visual_counts == tuple(
            len(image.keep_idx) for image in stats[row].images
        )


def check_view(
    view: LayerView,
    shown: dict[str, Tensor],
    run: reference.Run,
    decoder: reference.LlamaReference,
    present: Tensor,
    kinds: Tensor,
    embeds: Tensor,
) -> None:
    """Compare everything a method can ask with the slow decoder."""
    where = present[view.layer].nonzero()[:, 0]
    rows = torch.tensor([0, len(where) // 2, len(where) - 1])
    hidden = run.hidden[view.layer]
    ahead = decoder.attention_of_next(hidden, view.layer + 1, present[view.layer])
    expected = {
        "hidden_states": hidden[where],
        "prompt_embeds": embeds,
        "final_norm": decoder._norm(hidden, "model.norm")[where],
        "attention": run.attention[view.layer][:, where[rows]][:, :, where],
        "next_layer_attention": ahead[:, where[rows]][:, :, where],
    }
    assert torch.equal(view.prompt.positions, where)
    assert torch.equal(view.kinds, kinds[where])
    assert torch.equal(view.prompt.kinds, kinds)
    for key, value in expected.items():
        torch.testing.assert_close(shown[key].double(), value.double(), rtol=0, atol=3e-5, msg=key)


@pytest.mark.parametrize("name", ["fastv", "sparsevlm", "pyramiddrop", "vtw"])
@torch.no_grad()
def test_without_a_cache_the_same_tokens_leave(
    tiny_llava: Callable[..., LlavaLlamaForCausalLM], name: str
) -> None:
    model = tiny_llava()
    model.set_pruner(name, **METHODS[name])
    batch = prompts()
    batch["input_ids"] = batch.pop("inputs")
    cached = model(**batch, use_cache=True)
    stats = model.last_stats
    plain = model(**batch, use_cache=False)
    torch.testing.assert_close(plain.logits, cached.logits, rtol=0, atol=1e-5)
    assert [s.as_dict() for s in model.last_stats] == [s.as_dict() for s in stats]


@torch.no_grad()
def test_beams_share_the_decisions_of_their_sample(
    tiny_llava: Callable[..., LlavaLlamaForCausalLM],
) -> None:
    model = tiny_llava()
    batch = prompts()
    options = {"do_sample": False, "max_new_tokens": 4}
    model.set_pruner("sparsevlm", retain_ratio=0.25)
    model.generate(**batch, **options)
    expected = [s.visual_tokens_per_layer for s in model.last_stats]
    model.generate(**batch, **options, num_beams=3)
    assert [s.visual_tokens_per_layer for s in model.last_stats] == expected


@torch.no_grad()
def test_prompt_embeddings_are_let_go(tiny_llava: Callable[..., LlavaLlamaForCausalLM]) -> None:
    model = tiny_llava()
    model.set_pruner("random")
    model.set_pruner("sparsevlm", retain_ratio=0.25)
    model.generate(**prompts(), do_sample=False, max_new_tokens=2)
    state = model.last_state
    assert state is not None
    assert state.prompt_embeds is None
    assert not any(segment.merged_hidden for segment in state.segments)


@pytest.mark.parametrize("name", ["fastv", "sparsevlm", "dart", "pyramiddrop", "vtw", "todre"])
@torch.no_grad()
def test_a_prompt_that_ends_with_an_image_keeps_its_last_token_and_all_others(
    tiny_llava: Callable[..., LlavaLlamaForCausalLM], name: str
) -> None:
    model = tiny_llava()
    options = {"tau": 1.0, "probe_depths": (0.5,), "retain_ratio": 1.0} if name == "todre" else {}
    batch = {
        "input_ids": torch.tensor([[1, 5, -200], [1, -200, 7]]),
        "images": torch.randn(2, 3, 3, 56, 56, generator=torch.Generator().manual_seed(0)),
        "image_sizes": [(112, 40), (112, 40)],
    }
    expected = model(**batch).logits
    model.set_pruner(name, **options)
    logits = model(**batch).logits
    image_last, text_last = model.last_stats
    assert len(set(image_last.prompt_tokens_per_layer)) == 1
    assert len(set(text_last.prompt_tokens_per_layer)) > 1
    torch.testing.assert_close(logits[0, -1], expected[0, -1], rtol=0, atol=1e-5)
