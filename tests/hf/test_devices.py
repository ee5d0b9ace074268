"""A model that accelerate spreads over several devices, or keeps on disk, prunes as a whole one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from checks import Strides
from pretend import place, pretended_devices
from torch import Tensor, nn

from llava_todre import hf
from llava_todre.stats import PruneStats

accelerate = pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings(
    "ignore:The following device_map keys", "ignore:You are calling .generate"
)

PLAN = Strides(retain_ratio=0.25, plan=((9, 3, 0), (8, 5, 2), (6, 4, 2)))
METHODS = {
    **{"plan": (PLAN, {}), "todre": ("todre", {"retain_ratio": 0.25, "tau": 0.6})},
    **{
        name: (name, {"retain_ratio": 0.25}) for name in ("fastv", "visionzip", "dart", "sparsevlm")
    },
    "pyramiddrop": ("pyramiddrop", {"prune_depths": (3 / 8, 5 / 8)}),
}


def model_and_inputs(family: str) -> tuple[Any, dict[str, Tensor]]:
    model = tiny.build(family, tiny.USUAL_DECODER.get(family))
    return model, tiny.inputs_for(model, tiny.BATCH)


def answer(model: Any, inputs: dict[str, Tensor], method: str) -> tuple[Tensor, Any]:
    pruner, knobs = METHODS[method]
    with hf.prune(model, pruner, **knobs):
        found = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        return found.cpu(), kept(hf.last_stats(model))


def kept(stats: tuple[PruneStats, ...]) -> Any:
    return [
        ([image.keep_idx.tolist() for image in each.images], each.visual_tokens_per_layer)
        for each in stats
    ]


def blocks(module: nn.Module, prefix: str = "") -> Iterator[str]:
    """Return the names of what may be on a device of its own: layers and what is around them."""
    for name, child in module.named_children():
        has_layers = any(isinstance(part, nn.ModuleList) for part in child.modules())
        if has_layers and type(child).__name__ != "Qwen3VLVisionModel":  # is not made to be split
            yield from blocks(child, f"{prefix}{name}.")
        else:
            yield prefix + name
    yield from (prefix + name for name, _ in module.named_parameters(recurse=False))


def device_map(model: Any, *devices: str) -> dict[str, str]:
    """Deal layers out to devices in turn; what is around them stays together."""
    placed, groups = {}, dict[str, int]()
    for name in blocks(model):
        parent, _, last = name.rpartition(".")
        turn = int(last) if last.isdigit() else groups.setdefault(parent, len(groups))
        placed[name] = devices[turn % len(devices)]
    return placed


def spread(model: Any, *devices: str) -> None:
    """Put a model on devices that are names only."""
    placed = device_map(model, *devices)
    keys = model._skip_keys_device_placement
    accelerate.dispatch_model(model, placed, skip_keys=keys, force_hooks=True)
    for name, device in placed.items():
        parent, _, last = name.rpartition(".")
        part = getattr(model.get_submodule(parent), last)
        if isinstance(part, nn.Module):
            place(part, device)
        else:
            part._pretended = torch.device(device)


CASES = [
    *((family, "todre") for family in tiny.FAMILIES),
    *(("llava_next", method) for method in METHODS if method != "todre"),
    *(("qwen3_vl", method) for method in ("plan", "pyramiddrop")),
]


@pytest.mark.parametrize(("family", "method"), CASES)
def test_layers_on_two_devices_in_turn(family, method):
    model, inputs = model_and_inputs(family)
    expected = answer(model, inputs, method)
    # Not where the decoder starts; and where the tower is, which Qwen3-VL itself wants.
    at = "cuda:0" if family in tiny.QWEN else "cuda:1"
    with pretended_devices():
        spread(model, "cuda:0", "cuda:1")
        there = {key: value.to(at) for key, value in inputs.items()}
        found = answer(model, there, method)
    assert found[1] == expected[1]
    assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize(("family", "method"), CASES)
def test_weights_that_are_on_disk_until_they_are_used(family, method, tmp_path):
    model, inputs = model_and_inputs(family)
    expected = answer(model, inputs, method)
    placed = device_map(model, "disk")
    accelerate.dispatch_model(model, placed, main_device="cpu", offload_dir=tmp_path)
    assert all(weight.is_meta for weight in model.model.language_model.parameters())
    found = answer(model, inputs, method)
    assert found[1] == expected[1]
    assert torch.equal(found[0], expected[0])


def test_the_check_itself_refuses_tensors_of_two_devices():
    with pretended_devices():
        here, there = torch.ones(3, device="cuda:0"), torch.ones(3).to("cuda:1")
        assert here.device == torch.device("cuda:0")
        assert (here + here.cpu().to(here)).device == here.device
        assert there[torch.tensor([0, 2])].device == there.device
        assert (there * torch.tensor(2.0)).device == there.device
        for mixed in (lambda: here + there, lambda: torch.cat([here, there.cpu()])):
            with pytest.raises(RuntimeError, match="of tensors on"):
                mixed()


gpus = torch.cuda.device_count()


@pytest.mark.gpu
@pytest.mark.skipif(gpus < 1, reason="needs a GPU")
@pytest.mark.parametrize("other", ["cpu", "cuda:1"])
@pytest.mark.parametrize(
    ("family", "method"), [("llava_next", "todre"), ("llava_next", "dart"), ("qwen2_5_vl", "todre")]
)
def test_a_gpu_and_another_device(family, method, other):
    if other == "cuda:1" and gpus < 2:
        pytest.skip("needs two GPUs")
    model, inputs = model_and_inputs(family)
    there = {key: value.to("cuda:0") for key, value in inputs.items()}
    expected = answer(model.to("cuda:0"), there, method)
    placed = device_map(model, "cuda:0", other)
    keys = model._skip_keys_device_placement
    accelerate.dispatch_model(model.cpu(), placed, main_device="cuda:0", skip_keys=keys)
    assert answer(model, there, method)[1] == expected[1]
