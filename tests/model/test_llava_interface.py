"""What a caller of the model may rely on, and what is refused by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from reference import IMAGE

from llava_todre.errors import TodreError
from llava_todre.model.llava import LlavaLlamaForCausalLM
from llava_todre.model.load import load_pretrained_model
from llava_todre.model.placement import check_spread
from llava_todre.pruners import Pruner, create_pruner

SIZE = (120, 80)
IDS = torch.tensor([[1, 5, IMAGE, 7, 8]])


def views() -> list[torch.Tensor]:
    return [torch.randn(5, 3, 56, 56, generator=torch.Generator().manual_seed(0))]


def test_generate_asks_for_the_logits_of_one_row_only(tiny_llava):
    model = tiny_llava()
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, out: rows.append(args[0].shape[1]))
    model.generate(IDS, images=views(), image_sizes=[SIZE], do_sample=False, max_new_tokens=3)
    assert rows == [1, 1, 1]


def test_decoder_and_tower_use_the_attention_that_was_asked_for(attention):
    checkpoint = Path(__file__).parents[1] / "golden" / "llava-v1.6-tiny"
    _, model, _, _ = load_pretrained_model(checkpoint, attn_implementation=attention)
    assert model.config._attn_implementation == attention
    assert model.get_vision_tower().vision_tower.config._attn_implementation == attention


def test_blocks_with_residual_connections_are_never_split_over_devices(tiny_llava):
    model = tiny_llava()
    assert set(model._no_split_modules) == {"LlamaDecoderLayer", "CLIPEncoderLayer"}
    names = {type(module).__name__ for module in model.modules()}
    assert set(model._no_split_modules) <= names


def test_a_model_that_spills_from_gpus_to_the_cpu_is_refused():
    check_spread({"model.layers.0": 0, "model.layers.1": 1})
    check_spread({"": "cpu"})
    with pytest.raises(TodreError, match="device_map must .* GPUs only, .* does not fit"):
        check_spread({"model.layers.0": 0, "lm_head": "cpu"})


def test_attention_of_another_vision_layer_is_not_used_silently(tiny_llava):
    model = tiny_llava()
    model.set_pruner("todre", retain_ratio=0.2)
    encoded = model.encode_images(views(), [SIZE])
    model.set_pruner("todre", retain_ratio=0.2, cls_layer=-2)
    with pytest.raises(TodreError, match="cls_attention', -2"):
        model.generate(IDS, images=encoded, max_new_tokens=1)
    model.set_pruner("todre", retain_ratio=0.1)
    model.generate(IDS, images=encoded, do_sample=False, max_new_tokens=1)


def test_input_ids_is_another_name_for_inputs(tiny_llava):
    model = tiny_llava()
    options = {"images": views(), "image_sizes": [SIZE], "do_sample": False, "max_new_tokens": 4}
    assert torch.equal(model.generate(input_ids=IDS, **options), model.generate(IDS, **options))


def test_a_step_of_a_hand_written_loop_may_repeat_the_images(tiny_llava):
    model: LlavaLlamaForCausalLM = tiny_llava()
    images = {"images": views(), "image_sizes": [SIZE]}
    with torch.no_grad():
        first = model(IDS, use_cache=True, **images)
        token = first.logits[:, -1:].argmax(-1)
        cache = first.past_key_values
        second = model(token, past_key_values=cache, use_cache=True, **images)
    expected = model.generate(IDS, do_sample=False, max_new_tokens=2, **images)
    assert [int(token), int(second.logits[0, -1].argmax())] == expected[0].tolist()


def test_a_method_that_needs_what_nobody_computes_is_refused(tiny_llava):
    @dataclass(frozen=True, kw_only=True)
    class Wishful(Pruner):
        needs = frozenset({("cls_atention", -1)})

    with pytest.raises(TodreError, match="Did you mean 'cls_attention'"):
        tiny_llava().set_pruner(Wishful())


def test_options_beside_a_method_object_change_it(tiny_llava):
    chosen = tiny_llava().set_pruner(create_pruner("todre"), retain_ratio=0.5)
    assert chosen == create_pruner("todre", retain_ratio=0.5)
