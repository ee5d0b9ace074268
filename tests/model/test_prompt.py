"""Prompts and token ids must be those of the original code (tests/golden)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from llava_todre.errors import TodreError
from llava_todre.model.prompt import (
    IMAGE_TOKEN_INDEX,
    build_prompt,
    conv_templates,
    tokenizer_image_token,
)

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = [
    (variant, index, case)
    for variant in ("v15", "v16")
    for index, case in enumerate(json.loads((GOLDEN / f"{variant}_cases.json").read_text()))
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(GOLDEN / "llava-v1.6-tiny")


@pytest.mark.parametrize(("variant", "index", "case"), CASES)
def test_golden_prompt_and_ids(variant, index, case, tokenizer):
    question = case["prompt"].split("<image>\n")[1].removesuffix(" ASSISTANT:")
    assert build_prompt(question, 1) == case["prompt"]
    assert build_prompt("<image>\n" + question, 1) == case["prompt"]
    expected = load_file(GOLDEN / f"{variant}_expected.safetensors")[f"{index}.input_ids"]
    ids = tokenizer_image_token(case["prompt"], tokenizer, return_tensors="pt")
    assert ids.dtype == torch.long
    assert torch.equal(ids, expected[0])


def test_pieces_equal_sentencepiece(tokenizer):
    """The space in front of a piece survives, as with the original's slow tokenizer."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pieces = ["a cat", " what", "  is", " ", "", "\nin", "\n \n"]
    slow = sentencepiece.SentencePieceProcessor(str(GOLDEN / "llava-v1.6-tiny/tokenizer.model"))
    expected = [tokenizer.bos_token_id, *slow.encode(pieces[0])]
    for piece in pieces[1:]:
        expected += [IMAGE_TOKEN_INDEX, *slow.encode(piece)]
    assert tokenizer_image_token("<image>".join(pieces), tokenizer) == expected


class _Words:
    """A tokenizer of words by length; with or without BOS; keeps every space."""

    def __init__(self, bos):
        self.bos_token_id = bos

    def __call__(self, text):
        start = [] if self.bos_token_id is None else [self.bos_token_id]
        ids = start + [10 + len(word) for word in text.split(" ")] if text else start
        return type("Encoding", (), {"input_ids": ids})


def test_bos_only_once_and_only_where_there_is_one():
    prompt = "a<image>bb cc<image>ddd"
    assert tokenizer_image_token(prompt, _Words(1)) == [1, 11, -200, 12, 12, -200, 13]
    assert tokenizer_image_token(prompt, _Words(None)) == [11, -200, 12, 12, -200, 13]
    assert tokenizer_image_token("<image>", _Words(1), image_token_index=-7) == [1, -7]
    assert tokenizer_image_token("<image>a", _Words(None)) == [-200, 11]
    assert tokenizer_image_token("<image> a", _Words(1))[2:] == [10, 11]


def _written(name, turns):
    conversation = conv_templates[name].copy()
    for index, text in enumerate(turns):
        conversation.append_message(conversation.roles[index % 2], text)
    return conversation.get_prompt()


def test_templates():
    turns = ["one", "two", "three", None]
    assert _written("vicuna_v1", turns).endswith(
        "questions. USER: one ASSISTANT: two</s>USER: three ASSISTANT:"
    )
    llama = _written("llava_llama_2", turns)
    assert llama.startswith("[INST] <<SYS>>\nYou are a helpful language and vision assistant. ")
    assert llama.endswith(
        "natural language.\n<</SYS>>\n\none [/INST] two </s><s>[INST] three [/INST]"
    )
    assert _written("mistral_instruct", turns) == "[INST] one [/INST] two </s>[INST] three [/INST]"
    assert _written("chatml_direct", turns) == (
        "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\none<|im_end|>"
        "<|im_start|>assistant\ntwo<|im_end|><|im_start|>user\nthree<|im_end|>"
        "<|im_start|>assistant\n"
    )
    assert _written("plain", ["<image>", "a cat"]) == "<image>\na cat\n"


def test_conversations_are_independent():
    first = conv_templates["vicuna_v1"].copy()
    first.append_message(first.roles[0], "one")
    second = first.copy()
    second.append_message(second.roles[1], "two")
    assert len(first.messages) == 1
    assert conv_templates["vicuna_v1"].copy().messages == []


def test_build_prompt_places_images():
    assert "USER: <image> <image>\nwhat ASSISTANT:" in build_prompt("what", 2)
    assert "USER: first <image>, then <image> ASSISTANT:" in build_prompt(
        "first <image>, then <image>", 2
    )
    assert "<image>" not in build_prompt("what", 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", 1), "question '' is empty"),
        (("<image>\n ", 1), "is empty"),
        (("<image> what", 2), r"contains 1 <image> but 2 image"),
        (("<image> what", 0), r"contains 1 <image> but 0 image"),
        (("what", 1, "vicuna"), "template 'vicuna' is unknown. Did you mean 'vicuna_v1'"),
    ],
)
def test_build_prompt_errors(arguments, message):
    with pytest.raises(TodreError, match=message):
        build_prompt(*arguments)


def test_return_tensors_is_checked(tokenizer):
    with pytest.raises(TodreError, match="return_tensors 'np' is unknown"):
        tokenizer_image_token("a", tokenizer, return_tensors="np")
