"""The Python API refuses what it cannot use with one TodreError of one line."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import check_message, soon

import llava_todre as todre
from llava_todre import Request, TodreError, answer, ask, create_pruner, load_pretrained_model
from llava_todre.model.images import load_image, process_images
from llava_todre.pruners import PRUNERS
from llava_todre.video import read_clip

GOLDEN = Path(__file__).parent / "golden"
IMAGE = GOLDEN / "v16_0.png"
ODD: dict[str, Any] = {
    "nan": float("nan"),
    "a word": "x",
    "bytes": b"x",
    "a set": {1},
    "an object": object(),
    "a mapping": {"a": 1},
    "a tensor": torch.zeros(2),
}


def refused(call: Callable[[], Any]) -> None:
    """Fail unless a call raises our error, soon, with a message of one line."""
    with soon(), pytest.raises(TodreError) as caught:
        call()
    check_message(str(caught.value))


@pytest.fixture(scope="module")
def loaded() -> Any:
    return load_pretrained_model(GOLDEN / "llava-v1.6-tiny")


# ------------------------------------------------------------------------------------ methods


def option_cases() -> list[Any]:
    """Every option of every method, with values that no option takes."""
    return [
        pytest.param(name, field.name, value, id=f"{name}.{field.name}={kind}")
        for name, method in PRUNERS.items()
        for field in dataclasses.fields(method)
        for kind, value in ODD.items()
    ]


@pytest.mark.parametrize(("method", "option", "value"), option_cases())
def test_options(method: str, option: str, value: Any) -> None:
    refused(lambda: create_pruner(method, **{option: value}))


@pytest.mark.parametrize("method", [None, 3, b"todre", ["todre"], float("nan")], ids=str)
def test_methods_that_are_no_name(method: Any, loaded: Any) -> None:
    refused(lambda: create_pruner(method))
    refused(lambda: loaded[1].set_pruner(method))
    refused(lambda: todre.attach(loaded[1], method))


# ------------------------------------------------------------------------------------ questions

QUESTIONS: dict[str, Any] = {"None": None, "bytes": b"what", "a number": 3, "a list": ["what"]}
LENGTHS: dict[str, Any] = {
    "0": 0, "-1": -1, "1.5": 1.5, "nan": float("nan"), "inf": float("inf"), "text": "5",
    "None": None, "True": True, "a list": [5], "a tensor": torch.tensor([5, 6]),
}  # fmt: skip
GENERATE: dict[str, dict[str, Any]] = {
    "no such argument": {"no_such_argument": 1},
    "num_beams 0": {"num_beams": 0},
    "num_beams 100000": {"num_beams": 100_000},
    "num_beams is a word": {"num_beams": "x"},
    "temperature nan": {"do_sample": True, "temperature": float("nan")},
    "temperature 0": {"do_sample": True, "temperature": 0.0},
    "temperature is a word": {"do_sample": True, "temperature": "x"},
    "top_p 2": {"do_sample": True, "top_p": 2.0},
    "num_return_sequences": {"num_return_sequences": 2},
    "template": {"template": "vicuna"},
    "template is a number": {"template": 3},
}


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS.keys())
def test_questions(question: Any, loaded: Any) -> None:
    tokenizer, model, *_ = loaded
    refused(lambda: ask(model, tokenizer, IMAGE, question, max_new_tokens=1))


@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS.keys())
def test_max_new_tokens(length: Any, loaded: Any) -> None:
    tokenizer, model, *_ = loaded
    refused(lambda: ask(model, tokenizer, IMAGE, "what", max_new_tokens=length))


@pytest.mark.parametrize("arguments", GENERATE.values(), ids=GENERATE.keys())
def test_generate_arguments(arguments: dict[str, Any], loaded: Any) -> None:
    tokenizer, model, *_ = loaded
    refused(lambda: ask(model, tokenizer, IMAGE, "what", **({"max_new_tokens": 1} | arguments)))


def asked(*arguments: Any, **options: Any) -> Callable[[], Any]:
    return lambda: [Request(*arguments, **options)]


REQUESTS: dict[str, Callable[[], Any]] = {
    "a text": lambda: ["what"],
    "None": lambda: [None],
    "a request that is not in a list": lambda: Request("what"),
    "images is a number": asked("what", 3),
    "images holds None": asked("what", [None]),
    "images holds an array": asked("what", [np.zeros((4, 4))]),
    "images is a path": asked("what", str(IMAGE)),
    "an empty video": asked("what", [], is_video=True),
}


@pytest.mark.parametrize("requests", REQUESTS.values(), ids=REQUESTS.keys())
def test_requests(requests: Callable[[], Any], loaded: Any) -> None:
    tokenizer, model, *_ = loaded
    refused(lambda: answer(model, tokenizer, requests(), max_new_tokens=1))


# ------------------------------------------------------------------------------------ images


def closed() -> Image.Image:
    image = Image.open(IMAGE)
    image.close()
    return image


def truncated() -> Image.Image:
    import io

    return Image.open(io.BytesIO(IMAGE.read_bytes()[:3000]))


PICTURES: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "a number": lambda: 3,
    "bytes": lambda: IMAGE.read_bytes(),
    "an array": lambda: np.zeros((4, 4, 3), np.uint8),
    "a closed file": closed,
    "a truncated file": truncated,
    "no pixels": lambda: Image.new("RGB", (0, 5)),
    "NUL in the path": lambda: "a\0b.png",
    "NaN pixels": lambda: Image.fromarray(np.full((30, 30), np.nan, np.float32)),
    "infinite pixels": lambda: Image.fromarray(np.full((30, 30), np.inf, np.float32)),
}


@pytest.mark.parametrize("make", PICTURES.values(), ids=PICTURES.keys())
def test_pictures(make: Callable[[], Any], loaded: Any) -> None:
    tokenizer, model, *_ = loaded
    refused(lambda: ask(model, tokenizer, [make()], "what", max_new_tokens=1))


@pytest.mark.parametrize("path", [None, 3, 1.5, "a\0b", b"\0", ["x"]], ids=repr)
def test_load_image(path: Any) -> None:
    refused(lambda: load_image(path))


@pytest.mark.parametrize("count", [0, -1, 1.5, "x", None, float("nan")], ids=str)
def test_frames_of_a_clip(count: Any) -> None:
    refused(lambda: read_clip(str(GOLDEN.parent / "cases" / "display_matrix_90.mp4"), count))


# ------------------------------------------------------------------------------------ tensors

PIXELS: dict[str, Callable[[int], Any]] = {
    "None in a list": lambda side: [None],
    "wrong side": lambda side: torch.zeros(1, 3, side + 1, side),
    "four channels": lambda side: torch.zeros(1, 4, side, side),
    "NaN": lambda side: torch.full((1, 3, side, side), torch.nan),
    "infinite": lambda side: torch.full((1, 3, side, side), torch.inf),
    "complex": lambda side: torch.zeros(1, 3, side, side, dtype=torch.complex64),
    "a list of lists": lambda side: [[[0.0]]],
}


@pytest.mark.parametrize("make", PIXELS.values(), ids=PIXELS.keys())
def test_pixel_tensors(make: Callable[[int], Any], loaded: Any) -> None:
    _, model, *_ = loaded
    side = model.get_vision_tower().config.image_size
    ids = torch.tensor([[1, -200, 5]])
    refused(
        lambda: model.generate(ids, images=make(side), image_sizes=[(20, 20)], max_new_tokens=1)
    )


IDS: dict[str, dict[str, Any]] = {
    "no such id": {"input_ids": torch.tensor([[1, -200, 10**6]])},
    "negative id": {"input_ids": torch.tensor([[1, -200, -5]])},
    "no placeholder": {"input_ids": torch.tensor([[1, 5]])},
    "two placeholders": {"input_ids": torch.tensor([[1, -200, -200]])},
    "one row": {"input_ids": torch.tensor([1, -200, 5])},
    "mask of zeros": {"attention_mask": torch.zeros(1, 3, dtype=torch.long)},
    "mask too short": {"attention_mask": torch.ones(1, 2, dtype=torch.long)},
    "sizes missing": {"image_sizes": None},
    "sizes too many": {"image_sizes": [(20, 20), (20, 20)]},
    "size 0": {"image_sizes": [(0, 20)]},
    "size negative": {"image_sizes": [(-3, 20)]},
    "size of words": {"image_sizes": [("a", "b")]},
    "size nan": {"image_sizes": [(float("nan"), 20)]},
    "modalities unknown": {"modalities": ["audio"]},
}


@pytest.mark.parametrize("changes", IDS.values(), ids=IDS.keys())
def test_generate_tensors(changes: dict[str, Any], loaded: Any) -> None:
    _, model, *_ = loaded
    side = model.get_vision_tower().config.image_size
    given = {
        "input_ids": torch.tensor([[1, -200, 5]]),
        "images": torch.zeros(1, 3, side, side)[None].repeat(1, 2, 1, 1, 1),
        "image_sizes": [(20, 20)],
        "max_new_tokens": 1,
    } | changes
    refused(lambda: model.generate(given.pop("input_ids"), **given))


# ------------------------------------------------------------------------------------ loading

LOADING: dict[str, dict[str, Any]] = {
    "path is None": {"model_path": None},
    "path is a number": {"model_path": 3},
    "path is empty": {"model_path": ""},
    "path has a NUL": {"model_path": "a\0b"},
    "dtype is a number": {"dtype": 3},
    "dtype unknown": {"dtype": "float23"},
    "dtype of whole numbers": {"dtype": torch.int8},
    "device unknown": {"device": "nowhere"},
    "device is a number": {"device": 1.5},
    "device map unknown": {"device_map": "nowhere"},
    "device map is a list": {"device_map": [1]},
    "attention unknown": {"attn_implementation": "flash"},
    "attention is None": {"attn_implementation": None},
    "protocol unknown": {"protocol": "papr"},
    "plan unknown": {"tp_plan": "x"},
    "base without adapter": {"model_base": "no_such_folder/x"},
}


@pytest.mark.parametrize("changes", LOADING.values(), ids=LOADING.keys())
def test_loading(changes: dict[str, Any]) -> None:
    given = {"model_path": str(GOLDEN / "llava-v1.6-tiny")} | changes
    refused(lambda: load_pretrained_model(**given))


@pytest.mark.parametrize("model", [None, "x", 3, torch.nn.Linear(2, 2)], ids=lambda m: str(m)[:9])
def test_models_that_are_none(model: Any) -> None:
    refused(lambda: todre.attach(model, "todre"))
    refused(lambda: todre.detach(model))
    refused(lambda: todre.last_stats(model))


@pytest.mark.parametrize("images", [[], [None], ["x"], [3]], ids=str)
def test_process_images(images: Any, loaded: Any) -> None:
    _, model, processor, _ = loaded
    if images:
        refused(lambda: process_images(images, processor, model.config))
