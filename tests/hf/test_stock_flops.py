"""FLOPs of stock models under a method, against PyTorch's counter."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

from llava_todre import hf
from llava_todre.hf.capture import decoder_of
from llava_todre.hf.stock import StockModel
from llava_todre.work import HasDecoder, prefill_work

FIRST = {"max_new_tokens": 1, "do_sample": False}
INSIDE = {"retain_ratio": 0.25, "prune_depths": (0.5, 0.75)}


class Asked:
    """As much of a stock model as counting needs."""

    def __init__(self, model: Any) -> None:
        self.model, self.decoder = model, decoder_of(model)

    decoder_shape = StockModel.decoder_shape


def check(model: Any) -> None:
    """Compare one prompt: what is there besides the decoder is counted without a method."""
    inputs = tiny.inputs_for(model, tiny.ONE)
    asked: HasDecoder = Asked(model)  # type: ignore[assignment]

    def counted(method: str, **options: Any) -> tuple[int, int]:
        with hf.prune(model, method, **options), FlopCounterMode(display=False) as counter:
            model.generate(**inputs, **FIRST)
            work = prefill_work(asked, hf.last_stats(model)[0])
        assert work is not None
        return counter.get_total_flops() - work.flops, work.flops

    tower, unpruned = counted("vanilla")
    left_over, pruned = counted("pyramiddrop", **INSIDE)
    assert 0 < left_over and pruned < 0.9 * unpruned
    assert left_over == pytest.approx(tower, abs=2e-3 * pruned)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_families_equal_the_torch_counter(family: str) -> None:
    check(tiny.build(family, tiny.USUAL_DECODER.get(family), "eager"))


@pytest.mark.parametrize(
    ("decoder", "text"),
    [
        ("Qwen3", {"head_dim": 32}),
        ("Mistral", {"head_dim": 8, "sliding_window": None}),
        ("Mixtral", {"num_local_experts": 4, "sliding_window": None}),
        ("Qwen2Moe", {"num_experts": 4, "moe_intermediate_size": 40}),
        ("Qwen3Moe", {"num_experts": 4, "moe_intermediate_size": 40, "head_dim": 32}),
    ],
)
def test_decoders_equal_the_torch_counter(
    decoder: str, text: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tiny.DECODERS, "this", f"{decoder}Config")
    model = tiny.build("llava", "this", "eager", num_experts_per_tok=2, **text)
    if "Moe" in decoder or decoder == "Mixtral":
        model.set_experts_implementation("eager")
    check(model)


@torch.no_grad()
def test_a_decoder_that_is_not_known_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiny.DECODERS, "this", "Gemma2Config")
    model = tiny.build("llava", "this", "eager", head_dim=16)
    with hf.prune(model, "uniform", retain_ratio=0.25):
        model.generate(**tiny.inputs_for(model, tiny.ONE), **FIRST)
        stats = hf.last_stats(model)[0]
    assert prefill_work(Asked(model), stats) is None  # type: ignore[arg-type]
