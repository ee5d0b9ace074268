"""The CUDA kernels of the selection, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from test_selection import random_features
from torch import Tensor

from llava_todre import selection
from llava_todre.errors import TodreError
from llava_todre.selection import greedy_diverse, greedy_diverse_batch

fused = pytest.importorskip("llava_todre.selection_triton", exc_type=ImportError)
ROOT = Path(__file__).parents[1]
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
OBJECTIVES: tuple[Any, ...] = ("max_sum", "max_min")
# The interpreter multiplies the bit patterns of bfloat16 as if they were whole numbers.
HALVES = [torch.float16, torch.bfloat16] if GPU else [torch.float16]


@pytest.fixture(autouse=True)
def always_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_runs_fused", lambda _: True)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collect how many images each launch of the greedy kernel served."""
    found: list[int] = []
    advance = fused._State.advance
    monkeypatch.setattr(
        fused._State,
        "advance",
        lambda self, *given, **more: found.append(len(self.table)) or advance(self, *given, **more),
    )
    return found


def images(*sizes: int) -> list[Tensor]:
    return [random_features(size, seed=size).to(DEVICE) for size in sizes]


@pytest.mark.parametrize("blocks", [False, True], ids=["all at once", "in blocks"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_half_precision_is_multiplied_as_it_is_and_summed_in_float32(
    objective, dtype, blocks, monkeypatch
):
    monkeypatch.setattr(fused, "MAX_COSINES", 0 if blocks else fused.MAX_COSINES)
    features = random_features(300).to(DEVICE, dtype)
    rows, inverse_lengths = selection._rows_and_inverse_lengths(features)
    assert rows is features
    torch.testing.assert_close(inverse_lengths, 1 / features.float().norm(dim=1))
    picked = greedy_diverse(features, 40, 3, objective).tolist()
    assert picked[0] == 3 and len(set(picked)) == 40
    assert max(reference.greedy_gaps(features.cpu(), picked, objective)) == 0.0


@pytest.mark.parametrize("scale", [2.0**60, 2.0**-60, 0.0])
def test_rows_whose_squares_leave_float32_are_scaled_first(scale):
    features = random_features(60).bfloat16()
    features[7] *= scale
    rows, _ = selection._rows_and_inverse_lengths(features)
    assert rows.dtype == torch.float32 and torch.isfinite(rows).all()
    picked = greedy_diverse(features.to(DEVICE), 20, 3, "max_sum").tolist()
    expected = reference.greedy_diverse(features, 20, 3, "max_sum")
    assert picked == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_features_that_are_not_finite_are_an_error(dtype):
    features = random_features(10).to(DEVICE, dtype)
    features[4, 2] = torch.nan
    with pytest.raises(TodreError, match="1 of 10 visual tokens"):
        greedy_diverse(features, 3, 0, "max_sum")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_images_of_several_sizes_share_a_launch_and_change_nothing(objective, launches):
    batch, budgets, firsts = images(130, 17, 1, 64), [30, 17, 1, 5], [9, 16, 0, 63]
    picked = greedy_diverse_batch(batch, budgets, firsts, objective)
    assert launches == [4]
    for features, budget, first, got in zip(batch, budgets, firsts, picked, strict=True):
        assert got.tolist() == greedy_diverse(features, budget, first, objective).tolist()
        gaps = reference.greedy_gaps(features.cpu(), got.tolist(), objective)
        assert max(gaps, default=0.0) == 0.0


def test_launches_are_split_where_the_cosines_of_all_images_would_be_too_many(
    launches, monkeypatch
):
    monkeypatch.setattr(fused, "MAX_COSINES", 2 * 40**2)
    batch = images(40, 40, 40, 60, 40, 40)  # 60 tokens alone have more pairs than that
    picked = greedy_diverse_batch(batch, [9] * 6, [2] * 6, "max_sum")
    assert launches[:2] == [2, 1] and launches[-1] == 2 and set(launches[2:-1]) == {1}
    for features, got in zip(batch, picked, strict=True):
        assert max(reference.greedy_gaps(features.cpu(), got.tolist(), "max_sum")) == 0.0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_long_video_is_done_in_bounded_memory_with_few_looks(objective, launches, monkeypatch):
    limit = 100 * 700
    monkeypatch.setattr(fused, "MAX_COSINES", limit)
    monkeypatch.setattr(fused, "SCORES_AT_A_TIME", 256)
    held = []
    cosines = fused._cosines
    monkeypatch.setattr(
        fused,
        "_cosines",
        lambda *given, **more: (
            held.append(given[2].untyped_storage().nbytes()) or cosines(*given, **more)
        ),
    )
    (features,) = images(700)
    picked = greedy_diverse(features, 180, 3, objective).tolist()
    assert max(reference.greedy_gaps(features.cpu(), picked, objective)) == 0.0
    assert max(held) <= 4 * limit
    assert 180 / fused.COLUMNS_AT_A_TIME < len(launches) < 180 / 4


def test_the_fused_way_needs_a_gpu_and_triton(monkeypatch):
    monkeypatch.undo()
    here = torch.zeros(3, 2, device=DEVICE)
    assert selection._runs_fused([here]) == GPU
    assert not selection._runs_fused([torch.zeros(3, 2)])
    monkeypatch.setattr(selection, "find_spec", lambda _: None)
    selection._has_triton.cache_clear()
    assert not selection._has_triton()
    selection._has_triton.cache_clear()


def test_importing_the_selection_does_not_import_triton():
    code = "import sys, llava_todre.selection; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


COMPILE = """
import sys
from triton import compile as build
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from llava_todre.selection_triton import _cosines_kernel, _greedy_kernel

def check(kernel, types, capability, num_warps, **constants):
    names = [name for name in kernel.arg_names if name not in constants]
    source = ASTSource(kernel, dict(zip(names, types, strict=True)), constexprs=constants)
    target = GPUTarget("cuda", capability, 32)
    built = build(source, target=target, options={"num_warps": num_warps, "num_stages": 3})
    assert built.metadata.shared <= 99 * 1024, built.metadata.shared  # what an RTX 3090 has
    return built.asm["ptx"]

numbers = ["*fp32", "*i64", "*fp32", "i32", "i32", "i32"]
for capability in (86, 90):
    whole = dict(SYMMETRIC=True, TILE_M=128, TILE_N=128, TILE_D=32)
    ptx = check(_cosines_kernel, ["*bf16", *numbers], capability, 8, **whole)
    assert "f32.bf16.bf16" in ptx  # tensor cores that add up in float32
    block = dict(SYMMETRIC=False, TILE_M=32, TILE_N=128, TILE_D=32)
    ptx = check(_cosines_kernel, ["*fp32", *numbers], capability, 4, **block)
    assert "tf32" not in ptx
    for known in (True, False):
        pointers = ["*i64", "*fp32", "*i64", "*i32", "*fp32", "*i32"]
        constants = dict(MAX_SUM=known, ALL_KNOWN=known, BLOCK=4096)
        check(_greedy_kernel, pointers, capability, 8, **constants)
"""


def test_the_kernels_compile_for_an_rtx_3090_and_an_h200(tmp_path):
    """The interpreter accepts what the compiler does not; no GPU is needed to ask it."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", COMPILE], check=True, cwd=ROOT, env=environment)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_gpu_picks_what_the_cpu_picks_and_equal_tokens_in_order(objective, dtype):
    features = random_features(1000, width=1024).to(dtype).repeat(3, 1)[:2880]
    picked = greedy_diverse(features.cuda(), 720, 3, objective).cpu()
    assert torch.equal(picked, selection._equal_rows_in_order(features, picked))
    gaps = reference.greedy_gaps(features, picked.tolist(), objective)
    assert max(gaps) <= 1e-6 * (720 if objective == "max_sum" else 1)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_64_frames_fit_into_one_gigabyte():
    features = torch.randn(36_864, 4096, device="cuda", dtype=torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    assert len(greedy_diverse(features, 3686, 3, "max_sum").unique()) == 3686
    assert torch.cuda.max_memory_allocated() < 10**9
