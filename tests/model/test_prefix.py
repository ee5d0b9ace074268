"""Questions about the same images share the first part of the KV cache, and nobody can tell."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llava_todre.errors import TodreError
from llava_todre.model.llava import LlavaLlamaForCausalLM
from llava_todre.pruners import LayerView, Pruner, create_pruner
from llava_todre.pruners.todre import Todre
from llava_todre.stage1.select import ImageFeatures
from llava_todre.stage2.prefix import PrefixStore

QUESTIONS = [[7, 8, 11, 12, 60], [13, 14], [9], [21, 22, 23, 24, 25, 26, 27]]
SHARING = {
    "vanilla": {},
    "fastervlm": {"retain_ratio": 0.25},
    "todre": {"retain_ratio": 0.25, "tau": 0.0},
    "todre, withdrawing": {"retain_ratio": 0.25, "tau": 1.0, "probe_depths": (0.5,)},
    "todre_v1, one by one": {"retain_ratio": 1.0, "tau": 0.9, "probe_depths": (0.25, 0.5, 0.75)},
    "vtw": {},
    "divprune+vtw": {"retain_ratio": 0.25},
}
NOT_SHARING = {
    "fastv": {"retain_ratio": 0.25},
    "cdpruner": {"retain_ratio": 0.25},
    "todre": {"text_set": "all"},
    "divprune+pyramiddrop": {"retain_ratio": 0.5, "inside.retain_ratio": 0.3},
}
Model = Callable[..., LlavaLlamaForCausalLM]


def encoded(model: LlavaLlamaForCausalLM) -> list[ImageFeatures]:
    draw = torch.Generator().manual_seed(5)
    pixels = [torch.randn(views, 3, 56, 56, generator=draw) for views in (5, 3)]
    return model.encode_images(pixels, [(112, 90), (112, 40)])


def batch(rows: list[list[int]], visuals: list[ImageFeatures]) -> dict[str, Any]:
    length = max(map(len, rows))
    padded = [[0] * (length - len(row)) + row for row in rows]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    return {
        "inputs": torch.tensor(padded),
        "attention_mask": torch.tensor(mask),
        "images": visuals,
    }


def logits(model: LlavaLlamaForCausalLM, given: dict[str, Any], **settings: Any) -> Tensor:
    """Return (B, steps, vocabulary) of a greedy answer."""
    output = model.generate(
        **given, max_new_tokens=6, min_new_tokens=6, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **settings,
    )  # fmt: skip
    return torch.stack(output.logits, dim=1)


def one_by_one(model: LlavaLlamaForCausalLM, rows: list[list[int]], visuals: list[Any]) -> Tensor:
    singles = [batch([row], [visual]) for row, visual in zip(rows, visuals, strict=True)]
    return torch.cat([logits(model, single) for single in singles])


@pytest.mark.parametrize("name", SHARING)
@torch.no_grad()
def test_a_question_behind_a_stored_prefix_is_answered_as_if_it_were_the_first(
    tiny_llava: Model, attention: str, name: str
) -> None:
    model = tiny_llava(attention)
    model.set_pruner(name.split(",")[0], **SHARING[name])
    first, second = encoded(model)
    rows = [[1, 5, 9, -200, *question] for question in QUESTIONS]
    visuals = [first, first, second, first]
    fresh = one_by_one(model, rows, visuals)
    expected = []
    for row, visual in zip(rows, visuals, strict=True):
        logits(model, batch([row], [visual]))
        expected.append(model.last_stats[0])

    store = PrefixStore(max_prefixes=2)
    for repeat in range(2):
        shared = logits(model, batch(rows, visuals), prefixes=store)
        torch.testing.assert_close(shared, fresh, rtol=0, atol=2e-5)
        for ours, theirs in zip(model.last_stats, expected, strict=True):
            assert ours.prompt_tokens_per_layer == theirs.prompt_tokens_per_layer
            assert ours.visual_tokens_per_layer == theirs.visual_tokens_per_layer
            assert [probe.layer for probe in ours.probes] == [p.layer for p in theirs.probes]
            for probe, other in zip(ours.probes, theirs.probes, strict=True):
                assert probe.dropped == other.dropped
                assert probe.text_to_visual == pytest.approx(other.text_to_visual, abs=1e-5)
                assert probe.visual_to_text == other.visual_to_text
        assert store.hits == 2 + 4 * repeat
    if "one by one" in name:
        assert len({stats.withdrawn_from for stats in expected}) > 2, "an easier case than it says"


@pytest.mark.parametrize("name", NOT_SHARING)
@torch.no_grad()
def test_methods_for_which_the_question_matters_read_every_prompt_afresh(
    tiny_llava: Model, name: str
) -> None:
    model = tiny_llava("sdpa")
    model.set_pruner(name, **NOT_SHARING[name])
    first, _ = encoded(model)
    rows = [[1, 5, 9, -200, *question] for question in QUESTIONS]
    store = PrefixStore()
    shared = logits(model, batch(rows, [first] * 4), prefixes=store)
    assert torch.equal(shared, logits(model, batch(rows, [first] * 4)))
    assert len(store) == store.hits == 0


@pytest.mark.parametrize("method", ["divprune", "todre"])
@torch.no_grad()
def test_text_between_images_is_shared_unless_it_could_lose_sight_of_them(
    tiny_llava: Model, method: str
) -> None:
    model = tiny_llava("sdpa")
    model.set_pruner(method, retain_ratio=0.25)
    visuals = encoded(model)
    rows = [[1, 5, -200, 30, 31, -200, *question] for question in QUESTIONS[:2]]
    store = PrefixStore()
    shared = logits(model, batch(rows, visuals * 2), prefixes=store)
    torch.testing.assert_close(shared, logits(model, batch(rows, visuals * 2)), rtol=0, atol=2e-5)
    assert store.hits == (1 if method == "divprune" else 0)


@torch.no_grad()
def test_prefixes_are_told_apart_by_text_image_and_method(tiny_llava: Model) -> None:
    model = tiny_llava("sdpa")
    model.set_pruner("divprune", retain_ratio=0.25)
    visuals = encoded(model)
    store = PrefixStore(max_prefixes=8)

    def check(row: list[int], visual: ImageFeatures, hits: int) -> None:
        given = batch([row], [visual])
        shared = logits(model, given, prefixes=store)
        torch.testing.assert_close(shared, logits(model, given), rtol=0, atol=2e-5)
        assert store.hits == hits

    check([1, 5, -200, 7], visuals[0], 0)
    check([1, 6, -200, 7], visuals[0], 0)
    check([1, 5, -200, 7], visuals[1], 0)
    check([1, 5, -200, 8, 9], visuals[0], 1)
    model.set_pruner("divprune", retain_ratio=0.5)
    check([1, 5, -200, 8, 9], visuals[0], 1)
    model.set_pruner("random", retain_ratio=0.25)
    check([1, 5, -200, 8, 9], visuals[0], 1)


@torch.no_grad()
def test_the_store_forgets_what_was_not_asked_about_for_longest(tiny_llava: Model) -> None:
    model = tiny_llava("sdpa")
    first, second = encoded(model)
    store = PrefixStore(max_prefixes=1)
    for visual, hits in ((first, 0), (first, 1), (second, 1), (first, 1)):
        logits(model, batch([[1, -200, 7]], [visual]), prefixes=store)
        assert (len(store), store.hits) == (1, hits)
    config = model.config
    ((_, layers),) = store._stored
    width = 2 * config.num_hidden_layers * config.hidden_size * 4 // (
        config.num_attention_heads // config.num_key_value_heads
    )  # fmt: skip
    assert store.num_bytes == width * layers[0][0].shape[2]
    with pytest.raises(TodreError, match="max_prefixes must be 1 or more, got 0"):
        PrefixStore(0)


@torch.no_grad()
def test_a_failure_half_way_leaves_the_store_as_it_was(
    tiny_llava: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llava("sdpa")
    visuals = encoded(model)
    store = PrefixStore(max_prefixes=1)
    given = batch([[1, -200, 7], [1, -200, 8]], visuals)
    logits(model, batch([[1, -200, 7]], visuals[:1]), prefixes=store)
    before = list(store._stored)
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(model, given, prefixes=store)
    assert store._stored == before
    monkeypatch.setattr(model.model, "forward", forward)
    torch.testing.assert_close(
        logits(model, given, prefixes=store), logits(model, given), rtol=0, atol=2e-5
    )


@pytest.mark.parametrize(
    "settings",
    [{"num_beams": 2}, {"use_cache": False}, {"num_beams": 2, "num_return_sequences": 2}],
)
@torch.no_grad()
def test_settings_that_rearrange_the_cache_work_without_the_store(
    tiny_llava: Model, settings: dict[str, Any]
) -> None:
    model = tiny_llava("sdpa")
    model.set_pruner("todre", retain_ratio=0.25)
    first, _ = encoded(model)
    given = batch([[1, -200, 7], [1, -200, 8, 9]], [first, first])
    store = PrefixStore()
    shared = model.generate(**given, max_new_tokens=4, prefixes=store, **settings)
    assert torch.equal(shared, model.generate(**given, max_new_tokens=4, **settings))
    assert len(store) == 0


@torch.no_grad()
def test_a_prompt_that_ends_with_its_image_has_nothing_behind_it(tiny_llava: Model) -> None:
    model = tiny_llava("sdpa")
    first, _ = encoded(model)
    given = batch([[1, 4, -200]], [first])
    store = PrefixStore()
    assert torch.equal(logits(model, given, prefixes=store), logits(model, given))
    assert len(store) == 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Liar(Todre):
    """Says that it reads later text only, and reads the image's rows."""

    def at_layer(self, view: LayerView) -> Tensor | None:
        view.hidden_states() if self.tau == 0 else view.attention(torch.tensor([3]))
        return None


@pytest.mark.parametrize("tau", [0.0, 0.5])
@torch.no_grad()
def test_a_method_that_reads_stored_rows_is_told_so(tiny_llava: Model, tau: float) -> None:
    model = tiny_llava("sdpa")
    model.set_pruner(Liar(retain_ratio=0.25, tau=tau))
    first, _ = encoded(model)
    with pytest.raises(TodreError, match="Liar has withdraws_all, but reads rows before the end"):
        logits(model, batch([[1, 4, -200, 7]], [first]), prefixes=PrefixStore())


def test_only_methods_that_withdraw_everything_say_so() -> None:
    def shares(method: Pruner) -> bool:
        return method.prefix_cacheable(32)

    assert shares(create_pruner("todre")) and shares(create_pruner("vtw"))
    assert not shares(create_pruner("fastv")) and not shares(create_pruner("sparsevlm"))
    assert not shares(create_pruner("todre", text_set="all"))
    assert shares(create_pruner("todre", text_set="all", probe_depths=()))
