"""Questions to stock models through processors made of transformers' own parts.

Processors of families that also read videos need torchvision, even for images: `make
test-processors` runs these tests beside PyPI's.
"""

from __future__ import annotations

import functools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import parts
import pytest
import torch
from PIL import Image
from tiny import FAMILIES, QWEN

from eval.pages.models import MATRIX, YES
from llava_todre import VLM, Request, TodreError, hf, vlm
from llava_todre.cli import main
from llava_todre.hf.load import load_stock_model, needs_stock
from llava_todre.hf.stock import StockModel
from llava_todre.hf.video_metadata import TIMED, metadata_of
from llava_todre.lmms_plugin.requests import shown_of
from llava_todre.model.placement import target_device

OF_VIDEO = [family for family in FAMILIES if MATRIX[family]["video"] == YES]
SECONDS = (0.0, 1.0, 2.5, 4.0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return family -> the folder of a tiny checkpoint; skips what cannot be had here."""

    @functools.cache
    def folder(family: str) -> Path:
        if not parts.HAS_TORCHVISION and family not in parts.WITHOUT_TORCHVISION:
            pytest.skip("its processor needs torchvision: make test-processors")
        return parts.save_checkpoint(family, tmp_path_factory.mktemp(family))

    return folder


@pytest.fixture(scope="module")
def backend_of(saved: Any) -> Any:
    """Return family -> its model, loaded as every front end does."""

    @functools.cache
    def load(family: str) -> VLM:
        loaded = vlm.load(
            str(saved(family)), backend="transformers", device=target_device("cpu", None)
        )
        loaded.set_pruner("todre", retain_ratio=0.25, probe_depths=(0.5,), tau=1.0)
        return loaded

    return load


@functools.cache
def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    draw = np.random.default_rng(seed)
    return Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))


def frames() -> list[Image.Image]:
    return [picture(80, 60, seed) for seed in range(4)]


IMAGES = [
    Request("What is that?", [picture(90, 60)]),
    Request("Is it a dog?", [picture(60, 60), picture(120, 50)]),
    Request("No picture here."),
]


def told(model: StockModel, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return a list that gets the arguments of each ``generate``."""
    seen: list[dict[str, Any]] = []
    generate = model.model.generate

    def spy(**inputs: Any) -> Any:
        seen.append(inputs)
        return generate(**inputs)

    monkeypatch.setitem(model.model.__dict__, "generate", spy)
    return seen


def asked_directly(model: StockModel, request: Request) -> list[int]:
    """Return an answer's tokens the way the processor's own documentation asks."""
    content: list[dict[str, Any]] = [{"type": "image", "image": one} for one in request.images]
    content.append({"type": "text", "text": request.question})
    inputs = model.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with hf.prune(model.model, model.pruner):
        output = model.model.generate(**inputs, max_new_tokens=6, do_sample=False)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_images_is_answered_as_each_is_alone(family, backend_of):
    model = backend_of(family)
    given = backend_of(family).answer(IMAGES, max_new_tokens=6)
    for request, answer in zip(IMAGES, given, strict=True):
        tokens = asked_directly(model, request)
        text = model.processor.tokenizer.decode(tokens, skip_special_tokens=True)
        assert answer.text == text.strip()
        assert len(answer.stats.images) == len(request.images)
        assert answer.stats.kept_tokens < answer.stats.visual_tokens or not request.images
        if request.images:
            assert answer.stats.withdrawn_from is not None


@pytest.mark.parametrize(
    ("question", "images", "settings", "message"),
    [
        ("What?", [None], {}, "does not take this batch of 1"),
        ("What?", ["a\0b.png"], {}, "must be a path"),
        ("What?", [], {"max_new_tokens": 1.5}, r"max_new_tokens 1\.5 is out of range"),
        ("What?", [], {"max_new_tokens": "5"}, "max_new_tokens '5' is out of range"),
        ("What?", [], {"num_beams": 100_000}, "num_beams 100000 is out of range"),
        ("What?", [], {"max_new_token": 5}, "'max_new_token' is unknown. Did you mean"),
    ],
)
def test_what_cannot_be_asked_is_one_line(backend_of, question, images, settings, message):
    with pytest.raises(TodreError, match=message) as caught:
        backend_of("llava").answer([Request(question, images)], **settings)
    assert "\n" not in str(caught.value)


def test_pictures_that_cannot_be_read_are_one_line(backend_of, tmp_path):
    picture(60, 60).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "short.png").write_bytes(whole[: len(whole) // 2])
    closed = Image.open(tmp_path / "whole.png")
    closed.close()
    for image in (closed, Image.open(tmp_path / "short.png")):
        with pytest.raises(TodreError, match="image is closed"):
            backend_of("llava").answer([Request("What?", [image])])


def test_threads_get_the_statistics_of_their_own_answers(backend_of):
    backend = backend_of("llava")
    asked = [Request("What?", [picture(60, 60, seed)]) for seed in range(6)]

    def call(request: Request) -> tuple[str, list[int]]:
        (given,) = backend.answer([request], max_new_tokens=3)
        return given.text, given.stats.images[0].keep_idx.tolist()

    alone = [call(request) for request in asked]
    assert len({str(one) for one in alone}) == 6
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(call, asked * 3)) == alone * 3


@pytest.mark.parametrize("family", OF_VIDEO)
def test_a_batch_with_a_video_is_answered_as_each_is_alone(family, backend_of):
    backend = backend_of(family)
    batch = [Request("What happens?", frames(), True, SECONDS), *IMAGES]
    given = backend.answer(batch, max_new_tokens=6)
    for request, answer in zip(batch, given, strict=True):
        (alone,) = backend.answer([request], max_new_tokens=6)
        assert answer.text == alone.text
        assert answer.stats.prompt_tokens_per_layer == alone.stats.prompt_tokens_per_layer
    stats = given[0].stats
    assert len(stats.images) == (4 if family == "internvl" else 1)
    assert 0 < stats.kept_tokens < stats.visual_tokens and stats.withdrawn_from is not None


@pytest.mark.parametrize(
    ("family", "clips"), [("llava_onevision", (4, 2)), ("internvl", (4, 2)), ("qwen3_vl", (1,))]
)
def test_what_a_processor_does_not_take_is_told_in_one_line(family, clips, backend_of):
    """Several clips of unequal length, or a single frame."""
    batch = [Request("What?", frames()[:count], True, SECONDS[:count]) for count in clips]
    with pytest.raises(TodreError, match=f"does not take this batch of {len(clips)}: ") as told:
        backend_of(family).answer(batch, max_new_tokens=1)
    assert "\n" not in str(told.value)


def test_qwen3_writes_the_times_of_the_frames_that_were_sampled(backend_of, monkeypatch):
    model = backend_of("qwen3_vl")
    seen = told(model, monkeypatch)
    model.answer([Request("What?", frames(), True, SECONDS)], max_new_tokens=1)
    prompt = model.processor.tokenizer.decode(seen[0]["input_ids"][0])
    assert "<0.5 seconds>" in prompt and "<3.2 seconds>" in prompt  # of (0, 1) and (2.5, 4)
    assert prompt.count("seconds>") == 2


def test_qwen2_5_counts_the_seconds_between_the_frames(backend_of, monkeypatch):
    model = backend_of("qwen2_5_vl")
    seen = told(model, monkeypatch)
    videos = [Request("What?", frames(), True, SECONDS), Request("?", frames(), True, range(4))]
    model.answer(videos, max_new_tokens=1)
    found = torch.as_tensor(seen[0]["second_per_grid_ts"])
    assert found.tolist() == pytest.approx([2 * 4 / 3, 2.0], abs=1e-3)  # of two frames each


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "llava_onevision"])
def test_lmms_eval_and_the_shell_show_a_file_s_own_times(family, backend_of, tmp_path, capsys):
    av = pytest.importorskip("av")
    clip = tmp_path / "clip.mp4"
    with av.open(str(clip), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for i in range(10):
            frame = np.full((64, 96, 3), 25 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())
    shown = shown_of(None, [str(clip)], 4)  # type: ignore[arg-type]
    assert shown.seconds == pytest.approx([0, 0.6, 1.2, 1.8])
    backend = backend_of(family)
    request = Request("What?", shown.images, shown.is_video, shown.seconds)
    (answer,) = backend.answer([request], max_new_tokens=4)
    files = [str(tmp_path / f"{i}.png") for i in range(4)]
    for file, frame in zip(files, shown.images, strict=True):
        frame.save(file)
    command = ["generate", "--model", backend.model.config._name_or_path, "--question", "What?"]
    command += "--option tau=1.0 probe_depths=[0.5] --retain-ratio 0.25 --max-new-tokens 4".split()
    assert needs_stock(backend.model.config._name_or_path)
    command += ["--video", "--json", "--image", *files]
    assert main([*command, "--fps", str(1 / 0.6)]) == 0
    assert json.loads(capsys.readouterr().out)["answer"] == answer.text
    if family in TIMED:
        assert main(command) == 1
        assert "seconds must be 4 ascending numbers" in capsys.readouterr().err


# ---------------------------------------------------------------- without torchvision


@pytest.mark.parametrize("model_type", TIMED)
def test_metadata_say_when_frames_are_seen_and_how_far_apart_they_are(model_type):
    clips = [(0.0, 1.0, 2.5, 4.0), (3.0, 3.5), (7.25,)]
    videos = [Request("?", [picture(8, 8)] * len(clip), True, clip) for clip in clips]
    found = metadata_of(videos, model_type) or []
    assert [one.timestamps for one in found] == [list(clip) for clip in clips]
    assert [1 / one.sampled_fps for one in found] == pytest.approx([4 / 3, 0.5, 1.0], abs=1e-3)


def test_models_that_do_not_read_time_are_told_nothing():
    assert metadata_of([Request("?", [picture(8, 8)], True)], "qwen2_vl") is None


@pytest.mark.parametrize("seconds", [(), (0, 1), (0, 2, 1)])
def test_frames_without_times_of_their_own_are_an_error_of_one_line(seconds):
    videos = [Request("?", [picture(8, 8)] * 3, True, seconds)]
    with pytest.raises(TodreError, match="seconds must be 3 ascending numbers") as told:
        metadata_of(videos, "qwen3_vl")
    assert "\n" not in str(told.value)


class Recorder:
    """Stands for a processor: notes what it is asked, and answers nothing."""

    def __init__(self) -> None:
        self.tokenizer, self.given = None, {}

    def apply_chat_template(self, conversation: Any, **options: Any) -> str:
        return " ".join(part["type"] for part in conversation[0]["content"])

    def __call__(self, **given: Any) -> Any:
        self.given = given
        return given


@pytest.mark.parametrize("family", QWEN)
def test_a_processor_is_told_the_frames_and_their_times_and_not_to_choose(family):
    model = StockModel(parts.build(family), Recorder())
    video = Request("What?", frames(), True, SECONDS)
    model._inputs([IMAGES[1], video, video])
    given = model.processor.given
    assert given["text"] == ["image image text", "video text", "video text"]
    assert [len(one) for one in given["images"]] == [2] and [
        len(one) for one in given["videos"]
    ] == [4, 4]
    assert given["do_sample_frames"] is False and given["padding_side"] == "left"
    if family in TIMED:
        assert [one.timestamps for one in given["video_metadata"]] == [list(SECONDS)] * 2
    else:
        assert "video_metadata" not in given


@pytest.mark.skipif(parts.HAS_TORCHVISION, reason="nothing is missing")
def test_a_missing_torchvision_is_named_in_one_line(tmp_path):
    parts.build("qwen2_vl").save_pretrained(tmp_path)
    parts.tokenizer_of("qwen2_vl").save_pretrained(tmp_path)
    described = {
        "processor_class": "Qwen2VLProcessor",
        "image_processor": {"image_processor_type": "Qwen2VLImageProcessor"},
        "video_processor": {"video_processor_type": "Qwen2VLVideoProcessor"},
    }
    (tmp_path / "processor_config.json").write_text(json.dumps(described))
    with pytest.raises(TodreError, match="needs torchvision, also for images") as told:
        load_stock_model(str(tmp_path))
    assert "\n" not in str(told.value)


def test_frames_per_second_belong_to_a_video(capsys):
    command = ["generate", "--model", "none", "--question", "?", "--image", "none.png"]
    for wrong in (["--fps", "2"], ["--video", "--fps", "0"]):
        assert main([*command, *wrong]) == 1
        assert "fps must be a number above 0, with --video" in capsys.readouterr().err
