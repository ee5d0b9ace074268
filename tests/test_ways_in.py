"""Every way in shows the model the same picture: API, command line, page, lmms-eval, stock models.

The pictures are those of ``tests/cases``, and a clip; the model is the bundled one.
"""

from __future__ import annotations

import base64
import functools
import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_todre import (
    PRUNERS,
    ImageCache,
    Request,
    TodreError,
    answer,
    ask,
    load_pretrained_model,
    prepare,
)
from llava_todre.cli import main
from llava_todre.hf.load import load_stock_model
from llava_todre.hf.stock import StockModel
from llava_todre.model.images import load_image
from llava_todre.ui.uploads import read_upload
from llava_todre.viz import picture_of

MINI = Path(__file__).parents[1] / "checkpoints" / "mini"
CASES = Path(__file__).parent / "cases"
QUESTION = "What does the sign say?"
SIDEWAYS, UPRIGHT = CASES / "display_matrix_90.mp4", CASES / "display_matrix_90_upright.mp4"


@functools.cache
def ours() -> tuple[Any, Any]:
    tokenizer, model, *_ = load_pretrained_model(str(MINI))
    model.set_pruner("vanilla")
    return model, tokenizer


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hf") / "mini"
    assert main(["convert", "--model", str(MINI), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def stock(converted: Path) -> StockModel:
    return load_stock_model(str(converted))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    model, tokenizer = ours()
    loaded = (tokenizer, model, None, None)
    monkeypatch.setattr("llava_todre.vlm.load_pretrained_model", lambda *_, **__: loaded)

    def run(*options: str) -> dict[str, Any]:
        capsys.readouterr()
        fixed = ["generate", "--model", str(MINI), "--method", "vanilla", "--question", QUESTION]
        assert main([*fixed, "--json", *options]) == 0, capsys.readouterr().err
        return dict(json.loads(capsys.readouterr().out))

    return run


@functools.cache
def plugin(checkpoint: Path, **options: Any) -> Any:
    pytest.importorskip("lmms_eval.api.instance")
    module = importlib.import_module("llava_todre.lmms_plugin.model")
    lm = module.LlavaTodre(pretrained=str(checkpoint), method="vanilla", **options)
    lm.task_dict = {"task": {"test": [None]}}
    return lm


def plugin_answer(checkpoint: Path, visuals: Callable[[], Sequence[Any]], **options: Any) -> str:
    given = (QUESTION, {"max_new_tokens": 8}, lambda document: visuals(), 0, "task", "test")
    (text,) = plugin(checkpoint, **options).generate_until(
        [SimpleNamespace(args=given, metadata={})]
    )
    return str(text)


@pytest.mark.parametrize("name", ["orientation6.jpg", "grey16.png", "palette_alpha.png"])
def test_the_answer_is_right_whichever_way_a_picture_comes_in(
    name: str, command: Any, converted: Path, stock: StockModel, tmp_path: Path
) -> None:
    path, (model, tokenizer) = CASES / name, ours()
    uri = f"data:;base64,{base64.b64encode(path.read_bytes()).decode()}"

    def opened() -> Image.Image:
        return Image.open(path)

    def answers(given: Any, **options: Any) -> str:
        return answer(model, tokenizer, [Request(QUESTION, [given])], **options)[0].text

    found = {
        "path": ask(model, tokenizer, path, QUESTION).text,
        "data URI": ask(model, tokenizer, uri, QUESTION).text,
        "PIL": ask(model, tokenizer, opened(), QUESTION).text,
        "remembered": answers(opened(), image_cache=ImageCache()),
        "prepared": answers(prepare(model, Request("", [opened()])).images[0]),
        "page": answers(read_upload(path, 1).images[0]),
        "command line": command("--image", str(path))["answer"],
        "command line, data URI": command("--image", uri)["answer"],
        "lmms-eval": plugin_answer(MINI, lambda: [opened()]),
        "lmms-eval, stock": plugin_answer(converted, lambda: [opened()], backend="transformers"),
        "stock, path": stock.answer([Request(QUESTION, [path])])[0].text,
        "stock, data URI": stock.answer([Request(QUESTION, [uri])])[0].text,
        "stock, PIL": stock.answer([Request(QUESTION, [opened()])])[0].text,
    }
    assert found == dict.fromkeys(found, "4 9 2")


def test_kept_tokens_are_drawn_on_the_picture_as_it_is_shown() -> None:
    model, tokenizer = ours()
    exif = Image.Exif()
    exif[0x0112] = 6
    image = load_image(CASES / "orientation6_upright.jpg").resize((120, 200))
    stored = image.transpose(Image.Transpose.ROTATE_90)
    stored.info["exif"] = exif.tobytes()
    pictures = []
    for given in (image, stored):
        result = ask(model, tokenizer, given, QUESTION)
        pictures.append(np.asarray(picture_of([given], result.stats, model)))
    assert np.array_equal(*pictures)


@pytest.mark.parametrize("method", [name for name in PRUNERS if name != "downsample"])
def test_both_classes_keep_the_same_of_a_strip(method: str, stock: StockModel) -> None:
    """Of whose crops nothing is left beside the thumbnail once the padding is removed."""
    model, tokenizer = ours()
    request = Request(QUESTION, [CASES / "strip_20to1.png"])
    try:
        for each in (model, stock):
            each.set_pruner(method)
        (expected,) = answer(model, tokenizer, [request], max_new_tokens=1)
        (given,) = stock.answer([request], max_new_tokens=1)
    finally:
        for each in (model, stock):
            each.set_pruner("vanilla")
    for mine, theirs in zip(expected.stats.images, given.stats.images, strict=True):
        assert mine.keep_idx.tolist() == theirs.keep_idx.tolist()
    assert expected.stats.prompt_tokens_per_layer == given.stats.prompt_tokens_per_layer


def test_an_image_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "hf"
    source = Path(__file__).parent / "golden" / "llava-v1.5-tiny"
    assert main(["convert", "--model", str(source), "--out", str(out)]) == 0
    request = Request(QUESTION, [Image.new("RGB", (1_000_000, 1))])
    with pytest.raises(TodreError, match="too elongated"):
        load_stock_model(str(out)).answer([request])


def test_frames_are_the_same_whichever_way_a_clip_comes_in(command: Any) -> None:
    pytest.importorskip("av", reason="PyAV is not installed (make setup)")
    from llava_todre.lmms_plugin.requests import shown_of
    from llava_todre.video import read_clip

    model, tokenizer = ours()
    frames = read_clip(str(SIDEWAYS), 2).frames
    upright = read_clip(str(UPRIGHT), 2).frames
    item: Any = SimpleNamespace(doc_id=0, task="task")
    for others in (read_upload(SIDEWAYS, 2).images, shown_of(item, [str(SIDEWAYS)], 2).images):
        assert all(np.array_equal(a, b) for a, b in zip(frames, others, strict=True))
    for one, other in zip(frames, upright, strict=True):
        assert np.abs(np.asarray(one, np.int16) - np.asarray(other)).mean() < 1.5
    (expected,) = answer(model, tokenizer, [Request(QUESTION, frames, is_video=True)])
    report = command("--video", "--image", str(SIDEWAYS), "--max-frames", "2")
    assert (report["answer"], report["visual_tokens"]) == (expected.text, 128)
    assert plugin_answer(MINI, lambda: [str(SIDEWAYS)], max_frames=2) == expected.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([SIDEWAYS], "got a video (in a shell --video"),
        ([SIDEWAYS, UPRIGHT, "--video"], "got a video"),
        ([SIDEWAYS, "--video", "--fps", "2"], "fps must be left out with a video file, got 2.0"),
        ([SIDEWAYS, "--video", "--max-frames", "0"], "must be a whole number above 0, got 0"),
        ([CASES / "README.md", "--video"], "README.md' cannot be read: Invalid data"),
        ([CASES / "none.mp4", "--video"], "none.mp4' does not exist"),
        (["http://127.0.0.1:1/x.png"], "is a URL, which is fetched only with"),
        (["http://127.0.0.1:1/x.png", "--allow-urls"], "cannot be fetched"),
    ],
)
def test_the_command_line_says_what_it_does_not_read(
    options: list[Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("av", reason="PyAV is not installed (make setup)")
    fixed = ["generate", "--model", str(MINI), "--question", QUESTION, "--image"]
    assert main([*fixed, *map(str, options)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
