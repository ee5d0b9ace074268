"""The exported checkpoint is an original LLaVA checkpoint, and transformers computes the same."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

from eval.mini.heldout import held_out_samples
from eval.mini.scenes import SeedFamily
from scripts.mini_training.card import model_card
from scripts.mini_training.checkpoint import load_checkpoint, save_checkpoint
from scripts.mini_training.evaluate import encode_images
from scripts.mini_training.network import DecoderConfig, MiniDecoder
from scripts.mini_training.packing import pack_questions
from scripts.mini_training.tokenizer import PromptEncoder
from scripts.mini_training.views import pixel_values
from scripts.mini_training.vision import VisionConfig, VisionTower

NUM_VISUAL = 336
IMAGE_TOKEN = 102


def to_transformers(directory):
    """The checkpoint in transformers' LLaVA-NeXT, with names mapped the way upstream does."""
    config = json.loads((directory / "config.json").read_text())
    vision = json.loads((directory / "vision_tower" / "config.json").read_text())
    text = LlamaConfig(**{k: v for k, v in config.items() if not k.startswith(("mm_", "image_"))})
    text.vocab_size = IMAGE_TOKEN + 1
    model = (
        LlavaNextForConditionalGeneration(
            LlavaNextConfig(
                vision_config=CLIPVisionConfig(**vision),
                text_config=text,
                image_token_index=IMAGE_TOKEN,
                projector_hidden_act="gelu",
                vision_feature_layer=-2,
                image_grid_pinpoints=config["image_grid_pinpoints"],
                tie_word_embeddings=False,
            )
        )
        .float()
        .eval()
    )
    names = {
        "model.mm_projector.0.": "model.multi_modal_projector.linear_1.",
        "model.mm_projector.2.": "model.multi_modal_projector.linear_2.",
        "model.vision_tower.vision_tower.": "model.vision_tower.",
        "model.embed_tokens": "model.language_model.embed_tokens",
        "model.layers": "model.language_model.layers",
        "model.norm": "model.language_model.norm",
    }
    target = model.state_dict()
    with safe_open(directory / "model.safetensors", "pt") as file:
        for name in file.keys():
            value = file.get_tensor(name).float()
            new = name
            for old, replacement in names.items():
                new = replacement + new[len(old) :] if new.startswith(old) else new
            if new not in target:
                new = new.replace("vision_model.", "")
            target[new][: len(value)] = value
    model.load_state_dict(target)
    return model


@torch.no_grad()
def test_transformers_gives_the_same_logits(tmp_path):
    torch.manual_seed(0)
    encoder = PromptEncoder()
    assert encoder.vocabulary_size <= IMAGE_TOKEN
    tower, decoder = (
        VisionTower(VisionConfig()),
        MiniDecoder(DecoderConfig(encoder.vocabulary_size)),
    )
    sample = held_out_samples(SeedFamily.VALIDATION, 1, 1)[0]
    image = np.asarray(sample.image)[None]
    decoder.fit_projector(encode_images(tower, image, torch.float32))
    torch.nn.init.normal_(decoder.lm_head.weight)
    save_checkpoint(tmp_path, tower, decoder)
    tower, decoder = load_checkpoint(tmp_path)
    model = to_transformers(tmp_path)
    packed = pack_questions([sample.questions], encoder)
    visual = decoder.visual_tokens(encode_images(tower, image, torch.float32))
    hidden, _ = decoder(torch.tensor(encoder.prefix), visual, packed.text)
    ours = decoder.logits(hidden)[0]
    for segment in range(len(sample.questions)):
        mine = packed.text.segments[0] == segment
        ids = [*encoder.prefix, *[IMAGE_TOKEN] * NUM_VISUAL, *packed.text.ids[0][mine].tolist()]
        theirs = model(
            input_ids=torch.tensor([ids]),
            pixel_values=pixel_values(image)[None],
            image_sizes=torch.tensor([[224, 224]]),
        ).logits[0, -int(mine.sum()) :, : encoder.vocabulary_size]
        torch.testing.assert_close(ours[mine], theirs, rtol=1e-3, atol=2e-3)


def test_names_and_size(tmp_path):
    encoder = PromptEncoder()
    tower, decoder = (
        VisionTower(VisionConfig()),
        MiniDecoder(DecoderConfig(encoder.vocabulary_size)),
    )
    save_checkpoint(tmp_path, tower, decoder)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert {str(file.get_tensor(name).dtype) for name in names} == {"torch.float16"}
    layer = "model.layers.7."
    expected = {f"{layer}self_attn.{p}_proj.weight" for p in "qkvo"}
    expected |= {f"{layer}mlp.{p}_proj.weight" for p in ("gate", "up", "down")}
    expected |= {f"{layer}{n}_layernorm.weight" for n in ("input", "post_attention")}
    assert expected == {name for name in names if name.startswith(layer)}
    assert {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.image_newline",
        "model.mm_projector.0.weight",
        "model.mm_projector.2.bias",
    } <= names
    clip = "model.vision_tower.vision_tower.vision_model."
    assert {
        clip + "embeddings.class_embedding",
        clip + "embeddings.patch_embedding.weight",
        clip + "embeddings.position_embedding.weight",
        clip + "pre_layrnorm.weight",
        clip + "encoder.layers.4.self_attn.out_proj.bias",
        clip + "post_layernorm.bias",
    } <= names
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 12e6
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.unk_token == "<unk>" and tokenizer.padding_side == "right"


def test_the_card_is_what_the_generator_writes_and_notes_of_the_run():
    checkpoint = Path(__file__).parents[2] / "checkpoints" / "mini"
    written = set((checkpoint / "README.md").read_text().splitlines())
    assert set(model_card(checkpoint).splitlines()) <= written
