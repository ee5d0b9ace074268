"""What every method promises in a real model: methods x contents x batches x types x budgets."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llava_todre.model.llava import LlavaLlamaForCausalLM
from llava_todre.pruners import PRUNERS, Pruner, create_pruner
from llava_todre.spans import TokenType
from llava_todre.stats import PruneStats

TinyLlava = Callable[..., LlavaLlamaForCausalLM]

CONTENTS = ("image", "anyres", "several", "video")
BUDGETS: dict[str, dict[str, Any]] = {
    "25 %": {"retain_ratio": 0.25},
    "10 %": {"retain_ratio": 0.10},
    "1 token": {"retain_tokens": 1},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COUNTLESS = {"vtw"}
"""Methods that know layers but no number of tokens."""
METHODS = [name for name in PRUNERS if name != "vanilla"]


def content(name: str) -> dict[str, Any]:
    """Return ids, pixels, sizes and modalities of one prompt."""
    draw = torch.Generator().manual_seed(CONTENTS.index(name))

    def pixels(views: int) -> Tensor:
        return torch.randn(views, 3, 56, 56, generator=draw)

    if name == "image":
        ids, images, sizes = [1, 5, -200, 7, 8, 9], [pixels(1)], [(50, 60)]
    elif name == "anyres":
        ids, images, sizes = [1, 5, 6, -200, 30, 31], [pixels(5)], [(112, 90)]
    elif name == "several":
        ids = [1, -200, 13, 14, -200, 6, 21, 22]
        images, sizes = [pixels(5), pixels(3)], [(80, 112), (112, 40)]
    else:
        ids, images, sizes = [1, 4, -200, 9, 8, 40], [pixels(4)], [(56, 56)]
    kind = "video" if name == "video" else "image"
    return {"ids": ids, "images": images, "sizes": sizes, "modalities": [kind] * len(images)}


def batch_of(*names: str) -> dict[str, Any]:
    """Return a left-padded batch of prompts, as ``generate`` takes it."""
    contents = [content(name) for name in names]
    length = max(len(one["ids"]) for one in contents)
    return {
        "inputs": torch.tensor([[0] * (length - len(c["ids"])) + c["ids"] for c in contents]),
        "attention_mask": torch.tensor(
            [[0] * (length - len(c["ids"])) + [1] * len(c["ids"]) for c in contents]
        ),
        "images": [image for one in contents for image in one["images"]],
        "image_sizes": [size for one in contents for size in one["sizes"]],
        "modalities": [kind for one in contents for kind in one["modalities"]],
    }


@dataclasses.dataclass
class Outcome:
    """What a model said about one prompt, and what it did with the tokens."""

    tokens: list[int]
    stats: PruneStats
    last_patches: int
    """Patch tokens in the last decoder layer."""


def outcomes(model: LlavaLlamaForCausalLM, *names: str) -> list[Outcome]:
    generated = model.generate(**batch_of(*names), do_sample=False, max_new_tokens=3)
    assert model.last_state is not None
    last = model.last_state.segments[-1].kinds
    return [
        Outcome(tokens, stats, int((kinds == TokenType.VISUAL).sum()))
        for tokens, stats, kinds in zip(generated.tolist(), model.last_stats, last, strict=True)
    ]


def same(one: Outcome, other: Outcome) -> bool:
    kept, others = (
        [(image.num_tokens, image.keep_idx.tolist()) for image in outcome.stats.images]
        for outcome in (one, other)
    )
    layers, others_layers = (outcome.stats.visual_tokens_per_layer for outcome in (one, other))
    return one.tokens == other.tokens and kept == others and layers == others_layers


def check_counts(pruner: Pruner, outcome: Outcome) -> None:
    """Hold the kept tokens to the promise of ``about.count``."""
    wanted = [pruner.num_keep(image.num_tokens) for image in outcome.stats.images]
    kept = [len(image.keep_idx) for image in outcome.stats.images]
    for image in outcome.stats.images:
        assert (image.keep_idx.diff() > 0).all(), "ascending and unique"
        assert 0 <= int(image.keep_idx[0]) and int(image.keep_idx[-1]) < image.num_tokens
    if not pruner.selects:
        assert kept == [image.num_tokens for image in outcome.stats.images]
        kept, wanted = [outcome.last_patches], [sum(wanted)]
    if pruner.about.count == "exact":
        assert kept == wanted
    elif pruner.about.count == "at most":
        assert all(1 <= k <= w for k, w in zip(kept, wanted, strict=True))
    layers = outcome.stats.visual_tokens_per_layer
    assert all(after <= before for before, after in zip(layers, layers[1:], strict=False))


def budgets_of(name: str) -> dict[str, dict[str, Any]]:
    return {
        key: knobs
        for key, knobs in BUDGETS.items()
        if not (name in COUNTLESS and "retain_tokens" in knobs)
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", METHODS)
def test_counts_order_determinism_and_batches(tiny_llava: TinyLlava, name: str, dtype: str) -> None:
    model = tiny_llava().to(DTYPES[dtype])
    for knobs in budgets_of(name).values():
        pruner = model.set_pruner(name, **knobs)
        singles = {one: outcomes(model, one)[0] for one in CONTENTS}
        for one, outcome in singles.items():
            check_counts(pruner, outcome)
            assert same(outcome, outcomes(model, one)[0]), "the same twice"
        mixed = ("anyres", "several", "video")
        for one, outcome in zip(mixed, outcomes(model, *mixed), strict=True):
            check_counts(pruner, outcome)
            if dtype == "fp32":  # half precision rounds differently in batches of another shape
                assert same(outcome, singles[one]), f"{one} in a batch as alone"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_keeping_everything_is_no_pruning_bit_for_bit(
    tiny_llava: TinyLlava, name: str, dtype: str
) -> None:
    model = tiny_llava().to(DTYPES[dtype])
    off = {"probe_depths": ()} if "probe_depths" in vars(create_pruner(name)) else {}
    batch = batch_of(*CONTENTS)
    batch["input_ids"] = batch.pop("inputs")
    expected = model(**batch).logits
    knobs: list[dict[str, Any]] = [{"retain_ratio": 1.0}]
    if name not in COUNTLESS:
        knobs.append({"retain_tokens": 10_000})
    for all_of_them in knobs:
        model.set_pruner(name, **all_of_them, **off)
        assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_left_behind(
    tiny_llava: TinyLlava, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llava()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batch = batch_of("anyres", "video")
    plain = model.generate(**batch, do_sample=False, max_new_tokens=3)
    modules = [type(module) for module in model.modules()]
    random_state = torch.get_rng_state()

    pruner = model.set_pruner(name, retain_ratio=0.25)
    frozen = pickle.dumps(pruner)
    cleared = {key: value for key, value in batch.items() if key != "inputs"}
    with torch.enable_grad(), monkeypatch.context() as patch:
        records: list[bool] = []  # a caller without no_grad must not pay for a graph here
        at_once = type(pruner).select_all is not Pruner.select_all
        select = type(pruner).select_all if at_once else type(pruner).select

        def spy(method: Pruner, given: Any, budget: Any) -> Any:
            records.extend([torch.is_grad_enabled()] * (len(given) if at_once else 1))
            return select(method, given, budget)

        if pruner.selects:
            patch.setattr(type(pruner), select.__name__, spy)
        model(input_ids=batch["inputs"], **cleared)
        assert not any(records) and len(records) == 2 * pruner.selects
    assert pickle.dumps(pruner) == frozen
    assert torch.equal(torch.get_rng_state(), random_state), "the global generator is not used"
    assert [type(module) for module in model.modules()] == modules
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

    model.set_pruner("vanilla")
    assert torch.equal(model.generate(**batch, do_sample=False, max_new_tokens=3), plain)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", [name for name in METHODS if "seed" in vars(create_pruner(name))])
def test_another_seed_is_another_draw(tiny_llava: TinyLlava, name: str) -> None:
    model = tiny_llava()
    pivot = {"pivot": "random"} if "pivot" in vars(create_pruner(name)) else {}

    def kept(seed: int) -> list[int]:
        model.set_pruner(name, retain_ratio=0.25, seed=seed, **pivot)
        return outcomes(model, "anyres")[0].stats.images[0].keep_idx.tolist()

    assert kept(1) == kept(1)
    assert len({tuple(kept(seed)) for seed in range(4)}) > 1


@pytest.mark.parametrize("name", METHODS)
def test_encoding_once_serves_several_questions(tiny_llava: TinyLlava, name: str) -> None:
    model = tiny_llava()
    model.set_pruner(name, retain_ratio=0.25)
    batch = batch_of("anyres")
    encoded = model.encode_images(batch["images"], batch["image_sizes"], batch["modalities"])
    options = {"do_sample": False, "max_new_tokens": 3}
    for question in ([1, 5, 6, -200, 30, 31], [1, -200, 44, 45, 46]):
        ids = torch.tensor([question])
        fresh = model.generate(ids, images=batch["images"], image_sizes=[(112, 90)], **options)
        assert torch.equal(model.generate(ids, images=encoded, **options), fresh)
