"""Golden checkpoints and what ``todre convert`` makes of them: the same ids, pixels and answers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, AutoTokenizer, LlamaConfig
from transformers.generation import GenerationConfig

from llava_todre import Request, TodreError, answer, load_pretrained_model
from llava_todre.cli import main
from llava_todre.model.export_hf import new_folder
from llava_todre.model.export_tokenizer import with_image_token
from llava_todre.model.images import process_images
from llava_todre.model.prompt import (
    IMAGE_TOKEN_INDEX,
    build_prompt,
    conv_templates,
    tokenizer_image_token,
)

GOLDEN = Path(__file__).parents[1] / "golden"
VARIANTS = ("v15", "v16")
QUESTIONS = ("what is in this picture", "how many cat is left ?\nanswer using a word", "is it left")
MORE_SIZES = [(301, 47), (17, 200), (56, 56), (500, 333)]
LEFTOVERS = {"temperature": 0.9, "top_p": 0.6, "length_penalty": 2.0, "max_length": 4096}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("converted")
    for variant in VARIANTS:
        source = ["--model", str(checkpoint(variant)), "--out", str(out / variant)]
        assert main(["convert", *source]) == 0
    return {variant: out / variant for variant in VARIANTS}


@pytest.fixture
def folder(variant: str, folders: dict[str, Path]) -> Path:
    return folders[variant]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[Path, str]]]:
    """Return ten pictures of different shapes for each variant, and a question to each."""
    made = []
    for width, height in MORE_SIZES:
        values = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
        made.append(tmp_path_factory.mktemp("pictures") / f"{width}x{height}.png")
        Image.fromarray(values).save(made[-1])
    files = {v: [GOLDEN / f"{v}_{index}.png" for index in range(6)] + made for v in VARIANTS}
    return {v: [(file, QUESTIONS[i % 3]) for i, file in enumerate(files[v])] for v in VARIANTS}


@pytest.fixture(scope="module")
def report(
    folders: dict[str, Path], asked: dict[str, list[tuple[Path, str]]]
) -> dict[str, dict[str, Any]]:
    """Return what transformers alone says to the questions, by variant."""
    script = Path(__file__).with_name("plain_transformers.py")
    given = {str(folders[v]): [[str(file), text] for file, text in asked[v]] for v in VARIANTS}
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(given)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert told["project"] == []
    return {variant: told["folders"][str(folders[variant])] for variant in VARIANTS}


def checkpoint(variant: str) -> Path:
    return GOLDEN / f"llava-v{variant[1]}.{variant[2]}-tiny"


def collapsed(ids: list[int], image_id: int) -> list[int]:
    """Return the ids with one placeholder of ours for each run of image tokens."""
    runs = groupby(IMAGE_TOKEN_INDEX if each == image_id else each for each in ids)
    return [each for value, run in runs for each in ([value] if value < 0 else run)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_alone_reads_the_same_model(
    variant: str,
    report: dict[str, dict[str, Any]],
    asked: dict[str, list[tuple[Path, str]]],
) -> None:
    told = report[variant]
    assert told["wrong_tensors"] == {}
    assert told["class"] == f"Llava{'' if variant == 'v15' else 'Next'}ForConditionalGeneration"
    tokenizer, model, processor, _ = load_pretrained_model(checkpoint(variant))
    texts = []
    for (file, question), given in zip(asked[variant], told["asked"], strict=True):
        image = Image.open(file).convert("RGB")
        ids = tokenizer_image_token(build_prompt(question, 1), tokenizer)
        assert collapsed(given["ids"], told["image_id"]) == ids
        assert collapsed(given["server_ids"], told["image_id"]) == ids
        pixels = torch.as_tensor(process_images([image], processor, model.config))
        assert given["pixels"] == sha256(pixels.numpy().tobytes()).hexdigest()
        (ours,) = answer(model, tokenizer, [Request(question, [image])], max_new_tokens=12)
        assert given["text"] == ours.text
        texts.append(ours.text)
    assert len(set(texts)) > 5, "a model that says one thing proves nothing"
    assert told["together"] == texts[:3]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_prompt_as_text_gets_the_ids_of_the_original_code(variant: str, folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    expected = load_file(GOLDEN / f"{variant}_expected.safetensors")
    for index, case in enumerate(json.loads((GOLDEN / f"{variant}_cases.json").read_text())):
        image = Image.open(GOLDEN / case["image"])
        ids = processor(text=case["prompt"], images=image)["input_ids"][0]
        given = collapsed(ids, processor.image_token_id)
        assert given == expected[f"{index}.input_ids"][0].tolist()


PIECES = ["\nwhat", " what", "  what", "what", "\n \nwhat", "", " ", "</s>what", "what</s> is"]


@pytest.mark.parametrize("legacy", [False, True])
def test_text_between_images_gets_our_ids_wherever_they_stand(legacy: bool, tmp_path: Path) -> None:
    shutil.copytree(checkpoint("v16"), tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"legacy": legacy}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, config=LlamaConfig())
    with_image_token(tokenizer).save_pretrained(tmp_path / "saved")
    converted = AutoTokenizer.from_pretrained(tmp_path / "saved")
    image_id = converted.convert_tokens_to_ids("<image>")
    texts = [f"USER: <image>{piece}" for piece in PIECES]
    texts += [f"{a}<image>{b}<image>" for a in ("a", "", "a ") for b in PIECES]
    texts += [build_prompt("what", count, name) for name in conv_templates for count in (0, 1, 3)]
    for text in texts:
        ours = tokenizer_image_token(text, tokenizer, image_id)
        assert converted(text).input_ids == ours, text
    assert len(tokenizer) == 400, "the tokenizer that was given is not changed"


def test_a_llava_hf_folder_gives_the_original_ids_in_our_class(tmp_path: Path) -> None:
    """A processor with its tokenizer does not: see the footguns."""
    ours = AutoTokenizer.from_pretrained(checkpoint("v16"), config=LlamaConfig())
    theirs = AutoTokenizer.from_pretrained(checkpoint("v16"), config=LlamaConfig())
    theirs.add_tokens(["<image>"], special_tokens=True)
    theirs.add_special_tokens({"pad_token": "<pad>"})
    theirs.save_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path, config=LlamaConfig())
    for piece in PIECES:
        text = f"USER: <image>{piece}"
        assert tokenizer_image_token(text, theirs) == tokenizer_image_token(text, ours)
    as_a_whole = theirs("USER: <image>\nwhat").input_ids
    given = collapsed(as_a_whole, theirs.convert_tokens_to_ids("<image>"))
    assert given != tokenizer_image_token("USER: <image>\nwhat", ours), "mended: tell the footguns"


@pytest.mark.parametrize("variant", VARIANTS)
def test_our_class_reads_it_back(
    variant: str, folder: Path, asked: dict[str, list[tuple[Path, str]]]
) -> None:
    requests = [Request(question, [file]) for file, question in asked[variant]]
    requests.append(Request("what <image> is <image>", requests[0].images[:1] * 2))
    texts = []
    for path in (checkpoint(variant), folder):
        tokenizer, model, _, _ = load_pretrained_model(path)
        texts.append([each.text for each in answer(model, tokenizer, requests, max_new_tokens=12)])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_was_converted_can_be_converted(folder: Path, tmp_path: Path) -> None:
    assert main(["convert", "--model", str(folder), "--out", str(tmp_path / "out")]) == 0
    for file in folder.iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name


def transformers_saves(settings: GenerationConfig, folder: Path) -> bool:
    """Return whether this release writes such settings, which came from a file; 5.17 does not."""
    try:
        settings.save_pretrained(folder)
    except ValueError:
        return False
    return True


def test_published_settings_of_generate_are_kept(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "clip-v16", tmp_path / "clip-v16")
    source = tmp_path / "source"
    shutil.copytree(checkpoint("v16"), source)
    published = json.loads((source / "generation_config.json").read_text()) | LEFTOVERS
    (source / "generation_config.json").write_text(json.dumps(published))
    assert main(["convert", "--model", str(source), "--out", str(tmp_path / "out")]) == 0
    places = ["out"]
    if transformers_saves(GenerationConfig.from_pretrained(source), tmp_path / "stock"):
        load_pretrained_model(source)[1].save_pretrained(tmp_path / "saved")
        places.append("saved")
    for written in places:
        settings = GenerationConfig.from_pretrained(tmp_path / written).to_dict()
        assert settings.items() >= LEFTOVERS.items()
        assert settings["pad_token_id"] == 0


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_conversion_that_fails_leaves_nothing(error: BaseException, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with pytest.raises((TodreError, KeyboardInterrupt)), new_folder(out) as unfinished:
        (unfinished / "model.safetensors").write_text("half")
        assert not out.exists()
        raise error
    assert [*tmp_path.rglob("*")] == [tmp_path / "deep"]
    out.mkdir()  # an empty one is fine
    with new_folder(out) as unfinished:
        (unfinished / "file").touch()
    assert [*out.parent.rglob("*")] == [out, out / "file"]
    with pytest.raises(TodreError, match="out must be a new or an empty folder"), new_folder(out):
        pass


def test_a_conversion_that_is_killed_can_be_repeated(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        with new_folder(tmp_path / "out") as unfinished:
            (unfinished / "half").touch()
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert len([*tmp_path.rglob("half")]) == 1 and not (tmp_path / "out").exists()
    with new_folder(tmp_path / "out") as unfinished:
        (unfinished / "whole").touch()
    assert [*(tmp_path / "out").iterdir()] == [tmp_path / "out" / "whole"]


def test_a_folder_that_cannot_be_written_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for out, message in (
        ("", "out must have a value or be left out, got ''"),
        ("/proc/out", "cannot be written"),
    ):
        assert main(["convert", "--model", str(checkpoint("v15")), "--out", out]) == 1
        error = capsys.readouterr().err
        assert message in error and "--debug" not in error
