"""FLOP counts against PyTorch's own counter on real models, and against the printed numbers."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from llava_todre.errors import TodreError
from llava_todre.flops import (
    KNOWN,
    DecoderShape,
    Experts,
    TowerShape,
    decoder_decode_flops,
    decoder_prefill_flops,
    paper_decode_flops,
    paper_prefill_flops,
    projector_flops,
    tower_flops,
)

VICUNA_7B = DecoderShape(layers=32, width=4096, mlp_width=11008, heads=32, kv_heads=32, vocab=32000)
VICUNA_13B = DecoderShape(
    layers=40, width=5120, mlp_width=13824, heads=40, kv_heads=40, vocab=32000
)
CLIP_L_336 = TowerShape(layers=24, width=1024, mlp_width=4096, image_size=336, patch_size=14)
TERA = 1e12

# PyTorch's counter does not know the fused CPU attention and would silently count nothing for it.
ATTENTION = "eager"


def build_llama(shape: DecoderShape) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.mlp_width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab,
        attn_implementation=ATTENTION,
    )
    return LlamaForCausalLM(config).eval()


def count(run) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_prefill_and_decode_equal_the_torch_counter(kv_heads):
    shape = DecoderShape(layers=3, width=32, mlp_width=56, heads=4, kv_heads=kv_heads, vocab=41)
    model = build_llama(shape)
    ids = torch.arange(13)[None] % shape.vocab

    prefill = count(lambda: model(ids, logits_to_keep=1))
    assert prefill == decoder_prefill_flops(shape, [13] * 3)

    cache = model(ids, use_cache=True).past_key_values
    steps = count(lambda: [model(ids[:, :1], past_key_values=cache) for _ in range(4)])
    assert steps == decoder_decode_flops(shape, [13] * 3, steps=4)


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 41,
    "pad_token_id": 0,
}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
DECODERS = {
    "llama": ("llama", {}),
    "llama, wide heads": ("llama", {"head_dim": 16}),
    "qwen2": ("qwen2", {"num_key_value_heads": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "mistral": ("mistral", {}),
    "mistral, narrow heads": ("mistral", {"head_dim": 4}),
    "gemma": ("gemma", {"head_dim": 16}),
    "phi3": ("phi3", {}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral, wide heads": ("mixtral", {"num_local_experts": 5, "head_dim": 16}),
    "qwen2_moe": ("qwen2_moe", {**MIXTURE, "shared_expert_intermediate_size": 40}),
    "qwen3_moe": ("qwen3_moe", {**MIXTURE, "head_dim": 16}),
    "qwen3_moe, every second": ("qwen3_moe", {**MIXTURE, "decoder_sparse_step": 2}),
    "qwen3_moe, all dense": ("qwen3_moe", {**MIXTURE, "num_experts": 0}),
    "qwen3_moe, one dense": ("qwen3_moe", {**MIXTURE, "mlp_only_layers": [1]}),
}


def build(model_type, changes):
    config = AutoConfig.for_model(model_type, **(SIZES | changes))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION).eval()
    if any("experts" in name for name, _ in model.named_parameters()):
        model.set_experts_implementation("eager")  # the counter does not know grouped_mm
    return model


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("length", [1, 13, 70])
def test_decoders_of_transformers_equal_the_torch_counter(name, length):
    model = build(*DECODERS[name])
    shape = DecoderShape.of(model.config)
    ids = torch.arange(length)[None] % shape.vocab
    assert count(lambda: model(ids, logits_to_keep=1)) == decoder_prefill_flops(shape, [length] * 3)
    cache = model(ids, use_cache=True).past_key_values
    steps = count(lambda: [model(ids[:, :1], past_key_values=cache) for _ in range(3)])
    assert steps == decoder_decode_flops(shape, [length] * 3, steps=3)


def test_every_type_that_is_said_to_be_known_is_counted_somewhere():
    counted = {model_type for model_type, _ in DECODERS.values()}
    ours_and_the_original = {"llava_llama", "llava_mistral"}  # subclasses of those above
    in_a_vision_model = {f"{name}_text" for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")}
    in_a_vision_model.add("qwen3_vl_moe_text")
    assert counted | ours_and_the_original | in_a_vision_model == KNOWN


def test_layers_of_different_kind_and_length_equal_the_sum_of_single_layers():
    """A dense layer with 9 tokens and one of experts with 5 cost what two models of each do."""
    changes = {**MIXTURE, "head_dim": 16, "num_hidden_layers": 2, "mlp_only_layers": [0]}
    shape = DecoderShape.of(AutoConfig.for_model("qwen3_moe", **(SIZES | changes)))
    head = 2 * shape.width * shape.vocab
    total = head
    for length, dense in ((9, [0]), (5, [])):
        model = build("qwen3_moe", changes | {"num_hidden_layers": 1, "mlp_only_layers": dense})
        ids = torch.zeros(1, length, dtype=torch.long)
        total += count(lambda model=model, ids=ids: model(ids, logits_to_keep=1)) - head
    assert decoder_prefill_flops(shape, [9, 5]) == total


@pytest.mark.parametrize(
    "model_type",
    ["deepseek_v3", "qwen3_next", "gpt_oss", "opt", "gemma2", "phi", "mamba", "minimax"],
)
def test_decoders_whose_products_are_not_known_are_refused_by_name(model_type):
    config = AutoConfig.for_model(model_type)
    with pytest.raises(TodreError, match=f"FLOPs of a decoder of type '{model_type}'") as error:
        DecoderShape.of(config)
    assert "\n" not in str(error.value) and "qwen3_moe" in str(error.value)


@pytest.mark.parametrize("model_type", ["mistral", "qwen2"])
def test_a_sliding_window_that_binds_is_refused(model_type):
    given = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}
    shape = DecoderShape.of(AutoConfig.for_model(model_type, **(SIZES | given)))
    assert decoder_prefill_flops(shape, [8] * 3) and decoder_decode_flops(shape, [5] * 3, steps=3)
    for call in (
        lambda: decoder_prefill_flops(shape, [9, 9, 3]),
        lambda: decoder_decode_flops(shape, [5] * 3, steps=4),
    ):
        with pytest.raises(TodreError, match="FLOPs of 9 tokens under a sliding window of 8"):
            call()


@pytest.mark.parametrize("given", [{"use_sliding_window": False}, {"max_window_layers": 3}])
def test_a_window_of_no_layer_does_not_bind(given):
    given = {"sliding_window": 8, "use_sliding_window": True} | given
    shape = DecoderShape.of(AutoConfig.for_model("qwen2", **(SIZES | given)))
    assert decoder_prefill_flops(shape, [90] * 3) > 0


def test_the_papers_formulas_know_no_experts():
    shape = DecoderShape(3, 32, 56, 4, 2, 41, experts=Experts(4, 2, 24))
    with pytest.raises(TodreError, match="this decoder has 4 experts"):
        paper_prefill_flops(shape, [5] * 3)
    with pytest.raises(TodreError, match="this decoder has 4 experts"):
        paper_decode_flops(shape, [5] * 3, 2)


def test_sizes_are_stored_without_what_is_usual():
    usual = DecoderShape.of(LlamaConfig(**SIZES))
    assert list(usual.as_dict()) == ["layers", "width", "mlp_width", "heads", "kv_heads", "vocab"]
    assert DecoderShape.of(LlamaConfig(**SIZES, head_dim=16)).as_dict()["head_dim"] == 16


def test_unequal_layers_equal_the_sum_of_single_layers():
    """Layers with 9, 9, 2 tokens cost what three one-layer models with those lengths cost."""
    shape = DecoderShape(layers=3, width=32, mlp_width=56, heads=4, kv_heads=2, vocab=41)
    single = DecoderShape(layers=1, width=32, mlp_width=56, heads=4, kv_heads=2, vocab=41)
    model = build_llama(single)
    head = 2 * shape.width * shape.vocab
    lengths = [9, 9, 2]

    counted = sum(
        count(lambda n=n: model(torch.zeros(1, n, dtype=torch.long), logits_to_keep=1)) - head
        for n in lengths
    )
    assert decoder_prefill_flops(shape, lengths) == counted + head


def test_causal_counts_the_allowed_pairs():
    shape = DecoderShape(layers=1, width=8, mlp_width=8, heads=2, kv_heads=2, vocab=5)
    difference = decoder_prefill_flops(shape, [10]) - decoder_prefill_flops(
        shape, [10], causal=True
    )
    forbidden_pairs = 10 * 9 // 2
    assert difference == forbidden_pairs * 4 * shape.width


def test_causal_prefill_equals_decoding_the_prompt_token_by_token():
    shape = DecoderShape(layers=2, width=8, mlp_width=24, heads=2, kv_heads=1, vocab=5)
    heads_not_in_a_prefill = 6 * 2 * shape.width * shape.vocab
    one_by_one = decoder_decode_flops(shape, [0, 0], steps=7)
    prefill = decoder_prefill_flops(shape, [7, 7], causal=True)
    assert prefill == one_by_one - heads_not_in_a_prefill


def test_tower_equals_the_torch_counter():
    shape = TowerShape(layers=3, width=32, mlp_width=64, image_size=56, patch_size=14)
    config = CLIPVisionConfig(
        hidden_size=shape.width,
        intermediate_size=shape.mlp_width,
        num_hidden_layers=shape.layers,
        num_attention_heads=4,
        image_size=shape.image_size,
        patch_size=shape.patch_size,
        attn_implementation=ATTENTION,
    )
    model = CLIPVisionModel(config).eval()
    assert count(lambda: model(torch.zeros(5, 3, 56, 56))) == tower_flops(shape, views=5)


def test_projector_equals_the_torch_counter():
    projector = torch.nn.Sequential(
        torch.nn.Linear(24, 40), torch.nn.GELU(), torch.nn.Linear(40, 40)
    )
    assert count(lambda: projector(torch.zeros(1, 17, 24))) == projector_flops(24, 40, tokens=17)


def test_paper_formulas_equal_the_sums_they_come_from():
    """Eq. 2's closed form is the printed sum over t; Eq. 1 is a sum over layers."""
    n, length, d, m = 300, 7, VICUNA_7B.width, VICUNA_7B.mlp_width
    steps = range(1, length + 1)
    by_step = 32 * sum(4 * d * d + 2 * d * (n + t - 1) + 2 * d * m for t in steps)
    assert paper_decode_flops(VICUNA_7B, [n] * 32, length) == by_step

    mixed = paper_prefill_flops(VICUNA_7B, [n] * 28 + [60] * 4)
    per_layer = [paper_prefill_flops(VICUNA_7B, [k] * 32) // 32 for k in (n, 60)]
    assert mixed == 28 * per_layer[0] + 4 * per_layer[1]


def test_section_3_1_decoder_ratios_reproduce():
    """Printed for n = 3000, L = 20: encoding:prefill:decoding 1:63.6:0.4, for 13B 1:121.1:0.8."""
    prefill_7b = paper_prefill_flops(VICUNA_7B, [3000] * 32)
    prefill_13b = paper_prefill_flops(VICUNA_13B, [3000] * 40)
    assert prefill_13b / prefill_7b == pytest.approx(121.1 / 63.6, abs=2e-3)

    encoding = prefill_7b / 63.6
    assert round(paper_decode_flops(VICUNA_7B, [3000] * 32, 20) / encoding, 1) == 0.4
    assert round(paper_decode_flops(VICUNA_13B, [3000] * 40, 20) / encoding, 1) == 0.8


def test_section_3_1_encoder_share_does_not_reproduce():
    """The printed 63.6 implies 804 tower tokens; one view has 577 (and AnyRes has five views)."""
    prefill = paper_prefill_flops(VICUNA_7B, [3000] * 32)

    def ratio(tokens):
        return prefill / paper_prefill_flops(CLIP_L_336, [tokens] * 24)

    assert round(ratio(804), 1) == 63.6
    assert round(ratio(577), 1) == 91.6
    assert round(ratio(577) / 5, 1) == 18.3


def test_table_3_does_not_reproduce_at_the_printed_token_counts():
    """Printed: 31.4 T at 2,880 visual tokens, 6.0 T at 288. Neither definition gives either.

    Text only adds, so no prompt length can help where the count is already too high; Eq. 1 would
    need 2,078 text tokens for the first row and 838 for the second.
    """

    def paper(n):
        return paper_prefill_flops(VICUNA_7B, [n] * 32) / TERA

    def exact(n):
        return decoder_prefill_flops(VICUNA_7B, [n] * 32) / TERA

    assert paper(2880) == pytest.approx(16.7, abs=0.05)
    assert exact(2880) == pytest.approx(41.7, abs=0.05)
    assert paper(288) == pytest.approx(1.5, abs=0.05)
    assert exact(288) == pytest.approx(3.8, abs=0.05)
    assert paper(2880 + 2078) == pytest.approx(31.4, abs=0.01)
    assert paper(288 + 838) == pytest.approx(6.0, abs=0.01)
    assert exact(2224) == pytest.approx(31.4, abs=0.01)
    assert exact(455) == pytest.approx(6.0, abs=0.01)


def test_table_3_savings_follow_from_its_own_columns_except_fastv():
    """FastV prints 8.2 T as a saving of 78.0 %, which belongs to SparseVLM's 6.9 T."""
    assert round(100 * (1 - 6.0 / 31.4), 1) == 80.9
    assert round(100 * (1 - 6.1 / 31.4), 1) == 80.6
    assert round(100 * (1 - 6.9 / 31.4), 1) == 78.0
    assert round(100 * (1 - 8.2 / 31.4), 1) == 73.9


@pytest.mark.parametrize(
    "call",
    [
        lambda: decoder_prefill_flops(VICUNA_7B, [10] * 31),
        lambda: paper_prefill_flops(VICUNA_7B, [10]),
        lambda: decoder_decode_flops(VICUNA_7B, [10] * 32, steps=-1),
        lambda: paper_decode_flops(VICUNA_7B, [-1] * 32, new_tokens=1),
        lambda: tower_flops(CLIP_L_336, views=-1),
        lambda: projector_flops(1024, 4096, tokens=-5),
        lambda: DecoderShape(layers=1, width=30, mlp_width=8, heads=4, kv_heads=4, vocab=5),
        lambda: DecoderShape(layers=1, width=32, mlp_width=8, heads=4, kv_heads=3, vocab=5),
    ],
)
def test_impossible_numbers_are_refused(call):
    with pytest.raises(TodreError):
        call()
