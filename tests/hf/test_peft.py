"""A ``PeftModel`` around a stock model is pruned like the model with its adapter merged."""

from __future__ import annotations

import pytest
import torch
from tiny import ONE, build, inputs_for

from llava_todre import TodreError, hf

peft = pytest.importorskip("peft")


def test_a_stock_peft_model_is_pruned() -> None:
    torch.manual_seed(0)
    targets = r".*(layers\.\d+\.self_attn\.(q|k)_proj)"  # of decoder and tower
    settings = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    wrapped = peft.get_peft_model(build("llava_next", num_hidden_layers=4), settings).eval()
    seen = []
    for _ in range(2):
        inputs = inputs_for(wrapped.get_base_model() if not seen else wrapped, ONE)
        plain = wrapped.generate(**inputs, max_new_tokens=4, do_sample=False)
        with hf.prune(wrapped, "todre", retain_ratio=0.25):
            output = wrapped.generate(**inputs, max_new_tokens=4, do_sample=False)
            seen.append((output.tolist(), hf.last_stats(wrapped)[0].as_dict()["keep_idx"]))
        with pytest.raises(TodreError, match="nothing is attached"):
            hf.detach(wrapped)
        again = wrapped.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert torch.equal(plain, again)
        wrapped = wrapped.merge_and_unload() if len(seen) == 1 else wrapped
    assert seen[0] == seen[1]
    assert len(seen[0][1][0]) < 64
