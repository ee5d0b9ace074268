"""Every published layout of a checkpoint loads to the same model; every broken one says why."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors as hub
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
)
from transformers import LlavaConfig as HfLlavaConfig
from transformers import LlavaNextConfig as HfLlavaNextConfig

from llava_todre.errors import TodreError
from llava_todre.model.convert import TOWER_PREFIX, rename, vision_config
from llava_todre.model.images import load_image, process_images
from llava_todre.model.load import load_pretrained_model

GOLDEN = Path(__file__).parent.parent / "golden"
V16, V15 = GOLDEN / "llava-v1.6-tiny", GOLDEN / "llava-v1.5-tiny"
IMAGE_ID = 400  # the row HF adds to the vocabulary for <image>


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def offline(*args, **kwargs):
        raise hub.OfflineModeIsEnabled("tests do not use the network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", offline)


def _golden(variant, case):
    return {
        name.split(".", 1)[1]: tensor
        for name, tensor in load_file(GOLDEN / f"{variant}_expected.safetensors").items()
        if name.startswith(f"{case}.")
    }


def _logits(loaded, variant, case):
    tokenizer, model, processor, _ = loaded
    image = load_image(GOLDEN / f"{variant}_{case}.png")
    pixels = process_images([image], processor, model.config)
    ids = _golden(variant, case)["input_ids"]
    with torch.no_grad():
        return model(input_ids=ids, images=pixels, image_sizes=[image.size]).logits


def _check(loaded, variant, case=0):
    expected = _golden(variant, case)["logits"]
    logits = _logits(loaded, variant, case)[..., : expected.shape[-1]]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def _copy(source, folder, **changes):
    """Copy a checkpoint and its tower; ``changes`` go into config.json, None removes a key."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        shutil.copy(file, folder / file.name)
    _edit(folder / "config.json", {"mm_vision_tower": "vision_tower"} | changes)
    clip = "clip-v16" if "1.6" in source.name else "clip-v15"
    shutil.copytree(GOLDEN / clip, folder / "vision_tower")
    return folder


def _edit(path, changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def _tensors(folder, change):
    """Rewrite the weights: ``change`` maps the dictionary of tensors to a new one."""
    changed = change(load_file(folder / "model.safetensors"))
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})


def _shard(folder, extension, save):
    """Split the weights into two shards with an index."""
    stem = "model" if extension == "safetensors" else "pytorch_model"
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"{stem}-0000{number}-of-00002.{extension}"
        save({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{stem}.{extension}.index.json").write_text(json.dumps({"weight_map": weight_map}))


# ------------------------------------------------------------------ the original layout


@pytest.mark.parametrize("variant", ["v15", "v16"])
def test_golden_checkpoints(variant):
    loaded = load_pretrained_model(V16 if variant == "v16" else V15)
    tokenizer, model, processor, context_length = loaded
    for case in range(6):
        _check(loaded, variant, case)
    assert context_length == 4096
    assert not model.training
    assert model.dtype == torch.float32
    assert model.get_vision_tower().image_processor is processor
    assert model.generation_config.eos_token_id == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", torch.float16])
def test_buffers_are_right_in_every_dtype(dtype):
    _, model, *_ = load_pretrained_model(V16, dtype=dtype, attn_implementation="eager")
    assert str(model.dtype).endswith(str(dtype).removeprefix("torch."))
    expected = 1 / 10000 ** (torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, expected)
    positions = model.get_vision_tower().vision_tower.embeddings.position_ids
    assert torch.equal(positions, torch.arange(17)[None])
    assert all(parameter.dtype == model.dtype for parameter in model.parameters())


def test_sharded_safetensors_with_leftovers(tmp_path):
    folder = _copy(V16, tmp_path / "sharded")
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
        TOWER_PREFIX + "vision_model.embeddings.position_ids": torch.arange(17)[None],
    }
    _tensors(folder, lambda tensors: tensors | extra)
    _shard(folder, "safetensors", lambda part, path: save_file(part, path, {"format": "pt"}))
    _check(load_pretrained_model(folder), "v16")


@pytest.mark.parametrize("old_format", [False, True])
def test_bin_weights(tmp_path, old_format):
    folder = _copy(V15, tmp_path / "bin")
    tower = load_file(folder / "vision_tower/model.safetensors")
    text_half = {"text_model.x": torch.zeros(1), "logit_scale": torch.zeros(1)}
    torch.save(tower | text_half, folder / "vision_tower/pytorch_model.bin")
    (folder / "vision_tower/model.safetensors").unlink()
    new = not old_format
    _shard(
        folder,
        "bin",
        lambda part, path: torch.save(part, path, _use_new_zipfile_serialization=new),
    )
    _check(load_pretrained_model(folder), "v15")


def test_tower_in_the_file_wins_over_the_one_beside_it(tmp_path):
    folder = _copy(V16, tmp_path / "embedded")
    (folder / "vision_tower/model.safetensors").write_bytes(b"never opened")
    _check(load_pretrained_model(folder), "v16")


def test_tower_of_a_whole_clip_at_an_absolute_path(tmp_path):
    folder = _copy(V15, tmp_path / "far")
    tower = tmp_path / "clip"
    (folder / "vision_tower").rename(tower)
    _edit(folder / "config.json", {"mm_vision_tower": str(tower)})
    config = json.loads((tower / "config.json").read_text())
    (tower / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": config}))
    _edit(tower / "preprocessor_config.json", {"size": 56, "crop_size": 56})  # as OpenAI wrote it
    _check(load_pretrained_model(folder), "v15")


def test_processor_from_the_checkpoint_folder(tmp_path):
    folder = _copy(V16, tmp_path / "processor")
    name = "preprocessor_config.json"
    (folder / "vision_tower" / name).rename(folder / name)
    _check(load_pretrained_model(folder), "v16")


def test_saved_model_loads_again(tmp_path):
    tokenizer, model, processor, _ = load_pretrained_model(V16)
    for part in (tokenizer, model, processor):
        part.save_pretrained(tmp_path / "saved")
    loaded = load_pretrained_model(str(tmp_path / "saved"))
    _check(loaded, "v16")
    assert loaded[1].config.image_grid_pinpoints == model.config.image_grid_pinpoints


def test_generation_config_and_context_length(tmp_path):
    folder = _copy(V16, tmp_path / "settings", tokenizer_model_max_length=2048)
    _edit(folder / "generation_config.json", {"eos_token_id": [2, 7]})
    _, model, _, context_length = load_pretrained_model(folder)
    assert model.generation_config.eos_token_id == [2, 7]
    assert context_length == 2048
    (folder / "generation_config.json").unlink()
    assert load_pretrained_model(folder)[1].generation_config.eos_token_id == 2
    _edit(folder / "config.json", {"tokenizer_model_max_length": None})
    assert load_pretrained_model(folder)[3] == 4096


def test_mistral_and_tied_weights(tmp_path):
    folder = _copy(V16, tmp_path / "tied", model_type="llava_mistral", tie_word_embeddings=True)
    _tensors(folder, lambda tensors: {k: v for k, v in tensors.items() if k != "lm_head.weight"})
    _, model, *_ = load_pretrained_model(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_device_map_spreads_with_accelerate():
    pytest.importorskip("accelerate")
    _check(load_pretrained_model(V16, device_map="auto"), "v16")
    _check(load_pretrained_model(V16, device_map={"": "cpu"}), "v16")


def test_loading_draws_no_random_numbers():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    load_pretrained_model(V15)
    assert torch.equal(torch.rand(1), expected)


def test_protocol_paper():
    loaded = load_pretrained_model(V16, protocol="paper")
    _, model, processor, _ = loaded
    assert model.config.mm_patch_merge_type == "spatial"
    for case in range(6):
        image = load_image(GOLDEN / f"v16_{case}.png")
        assert process_images([image], processor, model.config).shape == (1, 5, 3, 56, 56)
        ids = _golden("v16", case)["input_ids"]
        assert _logits(loaded, "v16", case).shape[1] == ids.shape[1] - 1 + 5 * 16


# ------------------------------------------------------------------ llava-hf


def _hf_names(name):
    for ours, theirs in [
        (TOWER_PREFIX, "model.vision_tower."),
        ("model.mm_projector.0", "model.multi_modal_projector.linear_1"),
        ("model.mm_projector.2", "model.multi_modal_projector.linear_2"),
        ("model.image_newline", "model.image_newline"),
        ("lm_head", "lm_head"),
        ("model.", "model.language_model."),
    ]:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise AssertionError(name)


def _old_name(name):
    """The name a class of 2024 gave to what today's model.state_dict() calls ``name``."""
    for new, old in [
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("model.image_newline", "image_newline"),
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
    ]:
        if name.startswith(new):
            return old + name.removeprefix(new)
    raise AssertionError(name)


def _hf_twin(variant):
    """Return transformers' own model with the golden weights."""
    _, ours, processor, _ = load_pretrained_model(V16 if variant == "v16" else V15)
    keys = "hidden_size intermediate_size num_hidden_layers num_attention_heads rms_norm_eps"
    text = {key: getattr(ours.config, key) for key in [*keys.split(), "num_key_value_heads"]}
    text = LlamaConfig(**text, vocab_size=IMAGE_ID + 1, max_position_embeddings=4096)
    common = {
        "text_config": text,
        "vision_config": CLIPVisionConfig(**ours.config.vision_config),
        "image_token_index": IMAGE_ID,
    }
    if variant == "v16":
        pinpoints = [[h, w] for w, h in ours.config.image_grid_pinpoints]
        model = LlavaNextForConditionalGeneration(
            HfLlavaNextConfig(**common, image_grid_pinpoints=pinpoints)
        )
    else:
        model = LlavaForConditionalGeneration(HfLlavaConfig(**common))
    state = {_hf_names(name): tensor for name, tensor in ours.state_dict().items()}
    for name in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
        state[name] = torch.cat([state[name], torch.full((1, state[name].shape[1]), 0.01)])
    model.load_state_dict(state)
    return model.eval(), processor


@pytest.fixture(scope="module", params=["v15", "v16"])
def hf_checkpoint(request, tmp_path_factory):
    """(variant, HF model, folder with its checkpoint as transformers saves it)."""
    model, processor = _hf_twin(request.param)
    folder = tmp_path_factory.mktemp(f"hf-{request.param}")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(V16 / name, folder / name)
    return request.param, model, folder


def _hf_logits(model, variant, case):
    golden = _golden(variant, case)
    ids = golden["input_ids"]
    at = int((ids[0] == -200).nonzero())
    visual = torch.full((1, golden["logits"].shape[1] - ids.shape[1] + 1), IMAGE_ID)
    arguments = {"input_ids": torch.cat([ids[:, :at], visual, ids[:, at + 1 :]], dim=1)}
    if variant == "v16":
        size = load_image(GOLDEN / f"v16_{case}.png").size
        arguments["image_sizes"] = torch.tensor([[size[1], size[0]]])
    with torch.no_grad():
        return model(**arguments, pixel_values=golden["pixel_values"]).logits


@pytest.mark.parametrize("naming", ["saved", "module", "old"])
def test_hf_layout(hf_checkpoint, naming, tmp_path):
    variant, hf, saved = hf_checkpoint
    folder = shutil.copytree(saved, tmp_path / "hf")
    if naming != "saved":
        name = _old_name if naming == "old" else str
        state = {name(key): tensor.contiguous() for key, tensor in hf.state_dict().items()}
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    loaded = load_pretrained_model(folder)
    model = loaded[1]
    assert model.config.vocab_size == IMAGE_ID + 1
    assert model.config.image_aspect_ratio == ("anyres" if variant == "v16" else "pad")
    for case in range(6 if naming == "saved" else 1):
        _check(loaded, variant, case)
        expected = _hf_logits(hf, variant, case)
        torch.testing.assert_close(_logits(loaded, variant, case), expected, rtol=0, atol=1e-4)


def test_hf_pinpoints_turn_from_height_width(hf_checkpoint, tmp_path):
    variant, _, saved = hf_checkpoint
    if variant == "v15":
        pytest.skip("LLaVA-1.5 has no pinpoints")
    folder = shutil.copytree(saved, tmp_path / "hf")
    _edit(folder / "config.json", {"image_grid_pinpoints": [[56, 168]]})
    _, model, processor, _ = load_pretrained_model(folder)
    assert model.config.image_grid_pinpoints == [[168, 56]]


def test_hf_processor_in_processor_config(hf_checkpoint, tmp_path):
    variant, _, saved = hf_checkpoint
    folder = shutil.copytree(saved, tmp_path / "hf")
    raw = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": raw}))
    _check(load_pretrained_model(folder), variant)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config": {"model_type": "qwen2"}}, "model_type llama, .* got 'qwen2'"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "'siglip_vision_model'"),
        ({"vision_feature_layer": [-2, -1]}, r"vision_feature_layer must .* got \[-2, -1\]"),
        (
            {"vision_feature_select_strategy": "full"},
            "mm_vision_select_feature must .* got 'cls_patch'",
        ),
        ({"projector_hidden_act": "relu"}, "activation 'gelu' and a bias, got 'relu' and True"),
        ({"multimodal_projector_bias": False}, "'gelu' and a bias, got 'gelu' and False"),
    ],
)
def test_hf_config_errors(hf_checkpoint, changes, message, tmp_path):
    folder = shutil.copytree(hf_checkpoint[2], tmp_path / "hf")
    _edit(folder / "config.json", changes)
    _fails(message, folder)


# ------------------------------------------------------------------ what can be wrong


def _fails(message, path, **arguments):
    with pytest.raises(TodreError, match=message) as caught:
        load_pretrained_model(path, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "float61"}, "dtype 'float61' is unknown. Did you mean 'float16'"),
        ({"dtype": torch.int8}, "dtype 'int8' is unknown"),
        ({"attn_implementation": "spda"}, "'spda' is unknown. Did you mean 'sdpa'"),
        (
            {"attn_implementation": "flash_attention_2", "device": "cpu"},
            "must be sdpa or eager on cpu",
        ),
        ({"device": "gpu"}, "device must be auto, .* got 'gpu'"),
        ({"device": "cuda:99"}, "device must be auto, .* got 'cuda:99'"),
        ({"device_map": {"model": "disk"}}, "device_map must .* got 'disk'"),
        ({"protocol": "papers"}, "protocol 'papers' is unknown. Did you mean 'paper'"),
        ({"protocol": "paper"}, "image_aspect_ratio is 'anyres', got 'paper' with 'pad'"),
        ({"model_base": "vicuna"}, "model_base was given, but .* neither an adapter nor a proj"),
    ],
)
def test_argument_errors(arguments, message):
    _fails(message, V15, **arguments)


def test_flash_attention_and_accelerate_hints(monkeypatch):
    from llava_todre.model import placement

    monkeypatch.setattr(placement.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TodreError, match=r"needs flash-attn: pip install"):
        placement.check_attention("flash_attention_2", torch.device("cuda"))
    with pytest.raises(TodreError, match="needs accelerate: pip install"):
        placement.target_device("auto", "auto")


def test_path_errors(tmp_path):
    _fails("does not exist; give a directory or a hub id", tmp_path / "none")
    _fails("is a file", V16 / "config.json")
    _fails(r"has no config.json", tmp_path)
    _fails("cannot be reached, nor is it in the local cache", "liuhaotian/llava-v1.5-7b")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub.RepositoryNotFoundError, "there is no such repository"),
        (hub.GatedRepoError, "it is gated"),
        (hub.RevisionNotFoundError, "it has no revision 'v9'"),
        (hub.HFValidationError, "download failed: because"),
        (ConnectionResetError, "download failed: because"),
    ],
)
def test_hub_errors(error, message, monkeypatch):
    def fail(*args, **kwargs):
        if issubclass(error, hub.HfHubHTTPError):
            caught = error.__new__(error)  # its constructor needs a whole HTTP response
            caught.args = ("because\nmore",)
            raise caught
        raise error("because\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    _fails(message, "owner/name", revision="v9")


def test_hub_download_asks_for_one_kind_of_weights(monkeypatch):
    asked = {}

    def info(self, name, revision=None):
        files = ["config.json", "pytorch_model.bin", "model.safetensors"]
        files = files[: 3 if revision == "safe" else 2]
        return type("Info", (), {"siblings": [type("F", (), {"rfilename": f}) for f in files]})

    def download(name, revision, allow_patterns):
        asked[name, revision] = allow_patterns
        return str(V16 if name == "a/llava" else GOLDEN / "clip-v16")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for revision in ("safe", None):
        _check(load_pretrained_model("a/llava", revision=revision), "v16")
    assert "*.safetensors" in asked["a/llava", "safe"]
    assert "pytorch_model*.bin" not in asked["a/llava", "safe"]
    assert "pytorch_model*.bin" in asked["a/llava", None]


def test_tower_from_the_hub_without_weights_when_embedded(monkeypatch, tmp_path):
    folder = _copy(V16, tmp_path / "hub", mm_vision_tower="openai/clip")
    asked = []

    def download(name, revision, allow_patterns):
        asked.append((name, allow_patterns))
        return str(GOLDEN / "clip-v16")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    _check(load_pretrained_model(folder), "v16")
    [(name, patterns)] = asked
    assert name == "openai/clip"
    assert not any("safetensors" in pattern or "bin" in pattern for pattern in patterns)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2"}, "LLaVA checkpoint: model_type must .*llava_llama.* got 'qwen2'"),
        ({"mm_vision_tower": None}, "'llava_llama' without mm_vision_tower"),
        ({"mm_vision_tower": "../none"}, "mm_vision_tower '../none' does not exist"),
        ({"mm_projector_type": "mlp2x_relu"}, "mm_projector_type must .* got 'mlp2x_relu'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end must be false, got true"),
        (
            {"model_type": "llava_mistral", "sliding_window": 99},
            "sliding_window must be null, got 99",
        ),
        ({"hidden_size": "wide"}, "config.json: hidden_size must be"),
        (
            {"vocab_size": 500},
            r"2 of wrong shape \(.*embed_tokens.weight \(400, 64\) instead of \(500, 64\)",
        ),
        (
            {"num_hidden_layers": 9},
            r"do not fit its config: 9 missing \(model.layers.8.*, \.\.\.\)",
        ),
        ({"num_hidden_layers": 7}, r"9 unexpected \(model.layers.7"),
    ],
)
def test_config_errors(changes, message, tmp_path):
    _fails(message, _copy(V16, tmp_path / "broken", **changes))


def test_linear_projector(tmp_path):
    folder = _copy(V15, tmp_path / "linear", mm_projector_type="linear")

    def linear(tensors):
        kept = {k: v for k, v in tensors.items() if "mm_projector.2" not in k}
        return {k.replace("mm_projector.0", "mm_projector"): v for k, v in kept.items()}

    _tensors(folder, linear)
    _, model, *_ = load_pretrained_model(folder)
    assert model.model.mm_projector.weight.shape == (64, 32)


def _write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def _halve(name):
    def change(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return change


def _unlink(name):
    return lambda folder: (folder / name).unlink()


def _as_bin(content, cut=None):
    def change(folder):
        (folder / "model.safetensors").unlink()
        torch.save(content, folder / "pytorch_model.bin")
        data = (folder / "pytorch_model.bin").read_bytes()
        (folder / "pytorch_model.bin").write_bytes(data[:cut])

    return change


def _of_tower(name, **changes):
    return lambda folder: _edit(folder / "vision_tower" / name, changes)


def _missing_shard(folder):
    _shard(folder, "safetensors", save_file)
    (folder / "model-00002-of-00002.safetensors").unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_write("config.json", b"{"), "config.json is not readable JSON"),
        (_write("config.json", b"[]"), "must hold a JSON object, got list"),
        (_unlink("model.safetensors"), "has no weights; one of"),
        (_halve("model.safetensors"), "model.safetensors is damaged or cut short"),
        (_write("model.safetensors", b""), "model.safetensors is damaged or cut short"),
        (_as_bin({"a": torch.zeros(9)}, cut=300), "pytorch_model.bin is damaged or cut short"),
        (_as_bin({"a": Path()}), "pytorch_model.bin .*more than tensors"),
        (_as_bin({"a": 1}), "must hold a dictionary of tensors"),
        (_missing_shard, "lists model-00002-of-00002.safetensors, but that file is missing"),
        (_write("model.safetensors.index.json", b"{}"), "has no weight_map"),
        (_unlink("tokenizer.model"), "has no tokenizer; one of"),
        (_write("tokenizer.model", b"no model"), "the tokenizer in .* does not load"),
        (_unlink("vision_tower/config.json"), "vision_tower has no config.json"),
        (_unlink("vision_tower/preprocessor_config.json"), "no preprocessor_config.json in"),
        (
            _of_tower("preprocessor_config.json", crop_size={"height": 28, "width": 28}),
            "needs a shortest_edge and a crop of 56 x 56",
        ),
        (
            _of_tower("preprocessor_config.json", size={"height": 56, "width": 56}),
            "needs a shortest_edge and a crop of 56 x 56",
        ),
        (
            _of_tower("config.json", model_type="siglip_vision_model"),
            "vision tower must .* got 'siglip_vision_model'",
        ),
    ],
)
def test_damaged_files(change, message, tmp_path):
    folder = _copy(V16, tmp_path / "broken")
    change(folder)
    _fails(message, folder)


# ------------------------------------------------------------------ names alone


@pytest.mark.parametrize(
    ("layout", "name", "ours"),
    [
        ("original", "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("original", TOWER_PREFIX + "vision_model.encoder.x", TOWER_PREFIX + "encoder.x"),
        ("original", TOWER_PREFIX + "encoder.x", TOWER_PREFIX + "encoder.x"),
        ("original", "model.layers.0.self_attn.rotary_emb.inv_freq", None),
        ("tower", "vision_model.pre_layrnorm.bias", TOWER_PREFIX + "pre_layrnorm.bias"),
        ("tower", "encoder.layers.0.x", TOWER_PREFIX + "encoder.layers.0.x"),
        ("tower", "text_model.encoder.x", None),
        ("tower", "visual_projection.weight", None),
        ("tower", "vision_model.embeddings.position_ids", None),
        ("hf", "vision_tower.vision_model.encoder.x", TOWER_PREFIX + "encoder.x"),
        ("hf", "model.vision_tower.encoder.x", TOWER_PREFIX + "encoder.x"),
        ("hf", "language_model.model.norm.weight", "model.norm.weight"),
        ("hf", "model.language_model.norm.weight", "model.norm.weight"),
        ("hf", "language_model.lm_head.weight", "lm_head.weight"),
        ("hf", "lm_head.weight", "lm_head.weight"),
        ("hf", "image_newline", "model.image_newline"),
        ("hf", "model.multi_modal_projector.linear_2.bias", "model.mm_projector.2.bias"),
    ],
)
def test_names(layout, name, ours):
    assert rename(name, layout) == ours


def test_vision_config_of_openai_clip_fills_in_defaults():
    nested = {"hidden_size": 1024, "num_attention_heads": 16, "image_size": 336}
    config = vision_config({"model_type": "clip", "vision_config": nested})
    assert config["image_size"] == 336
    assert config["layer_norm_eps"] == 1e-5
    with pytest.raises(TodreError, match="vision tower's config is not usable: .*multiple of"):
        vision_config({"hidden_size": 7})
