"""A model split over two processes says what a whole one says: CPU, gloo."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from llava_todre.errors import TodreError
from llava_todre.model.load import load_pretrained_model
from llava_todre.model.placement import check_split
from tests.model.two_processes import METHODS, observe

ROOT = Path(__file__).parents[2]
MINI = ROOT / "checkpoints" / "mini"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with two key-value heads instead of four: the first and the last."""
    folder = tmp_path_factory.mktemp("grouped") / "mini"
    shutil.copytree(MINI, folder)
    config = json.loads((folder / "config.json").read_text())
    width = config["hidden_size"] // config["num_attention_heads"]
    (folder / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 2}))
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if "vision" not in name and ("k_proj" in name or "v_proj" in name):
            tensors[name] = torch.cat([tensor[:width], tensor[-width:]])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def one_of_two(rank: int, port: int, checkpoint: Path) -> None:
    """Be a process that torchrun has started."""
    torchrun = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    torchrun |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": ""}
    os.environ |= {name: str(value) for name, value in torchrun.items()}
    torch.set_num_threads(1)
    observed = observe(str(checkpoint), tp_plan="auto")
    torch.save(observed, checkpoint.parent / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def split(checkpoint: Path) -> list[dict[str, Any]]:
    """What each of two new processes saw; a fork of one that has computed may fail."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    start = multiprocessing.get_context("spawn").Process
    processes = [start(target=one_of_two, args=(rank, port, checkpoint)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
        process.kill()
        assert process.exitcode == 0
    return [torch.load(checkpoint.parent / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def whole(checkpoint: Path) -> dict[str, Any]:
    return observe(str(checkpoint))


def compare(first: Tensor, second: Tensor, expected: Tensor) -> None:
    """Two processes see the very same, and but for rounding the same as one."""
    assert torch.equal(first, second)
    size = float(expected.abs().max()) if expected.numel() else 1.0
    torch.testing.assert_close(first, expected, atol=1e-5 * size, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_a_split_model_decides_and_answers_as_a_whole_one(
    method: str, split: list[dict[str, Any]], whole: dict[str, Any]
) -> None:
    expected = whole["seen"][method]
    first, second = (rank["seen"][method] for rank in split)
    for key in ("logits", "ratios"):
        compare(first[key], second[key], expected[key])
    for key in ("tokens", "texts"):
        assert first[key] == second[key] == expected[key]
    if method == "todre":
        layers = expected["tokens"][0]
        assert layers[-1] < layers[0] and len(expected["ratios"]), "Stage 2 withdrew something"


@pytest.mark.parametrize("what", ["queries", "keys", "attention ahead"])
def test_a_method_is_shown_all_heads_in_their_order(
    what: str, split: list[dict[str, Any]], whole: dict[str, Any]
) -> None:
    first, second = (rank["shown"][what] for rank in split)
    assert len(first) == {"queries": 4, "keys": 2}.get(what, len(first))
    compare(first, second, whole["shown"][what])


def test_sampled_answers_are_drawn_alike(
    split: list[dict[str, Any]], whole: dict[str, Any]
) -> None:
    assert split[0]["drawn"] == split[1]["drawn"] == whole["drawn"]


def test_each_process_holds_half_of_the_decoder_and_the_rest_whole(
    split: list[dict[str, Any]], whole: dict[str, Any]
) -> None:
    replicated = ["norm", "vision_tower", "mm_projector", "image_newline"]
    if transformers.__version__.startswith("5.17."):
        replicated.append("embed_tokens")
    for rank in split:
        for name, count in whole["sizes"].items():
            parts = 1 if any(part in name for part in replicated) else 2
            assert rank["sizes"][name] * parts == count, name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tp_plan": "auto"}, "this is the only one; start them with torchrun"),
        ({"tp_plan": "outo"}, "tp_plan 'outo' is unknown. Did you mean 'auto'"),
        ({"tp_plan": "auto", "device": "cpu"}, "device 'cpu' and tp_plan 'auto' were both given"),
        ({"tp_plan": "auto", "device_map": "auto"}, "device_map 'auto' and tp_plan 'auto'"),
    ],
)
def test_a_plan_that_cannot_be_is_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TodreError, match=message) as caught:
        load_pretrained_model(MINI, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("odd", ["num_attention_heads", "num_key_value_heads", "intermediate_size"])
def test_what_is_split_must_divide(odd: str) -> None:
    sizes = {"num_attention_heads": 40, "num_key_value_heads": 40, "intermediate_size": 13824}
    check_split(SimpleNamespace(**sizes), 4)
    with pytest.raises(TodreError, match=f"tp_plan must .* divides {odd} 6, got 4"):
        check_split(SimpleNamespace(**(sizes | {odd: 6})), 4)
