"""CLIP's text tower against transformers' own CLIP, from a tiny checkpoint made on the spot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VISION, randomise, selected
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from llava_todre.errors import TodreError
from llava_todre.model.clip_text import ClipText
from llava_todre.model.llava import LlavaLlamaForCausalLM
from llava_todre.pruners import create_pruner

IDS = torch.tensor([[1, 5, -200, 7, 8]])
LENGTH = 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz?"
    marks = ["<|startoftext|>", "<|endoftext|>"]
    words = [*letters, *(letter + "</w>" for letter in letters), *marks]
    vocabulary = {word: index for index, word in enumerate(words)}
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    text = {"vocab_size": len(words), "hidden_size": 32, "intermediate_size": 64}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": LENGTH}
    text |= {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=24))
    randomise(model, seed=5)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def test_similarity_is_that_of_clip(checkpoint: Path, draw: torch.Generator) -> None:
    clip = CLIPModel.from_pretrained(checkpoint).eval()
    tokenizer = CLIPTokenizer.from_pretrained(checkpoint)
    patches = torch.randn(20, 32, generator=draw)
    got = ClipText.from_pretrained(str(checkpoint)).similarity(patches, "a red ring?")
    images = clip.visual_projection(clip.vision_model.post_layernorm(patches))
    words = clip.get_text_features(**tokenizer("a red ring?", return_tensors="pt"))
    words = getattr(words, "pooler_output", words)
    expected = torch.nn.functional.cosine_similarity(images, words)
    assert got.shape == (20, 1) and got.std() > 0.05
    torch.testing.assert_close(got[:, 0], expected, rtol=0, atol=1e-5)


def test_long_questions_are_cut_into_chunks(checkpoint: Path) -> None:
    clip = ClipText.from_pretrained(str(checkpoint))
    patches = torch.randn(3, 32)
    first, second = " ".join("a" * (LENGTH - 2)), " ".join("b" * 5)
    whole = clip.similarity(patches, f"{first} {second}")
    parts = [clip.similarity(patches, part) for part in (first, second)]
    torch.testing.assert_close(whole, torch.cat(parts, dim=1))
    assert clip.similarity(patches, "").shape == (3, 1)


def prompt(views: int = 5) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    images = [torch.randn(views, 3, 56, 56, generator=generator)]
    return {"images": images, "image_sizes": [(112, 70)], "do_sample": False, "max_new_tokens": 1}


def test_the_question_chooses_the_tokens(
    tiny_llava: Callable[..., LlavaLlamaForCausalLM], checkpoint: Path
) -> None:
    model = tiny_llava()
    model.load_clip_text(str(checkpoint))
    pruner = model.set_pruner("cdpruner", relevance="clip", retain_ratio=0.2)
    kept = []
    encoded = model.encode_images(prompt()["images"], [(112, 70)])
    assert model.clip_text is not None
    for question in ("a red ring?", "where", "a red ring?"):
        model.generate(IDS, **(prompt() | {"images": encoded}), questions=[question])
        kept.append(model.last_stats[0].images[0].keep_idx.tolist())
        features = encoded[0].vision_features
        assert features is not None
        similarity = model.clip_text.similarity(features, question)
        tokens = encoded[0].tokens()
        tokens = type(tokens)(**{**vars(tokens), "clip_similarity": similarity})
        assert selected(pruner, tokens, len(kept[-1])).indices.tolist() == kept[-1]
    assert kept[0] == kept[2] != kept[1]


def test_what_is_missing_is_named(
    tiny_llava: Callable[..., LlavaLlamaForCausalLM], checkpoint: Path, tmp_path: Path
) -> None:
    model = tiny_llava()
    with pytest.raises(TodreError, match="CDPruner needs CLIP's text tower.*load_clip_text"):
        model.set_pruner("cdpruner", relevance="clip")
    with pytest.raises(TodreError, match="clip_text"):
        model.load_clip_text(str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(TodreError, match="is not a CLIP checkpoint"):
        model.load_clip_text(str(tmp_path))
    model.load_clip_text(str(checkpoint))
    model.set_pruner(create_pruner("cdpruner", relevance="clip"))
    with pytest.raises(TodreError, match="questions must hold .* 1 prompts, .* got 0"):
        model.generate(IDS, **prompt())
