"""The Python API refuses what it cannot use with one TodreError of one line.

Arguments and tensors of ``generate``: ``model/test_generate_arguments.py``.
"""

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
ARGUMENTS: list[dict[str, Any]] = [
    {"no_such_argument": 1},
    {"template": "vicuna"},
    {"template": 3},
    {"max_new_tokens": None},
    {"max_new_tokens": 0},
    {"num_return_sequences": 2},
]


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS.keys())
def test_questions(question: Any, loaded: Any) -> None:
    tokenizer, model, *_ = loaded
    refused(lambda: ask(model, tokenizer, IMAGE, question, max_new_tokens=1))


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_arguments(arguments: dict[str, Any], loaded: Any) -> None:
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


PICTURES: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "bytes": lambda: IMAGE.read_bytes(),
    "NUL in the path": lambda: "a\0b.png",
    "infinite pixels": lambda: Image.fromarray(np.full((30, 30), np.inf, np.float32)),
}
"""What else shows nothing: ``model/test_rgb.py``."""


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
