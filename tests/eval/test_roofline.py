"""Bounds follow from the peaks of the device and from bytes counted on a real model."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from eval.bench.roofline import DEVICES, Device, bound, kv_bytes, step_bytes, weight_bytes
from llava_todre.flops import DecoderShape, decoder_prefill_flops

LLAMA_7B = DecoderShape(32, 4096, 11008, 32, 32, 32000)
SMALL = DecoderShape(layers=3, width=64, mlp_width=96, heads=4, kv_heads=2, vocab=50)


def llama(shape: DecoderShape) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=shape.width,
            intermediate_size=shape.mlp_width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            vocab_size=shape.vocab,
        )
    )


def test_weight_bytes_are_those_of_the_matrices_of_a_real_model() -> None:
    model = llama(SMALL)
    matrices = [
        weight
        for name, weight in model.named_parameters()
        if weight.ndim == 2 and "embed_tokens" not in name
    ]
    assert weight_bytes(SMALL, 4) == sum(weight.nbytes for weight in matrices)


def test_cache_bytes_are_those_of_a_real_cache() -> None:
    output = llama(SMALL)(torch.zeros(1, 11, dtype=torch.int64), use_cache=True)
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in output.past_key_values.layers)
    assert kv_bytes(SMALL, [11] * 3, 4) == real
    assert kv_bytes(SMALL, [11, 11, 5], 4) == real * 27 // 33
    assert step_bytes(SMALL, [11] * 3, 4) == weight_bytes(SMALL, 4) + real


def test_a_step_reads_the_experts_of_one_token_and_a_prefill_all() -> None:
    config = Qwen3MoeConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=50,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
    )
    model, shape = Qwen3MoeForCausalLM(config), DecoderShape.of(config)
    matrices = {name: weight for name, weight in model.named_parameters() if weight.ndim > 1}
    del matrices["model.embed_tokens.weight"]
    assert weight_bytes(shape, 4) == sum(weight.nbytes for weight in matrices.values())
    experts = sum(weight.nbytes for name, weight in matrices.items() if "experts" in name)
    unused = experts * 4 // 6
    step = step_bytes(shape, [7, 7], 4)
    assert step == weight_bytes(shape, 4) - unused + kv_bytes(shape, [7, 7], 4)
    output = model(torch.zeros(1, 7, dtype=torch.int64), use_cache=True)
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in output.past_key_values.layers)
    assert kv_bytes(shape, [7, 7], 4) == real


@pytest.mark.parametrize(("flops", "byte_rate"), [(1e9, 1e30), (1e30, 1e9)])
def test_the_slower_of_arithmetic_and_memory_bounds(flops: float, byte_rate: float) -> None:
    layers = [20, 20, 10]
    got = bound(Device("", flops, byte_rate, ""), SMALL, layers)
    work = decoder_prefill_flops(SMALL, layers, causal=True)
    moved = step_bytes(SMALL, layers, 2)
    if flops == 1e9:
        assert got.prefill_s == pytest.approx(work / 1e9)
        assert got.token_s < got.prefill_s
    else:
        assert got.prefill_s == got.token_s == pytest.approx(moved / 1e9)


def test_a_7b_model_computes_in_prefill_and_reads_in_decoding() -> None:
    assert weight_bytes(LLAMA_7B, 2) == pytest.approx(13.2e9, rel=0.01)
    for device in DEVICES:
        full, tenth = (bound(device, LLAMA_7B, [n + 65] * 32) for n in (2880, 288))
        work = decoder_prefill_flops(LLAMA_7B, [2945] * 32, causal=True)
        assert full.prefill_s == pytest.approx(work / device.flops_per_s)
        read = step_bytes(LLAMA_7B, [2945] * 32, 2)
        assert full.token_s == pytest.approx(read / device.bytes_per_s)
        assert 8 < full.prefill_s / tenth.prefill_s < 9
        assert 1.1 < full.token_s / tenth.token_s < 1.2
