"""The template a checkpoint was made for: its own, or what its name and config suggest."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from llava_todre import Request, TodreError, answer, load_pretrained_model
from llava_todre.model import chat_template
from llava_todre.model.chat_template import (
    find_template,
    own_template,
    planned_template,
    suggested_template,
)
from llava_todre.model.export_hf import save_as_hf
from llava_todre.model.export_template import as_jinja
from llava_todre.model.prompt import build_prompt, conv_templates, tokenizer_image_token

GOLDEN = Path(__file__).parents[1] / "golden"

# As published: of Llama 3, of Mistral, of Nous-Hermes-2-Yi, and of llava-hf's processors.
LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim "
    "+ '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != "
    "(loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ message['content'] + eos_token}}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAVA_HF = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@pytest.fixture
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(GOLDEN / "llava-v1.6-tiny", config=LlamaConfig())


@pytest.mark.parametrize(
    ("jinja", "prompt", "stop"),
    [
        (
            LLAMA_3,
            "<|start_header_id|>user<|end_header_id|>\n\n<image> <image>\nq<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "<|eot_id|>",
        ),
        (MISTRAL, "[INST] <image> <image>\nq [/INST]", None),
        (
            CHATML,
            "<|im_start|>user\n<image> <image>\nq<|im_end|>\n<|im_start|>assistant\n",
            "<|im_end|>",
        ),
        (LLAVA_HF, "USER: <image>\n<image>\nq ASSISTANT:", None),
    ],
)
def test_own_templates_are_learned_as_published(
    jinja: str, prompt: str, stop: str | None, tokenizer: Any
) -> None:
    tokenizer.chat_template = jinja
    learned = own_template(tokenizer)
    assert build_prompt("q", 2, learned) == prompt
    assert learned.stop == stop
    said = "q" if jinja != LLAVA_HF else [{"type": "text", "text": "q"}]
    written = tokenizer.apply_chat_template(
        [{"role": "user", "content": said}], tokenize=False, add_generation_prompt=True
    )
    assert build_prompt("q", 0, learned) == written.removeprefix("<s>")


def parts(*items: str | None) -> dict[str, Any]:
    """Return a message of the user; None is an image."""
    known = [{"type": "image"} if i is None else {"type": "text", "text": i} for i in items]
    return {"role": "user", "content": known}


@pytest.mark.parametrize("name", conv_templates)
def test_jinja_writes_what_the_template_writes(name: str, tokenizer: Any) -> None:
    template = conv_templates[name]
    tokenizer.chat_template = as_jinja(template)

    def written(*messages: dict[str, Any]) -> str:
        text = tokenizer.apply_chat_template([*messages], tokenize=False)
        assert text.startswith("<s>")
        return str(text.removeprefix("<s>"))

    for images in ([], [None], [None, None]):
        assert written(parts(*images, "q")) == build_prompt("q", len(images), name)
    assert written({"role": "user", "content": "q"}) == build_prompt("q", 0, name)
    assert written(parts("the", None, "says ?")) == build_prompt("the <image> says ?", 1, name)
    assert written(parts("what is", None)) == build_prompt("what is <image>", 1, name)

    conversation = template.copy()
    for text in ("one", "two", "three", None):
        conversation.append_message("", text)
    turns = [parts("one"), {"role": "assistant", "content": "two"}, parts("three")]
    assert written(*turns) == conversation.get_prompt()

    learned = own_template(tokenizer)
    assert learned is template or name == "plain"
    for images in (0, 1, 3):
        assert build_prompt("q", images, learned) == build_prompt("q", images, name)

    system = {"role": "system", "content": "Be kind."}
    if "{system}" in template.first:
        expected = template.first.replace("{system}", "Be kind.")
        assert written(system, parts("q")).startswith(expected)
    else:
        with pytest.raises(Exception, match="knows no system prompt"):
            written(system, parts("q"))


@pytest.mark.parametrize(
    ("name", "suggested"),
    [
        ("liuhaotian/llava-v1.5-7b", "vicuna_v1"),
        ("llava-hf/llava-1.5-13b-hf", "vicuna_v1"),
        ("liuhaotian/llava-v1.6-vicuna-13b", "vicuna_v1"),
        ("/data/llava-v1.6-mistral-7b/", "mistral_instruct"),
        ("llava-hf/llava-v1.6-mistral-7b-hf", "mistral_instruct"),
        ("liuhaotian/llava-v1.6-34b", "chatml_direct"),
        ("llava-hf/llava-v1.6-34b-hf", "chatml_direct"),
        ("lmms-lab/llama3-llava-next-8b", "llava_llama_3"),
        ("someone/LLaVA-Meta-Llama-3-8B", "llava_llama_3"),
        ("someone/tinyllama-33m", None),
        ("liuhaotian/llava-llama-2-13b-chat-lightning-preview", "llava_llama_2"),
        ("checkpoints/mini", None),
        ("mistral/some-llava", None),
        ("runs/llava-v1.6-mistral-7b/checkpoint-500", "mistral_instruct"),
        ("hub/models--lmms-lab--llama3-llava-next-8b/snapshots/0f1e2d", "llava_llama_3"),
    ],
)
def test_a_name_suggests_what_the_scripts_of_llava_take(name: str, suggested: str | None) -> None:
    assert suggested_template(name) == suggested
    assert planned_template(name, None) == (suggested or "auto")


def test_config_and_vocabulary_suggest_where_the_name_does_not() -> None:
    assert suggested_template("x", {"model_type": "llava_mistral"}) == "mistral_instruct"
    hf = {"model_type": "llava_next", "text_config": {"model_type": "mistral"}}
    assert suggested_template("x", hf) == "mistral_instruct"
    assert suggested_template("bakLlava-v1-hf", hf) == "vicuna_v1"
    assert suggested_template("x", {}, {"<|start_header_id|>": 5}) == "llava_llama_3"


class Tiny:
    """What :func:`find_template` reads of a model."""

    name_or_path = "x"

    def __init__(self, suggested: str | None) -> None:
        self.suggested_template = suggested


def test_auto_is_the_own_template_then_the_suggested_one_then_vicuna(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    chat_template._warn.cache_clear()
    assert find_template("auto", Tiny(None), tokenizer) is conv_templates["vicuna_v1"]
    mistral = Tiny("mistral_instruct")
    assert find_template("auto", mistral, tokenizer) is conv_templates["mistral_instruct"]
    tokenizer.chat_template = MISTRAL
    assert build_prompt("q", 1, find_template("auto", mistral, tokenizer)) == (
        "[INST] <image>\nq [/INST]"
    )
    assert caplog.text == "", "what is used is what the name suggests"
    for _ in range(2):
        find_template("vicuna_v1", mistral, tokenizer)
        find_template("auto", Tiny("vicuna_v1"), tokenizer)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2, "once each"
    assert "suggests template 'mistral_instruct'; used is 'vicuna_v1'" in caplog.messages[0]
    assert "suggests template 'vicuna_v1'; used is the chat template" in caplog.messages[1]
    with pytest.raises(TodreError, match="template 'vicuna' is unknown. Did you mean 'vicuna_v1'"):
        find_template("vicuna", mistral, tokenizer)


@pytest.mark.parametrize(
    ("jinja", "reason"),
    [
        ("{{ bos_token }}Hello", "leaves out"),
        ("{% if %}", "Expected an expression"),
        ("{{ raise_exception('not today') }}", "not today"),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_one_line(
    jinja: str, reason: str, tokenizer: Any
) -> None:
    tokenizer.chat_template = jinja
    with pytest.raises(TodreError, match=reason) as caught:
        find_template("auto", Tiny(None), tokenizer)
    assert "\n" not in str(caught.value)
    assert find_template("plain", Tiny(None), tokenizer) is conv_templates["plain"]


# ---------------------------------------------------------------------- whole checkpoints

SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>"]
SPECIAL += ["<|end_header_id|>", "<|eot_id|>"]


def llama_3(folder: Path, name: str) -> Path:
    """Save the golden LLaVA-NeXT with a tokenizer of Llama 3's kind: no padding, no unknown."""
    shutil.copytree(GOLDEN / "clip-v16", folder / "clip-v16", dirs_exist_ok=True)
    out = folder / name
    shutil.copytree(GOLDEN / "llava-v1.6-tiny", out)
    for file in ("tokenizer.model", "special_tokens_map.json"):
        (out / file).unlink()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: number for number, word in enumerate([*letters, *SPECIAL])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    begin = (SPECIAL[0], vocabulary[SPECIAL[0]])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[0]} $A", special_tokens=[begin]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SPECIAL[0], eos_token=SPECIAL[1]
    ).save_pretrained(out)
    settings = {"bos_token_id": begin[1], "eos_token_id": vocabulary[SPECIAL[1]]}
    (out / "generation_config.json").write_text(json.dumps(settings))
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | settings | {"pad_token_id": None}))
    return out


@pytest.mark.parametrize("name", ["llama3-llava-next-tiny", "mine"])
def test_llama_3_has_its_template_ends_its_answers_and_converts(name: str, tmp_path: Path) -> None:
    tokenizer, model, _, _ = load_pretrained_model(llama_3(tmp_path, name))
    template = find_template("auto", model, tokenizer)
    assert template is conv_templates["llava_llama_3"]
    end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    lengths = []

    def spy(*given: Any, **options: Any) -> torch.Tensor:
        output = type(model).generate(model, *given, **options)
        lengths.append(output.shape[1])
        return output

    def ends_third(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        word = end if ids.shape[1] == 2 else ord("a")
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor(word), 0.0)

    model.generate = spy
    image = GOLDEN / "v16_0.png"
    (given,) = answer(
        model,
        tokenizer,
        [Request("what", [image])],
        max_new_tokens=9,
        logits_processor=[ends_third],
    )
    assert lengths == [3] and len(given.text) == 2

    del model.generate
    save_as_hf(model, tokenizer, tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [tokenizer.eos_token_id, end]
    again, reread, _, _ = load_pretrained_model(tmp_path / "out")
    assert again.pad_token == tokenizer.eos_token and reread.config.vocab_size == 400
    for images in (0, 1, 2):
        prompt = build_prompt("what\nis it", images, template)
        own = find_template("auto", reread, again)
        assert build_prompt("what\nis it", images, own) == prompt
        ids = tokenizer_image_token(prompt, tokenizer)
        assert tokenizer_image_token(prompt, again) == ids
        written = again(f"<|begin_of_text|>{prompt}", add_special_tokens=False).input_ids
        image_id = again.convert_tokens_to_ids("<image>")
        assert [-200 if each == image_id else each for each in written] == ids


def test_the_own_template_of_a_folder_is_found_in_any_of_its_places(tmp_path: Path) -> None:
    for place, content in (
        ("chat_template.jinja", LLAVA_HF),
        ("chat_template.json", json.dumps({"chat_template": LLAVA_HF})),
        ("tokenizer_config.json", None),
    ):
        folder = llama_3(tmp_path, place)
        assert planned_template(str(folder), folder) == "llava_llama_3"
        if content is None:
            settings = json.loads((folder / place).read_text())
            content = json.dumps(settings | {"chat_template": LLAVA_HF})
        (folder / place).write_text(content)
        assert planned_template(str(folder), folder) == "auto"
        tokenizer, model, _, _ = load_pretrained_model(folder)
        template = find_template("auto", model, tokenizer)
        assert build_prompt("q", 1, template) == "USER: <image>\nq ASSISTANT:"


def test_an_unknown_aspect_ratio_is_refused(tmp_path: Path) -> None:
    folder = llama_3(tmp_path, "mine")
    raw = json.loads((folder / "config.json").read_text())
    for mode in ("anyres_max_9", "crop", "", 5, ["pad"]):
        (folder / "config.json").write_text(json.dumps(raw | {"image_aspect_ratio": mode}))
        with pytest.raises(
            TodreError, match="image_aspect_ratio must be one of anyres, pad, square, got"
        ):
            load_pretrained_model(folder)
