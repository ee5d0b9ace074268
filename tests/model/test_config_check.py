"""Values in the JSON files of a checkpoint: each that no model can have is refused by name."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

from llava_todre import TodreError, load_pretrained_model
from llava_todre.model import bounded
from llava_todre.model.checkpoint import read_json
from llava_todre.model.config_check import (
    CONFIG,
    GENERATION,
    PROCESSOR,
    check_config,
    check_values,
)

GOLDEN = Path(__file__).parent.parent / "golden"
V16 = GOLDEN / "llava-v1.6-tiny"
ROOT = Path(__file__).parents[2]
NUMBERS = (0, -1, 10**9, 10**30, -0.5, float("nan"), float("inf"))
OTHERS = ("x", "", [], {}, True, [1, "a"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    copy = shutil.copytree(V16, tmp_path / "llava")
    shutil.copytree(GOLDEN / "clip-v16", copy / "vision_tower")
    _edit(copy / "config.json", {"mm_vision_tower": "vision_tower"})
    return copy


def _edit(path: Path, changes: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _refused(folder: Path, *parts: str) -> None:
    with pytest.raises(TodreError) as caught:
        load_pretrained_model(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


def _got(changes: dict[str, Any]) -> list[str]:
    """Return how messages quote the changed values."""
    return [f"got {value!r}" for value in changes.values() if not isinstance(value, dict)]


@pytest.mark.parametrize(
    "path", [*sorted(GOLDEN.glob("*/config.json")), ROOT / "checkpoints" / "mini" / "config.json"]
)
def test_published_values_pass(path: Path) -> None:
    check_config(path, json.loads(path.read_text()))


PUBLISHED = {
    "original 1.5": {
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "rms_norm_eps": 1e-05,
        "mm_vision_select_layer": -2,
        "image_aspect_ratio": "pad",
        "pad_token_id": 0,
        "vocab_size": 32000,
        "torch_dtype": "float16",
        "rope_scaling": None,
    },
    "Llama 3": {
        "rope_theta": 500000.0,
        "vocab_size": 128257,
        "eos_token_id": [128001, 128009],
        "rope_scaling": {"factor": 8.0, "rope_type": "llama3", "low_freq_factor": 1.0},
    },
    "old Llama": {"pad_token_id": -1, "vocab_size": 32000},
    "InternVL": {
        "vision_config": {
            "image_size": [448, 448],
            "patch_size": [14, 14],
            "initializer_range": 1e-10,
            "hidden_act": "gelu",
        },
        "text_config": {"rope_scaling": {"factor": 2.0, "type": "dynamic"}, "head_dim": 128},
        "vision_feature_layer": -1,
    },
    "Qwen2.5-VL, saved by transformers 5.23": {
        "text_config": {"rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24]}},
        "vision_config": {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "axial"}},
    },
    "Qwen3": {"text_config": {"hidden_size": 2560, "num_attention_heads": 32, "head_dim": 128}},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_values_of_well_known_models_pass(name: str) -> None:
    check_config(name, PUBLISHED[name])


def test_defaults_of_transformers_pass() -> None:
    check_config("Llama", LlamaConfig().to_dict())


@pytest.mark.parametrize("table", [CONFIG, GENERATION, PROCESSOR])
def test_every_key_refuses_what_it_cannot_be(table: dict[str, Any]) -> None:
    """Of numbers and other things at least one each; and never with another error."""
    for key in table:
        refused = 0
        for value in (*NUMBERS, *OTHERS):
            try:
                check_values("config.json", {"inner": {key: value}}, table)
            except TodreError as error:
                refused += 1
                assert f"inner.{key} must be " in str(error)
                assert ", got " in str(error)
        assert refused >= 3, key


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_hidden_layers": 10**6}, "num_hidden_layers must be a whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a whole number from 1 to 1000"),
        ({"hidden_size": 64.0}, "hidden_size must be a whole number"),
        ({"hidden_size": True}, "hidden_size must be"),
        ({"num_attention_heads": 5}, "num_attention_heads must be a divisor of hidden_si"),
        ({"num_key_value_heads": 3}, "num_key_value_heads must be a divisor of num_atte"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a number above 0 to 1"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be"),
        ({"rope_theta": -1.0}, "rope_theta must be"),
        ({"rope_scaling": "linear"}, "rope_scaling must be a JSON object"),
        (
            {"rope_scaling": {"type": "linear", "factor": 0}},
            "rope_scaling.factor must be a number above 0 to 1e+06, got 0",
        ),
        ({"hidden_act": "siluu"}, "hidden_act must be one of "),
        ({"torch_dtype": "int8"}, "torch_dtype must be one of "),
        ({"mm_patch_merge_type": "spatial_unpadd"}, "must be one of flat, spatial, spatial_unpad"),
        ({"image_grid_pinpoints": [[1]]}, "image_grid_pinpoints must be a list of pairs"),
        ({"image_grid_pinpoints": [[0, 56]]}, "image_grid_pinpoints must be a list of pairs"),
        ({"image_aspect_ratio": 3}, "image_aspect_ratio must be one of"),
        ({"mm_vision_tower": ["clip"]}, "mm_vision_tower must be text"),
        ({"mm_vision_select_layer": "-2"}, "mm_vision_select_layer must be"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false"),
        ({"pad_token_id": 400}, "pad_token_id must be null, or a token of the vocabul"),
        ({"eos_token_id": [2, 10**6]}, "eos_token_id must be"),
        ({"something": float("inf")}, "something must be finite numbers"),
        ({"quantization_config": {"quant_method": "gptq"}}, "'gptq', but the weights are not q"),
    ],
)
def test_config(folder: Path, changes: dict[str, Any], expected: str) -> None:
    _edit(folder / "config.json", changes)
    _refused(folder, expected, *_got(changes))


def test_a_pad_token_beyond_the_usual_vocabulary(folder: Path) -> None:
    """Where the file does not say how large the vocabulary is."""
    raw = json.loads((folder / "config.json").read_text())
    raw.pop("vocab_size")
    (folder / "config.json").write_text(json.dumps(raw | {"pad_token_id": 40_000}))
    _refused(folder, "config.json", "pad_token_id")


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("vision_tower/config.json", {"num_hidden_layers": 10**6}, "num_hidden_layers must be"),
        ("vision_tower/config.json", {"patch_size": 0}, "patch_size must be"),
        (
            "vision_tower/config.json",
            {"patch_size": [14, 14]},
            "patch_size of the vision tower must be one number",
        ),
        ("vision_tower/config.json", {"image_size": 10**6}, "image_size must be"),
        ("vision_tower/preprocessor_config.json", {"image_std": [0, 1, 1]}, "image_std must be"),
        ("vision_tower/preprocessor_config.json", {"size": "large"}, "size must be pixels"),
        (
            "vision_tower/preprocessor_config.json",
            {"image_mean": 0.5},
            "image_mean must be three times a number",
        ),
        (
            "vision_tower/preprocessor_config.json",
            {"size": {"shortest_edge": 10**9}},
            "size must be pixels",
        ),
        ("vision_tower/preprocessor_config.json", {"size": {"shortest_edge": 9**6}}, "531441"),
        ("generation_config.json", {"num_beams": 100_000}, "num_beams must be"),
        ("generation_config.json", {"eos_token_id": "</s>"}, "eos_token_id must be"),
        ("generation_config.json", {"temperature": float("nan")}, "temperature must be"),
    ],
)
def test_other_files(folder: Path, name: str, changes: dict[str, Any], expected: str) -> None:
    _edit(folder / name, changes)
    _refused(folder, expected, *_got(changes))


@pytest.mark.parametrize(
    "changes", [{"image_processor": 3}, {"vision_feature_select_strategy": "cls"}]
)
def test_what_a_processor_holds(folder: Path, changes: dict[str, Any]) -> None:
    tower = folder / "vision_tower"
    shutil.move(tower / "preprocessor_config.json", tower / "processor_config.json")
    _edit(tower / "processor_config.json", changes)
    _refused(folder, "processor_config.json: ", *changes)


def test_sizes_that_contradict_the_weights_build_nothing_large(folder: Path) -> None:
    _edit(folder / "config.json", {"num_hidden_layers": 1000, "vocab_size": 2**24})
    _edit(folder / "vision_tower" / "config.json", {"num_hidden_layers": 1000})
    started = time.process_time()
    _refused(folder, "do not fit its config", "missing (model.layers.")
    assert time.process_time() - started < 5  # a thousand layers, even without data, take longer


@pytest.mark.parametrize("kind", ["axial", "llama3"])
def test_rope_that_a_decoder_cannot_have(folder: Path, kind: str) -> None:
    _edit(folder / "config.json", {"rope_scaling": {"rope_type": kind, "factor": 2.0}})
    _refused(folder, "config.json is not usable: it lacks, or has no use for, '")


def test_a_config_without_sizes_is_refused_by_the_weights(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    left_out = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for key in left_out:
        raw.pop(key)
    (folder / "config.json").write_text(json.dumps(raw))
    _refused(folder, "do not fit its config", "of wrong shape")


@pytest.mark.parametrize("kind", [torch.int8, torch.complex64, torch.float8_e4m3fn])
def test_weights_that_are_no_plain_numbers(folder: Path, kind: torch.dtype) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    name = "model.layers.1.self_attn.q_proj.weight"
    torch.save(tensors | {name: tensors[name].to(kind)}, folder / "pytorch_model.bin")
    _refused(folder, f"1 of wrong type ({name} {str(kind).removeprefix('torch.')})")


def test_json_that_is_no_file_or_has_no_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(TodreError, match="it is not a regular file"):
        read_json(tmp_path / "config.json")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(TodreError, match="not readable JSON: "):
        read_json(tmp_path / "deep.json")
    (tmp_path / "long.json").write_text('{"a": ' + "9" * 5000 + "}")
    with pytest.raises(TodreError, match="not readable JSON: "):
        read_json(tmp_path / "long.json")


# ------------------------------------------------------------------ tokenizers, templates


def test_work_without_end_is_stopped() -> None:
    rounds = []

    def forever() -> None:
        while True:
            rounds.append(1)

    with pytest.raises(TodreError, match=r"the template took longer than 0\.2 s"):
        bounded.within("the template", forever, seconds=0.2)
    time.sleep(0.3)
    count = len(rounds)
    time.sleep(0.1)
    assert len(rounds) == count  # the thread ended
    assert bounded.within("a sum", lambda: 1 + 1) == 2
    with pytest.raises(KeyError):
        bounded.within("a look-up", lambda: {}["x"])


def test_a_tokenizer_whose_pattern_does_not_end() -> None:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    with pytest.raises(TodreError, match="the tokenizer in here does not read one line: "):
        bounded.check_tokenizer("here", PreTrainedTokenizerFast(tokenizer_object=made))


def test_a_tokenizer_that_makes_too_much_of_a_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded, "_MAX_TOKENS", 5)
    _refused(folder, "the tokenizer in ", "tokens of one line; expected: 2 to 5")


def test_a_chat_template_of_our_class_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    from llava_todre.model.chat_template import own_template

    tokenizer = load_pretrained_model(V16)[0]
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    tokenizer.chat_template = loop
    monkeypatch.setattr(bounded, "SECONDS", 0.2)
    with pytest.raises(TodreError, match=r"cannot be used: the chat template took longer"):
        own_template(tokenizer)
