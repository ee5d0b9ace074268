"""The model of lmms-eval, on the bundled checkpoint and documents made here."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import json
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from eval.mini import held_out
from llava_todre import vlm
from llava_todre.cli import main
from llava_todre.errors import TodreError
from llava_todre.hf.stock import StockModel
from llava_todre.lmms_plugin import NAME
from llava_todre.lmms_plugin.answer_log import read_answers
from llava_todre.lmms_plugin.arguments import build_pruner, draws, item_seed, option, with_seed
from llava_todre.lmms_plugin.distributed import join_processes, placement
from llava_todre.lmms_plugin.fingerprint import fingerprint, weights_digest
from llava_todre.lmms_plugin.requests import cut, generation, items_of, shown_of
from llava_todre.model.load import load_pretrained_model
from llava_todre.pruners import PRUNERS, create_pruner
from llava_todre.video import read_clip
from llava_todre.vlm import OwnModel, Request, answer
from tests.conftest import visual_tokens

pytest.importorskip("accelerate")
av = pytest.importorskip("av")
Instance = pytest.importorskip("lmms_eval.api.instance").Instance
plugin = importlib.import_module("llava_todre.lmms_plugin.model")
ANSWERS = {front: front.answer for front in (OwnModel, StockModel)}
ANSWER = ANSWERS[OwnModel]

MINI = str(Path(__file__).parents[2] / "checkpoints" / "mini")
GREEDY = {"max_new_tokens": 8, "temperature": 0, "do_sample": False, "until": ["\n\n"]}
TASK, SPLIT = "shapes", "test"


load_once = functools.cache(load_pretrained_model)


@pytest.fixture(autouse=True)
def shared_model(monkeypatch):
    """Load a checkpoint once for all tests, which leave it as it was but for its pruner."""
    monkeypatch.setattr(vlm, "load_pretrained_model", load_once)


@pytest.fixture(scope="module")
def samples():
    return held_out(4)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Ten frames that grow brighter; frame i is 25 * i grey."""
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    write_clip(path, [np.full((64, 96, 3), 25 * i, np.uint8) for i in range(10)])
    return str(path)


def write_clip(path, frames):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.max_b_frames = 2  # stored in another order than shown
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def documents(samples, clip):
    """One picture, none, two, a video, and the first picture again, in new objects each time."""
    first, second = samples[0].image, samples[1].image
    asked = [samples[0].questions[1].text, samples[1].questions[2].text]
    return [
        {"visuals": lambda: [first.copy()], "question": asked[0]},
        {"visuals": lambda: [], "question": "What is one and one?"},
        {"visuals": lambda: [first.copy(), second.copy()], "question": asked[1]},
        {"visuals": lambda: [clip], "question": "What color is the ring?"},
        {"visuals": lambda: [first.copy()], "question": samples[0].questions[0].text},
        {"visuals": lambda: [second.copy()], "question": samples[1].questions[5].text},
    ]


def build(documents, **arguments):
    lm = plugin.LlavaTodre(**({"pretrained": MINI, "method": "todre"} | arguments))
    lm.task_dict = {TASK: {SPLIT: documents}}
    return lm


def requests_for(documents, only=None, gen_kwargs=None, task=TASK, **metadata):
    return [
        Instance(
            request_type="generate_until",
            arguments=(
                documents[doc_id]["question"],
                copy.deepcopy(GREEDY if gen_kwargs is None else gen_kwargs),
                lambda document: document["visuals"](),
                doc_id,
                task,
                SPLIT,
            ),
            idx=0,
            metadata={"task": task, "doc_id": doc_id, "repeats": 1} | metadata,
        )
        for doc_id in (range(len(documents)) if only is None else only)
    ]


class Calls:
    """Wraps ``answer``: records the questions of each call, and can fail at one of them."""

    def __init__(self, monkeypatch, fail_at=None, says=None, front=OwnModel):
        self.questions, self.settings, self.fail_at, self.says = [], [], fail_at, says
        self.answer = ANSWERS[front]
        monkeypatch.setattr(front, "answer", lambda *given, **more: self(*given, **more))

    def __call__(self, own, requests, **settings):
        if len(self.questions) == self.fail_at:
            raise RuntimeError("the lights went out")
        self.questions.append([request.question for request in requests])
        self.settings.append(settings)
        given = self.answer(own, requests, **settings)
        if self.says is None:
            return given
        return [dataclasses.replace(one, text=self.says) for one in given]


def lines_in(log_dir):
    files = sorted(Path(log_dir).glob("*/*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


# ---------------------------------------------------------------------- found by lmms-eval


def test_lmms_eval_finds_the_class_through_the_entry_point():
    registry = importlib.import_module("lmms_eval.models.registry_v2").ModelRegistryV2()
    registry.load_entrypoint_manifests()
    assert registry.get_model_class(NAME) is plugin.LlavaTodre
    assert registry.resolve(NAME).model_type == "simple"


def test_the_entry_point_costs_other_models_nothing():
    code = "import llava_todre.lmms_plugin, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("call", ["loglikelihood", "generate_until_multi_round"])
def test_other_kinds_of_tasks_are_refused(call):
    with pytest.raises(NotImplementedError, match="not supported"):
        getattr(plugin.LlavaTodre, call)(None, [])


# ---------------------------------------------------------------------- answers


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The bundled model for the class of transformers."""
    folder = str(tmp_path_factory.mktemp("hf") / "mini")
    assert main(["convert", "--model", MINI, "--out", folder]) == 0
    return {"pretrained": folder, "backend": "transformers"}


def test_a_stock_model_answers_as_ours_and_resumes(documents, converted, tmp_path, monkeypatch):
    pictures = [0, 1, 2, 4, 5]  # a processor of videos needs torchvision
    stock = converted | {"log_dir": tmp_path}
    for batch_size in (1, 3):
        ours = build(documents, batch_size=batch_size)
        expected = ours.generate_until(requests_for(documents, pictures))
        theirs = build(documents, batch_size=batch_size, **stock)
        assert isinstance(theirs.vlm, StockModel)
        assert theirs.generate_until(requests_for(documents, pictures)) == expected
    monkeypatch.setattr(StockModel, "answer", lambda *_, **__: 1 / 0)
    assert theirs.generate_until(requests_for(documents, pictures)) == expected, "from the log"


def test_answers_are_those_of_the_library_in_the_order_of_the_requests(documents, clip):
    lm = build(documents, retain_ratio=0.25, max_frames=4)
    order = [4, 0, 3, 1, 2, 5]
    given = lm.generate_until(requests_for(documents, order))
    lm.model.set_pruner("todre", retain_ratio=0.25)
    for doc_id, text in zip(order, given, strict=True):
        visuals = documents[doc_id]["visuals"]()
        is_video = visuals == [clip]
        asked = Request(
            documents[doc_id]["question"],
            read_clip(clip, 4).frames if is_video else visuals,
            is_video,
        )
        assert text == answer(lm.model, lm.vlm.tokenizer, [asked], max_new_tokens=8)[0].text


def test_a_batch_answers_like_single_items_and_keeps_to_equal_arguments(documents, monkeypatch):
    requests = requests_for(documents)
    for request in requests[1::2]:
        request.arguments[1]["max_new_tokens"] = 2
    single = build(documents).generate_until(requests)
    calls = Calls(monkeypatch)
    assert build(documents, batch_size="3").generate_until(requests) == single
    text = [document["question"] for document in documents]
    assert calls.questions == [text[0::2], text[1::2]]
    assert [settings["max_new_tokens"] for settings in calls.settings] == [8, 2]


def test_questions_of_several_tasks_may_share_a_batch(documents, tmp_path, monkeypatch):
    calls = Calls(monkeypatch)
    lm = build(documents, batch_size=4, log_dir=tmp_path)
    lm.task_dict["other"] = lm.task_dict[TASK]
    asked = requests_for(documents, [0]) + requests_for(documents, [0], task="other")
    lm.generate_until(asked)
    assert len(calls.questions) == 1
    assert [line["task"] for line in read_answers(tmp_path)] == ["other", TASK]
    lm.generate_until(asked)
    assert len(calls.questions) == 1, "both tasks' logs are read"


@pytest.fixture
def table(samples):
    """Four pictures, each asked about three times, in turns; stored as hub data sets are."""
    datasets = pytest.importorskip("datasets")
    columns = {
        "image": [samples[i % 4].image for i in range(12)],
        "image_width": [100 + i % 4 for i in range(12)],
        "question": [samples[i % 4].questions[i // 4].text for i in range(12)],
    }
    texts = {"image_width": datasets.Value("int64"), "question": datasets.Value("string")}
    features = datasets.Features({"image": datasets.Image(), **texts})
    return datasets.Dataset.from_dict(columns, features=features)


def ask_table(table, log_dir=None, task=TASK, **arguments):
    lm = build(table, log_dir=log_dir, **arguments)
    requests = requests_for(table, task=task)
    for request in requests:
        request.arguments = (*request.arguments[:2], lambda row: [row["image"]], *request.args[3:])
    return lm, requests


@pytest.mark.parametrize("front", [OwnModel, StockModel])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_questions_about_one_image_share_its_encoding_and_prefix(
    table, converted, monkeypatch, batch_size, front
):
    calls = Calls(monkeypatch, front=front)
    chosen = {} if front is OwnModel else converted
    lm, requests = ask_table(table, batch_size=batch_size, **chosen)
    tower = lm.model.get_vision_tower() if front is OwnModel else lm.model.model.vision_tower
    encoded = []
    with tower.register_forward_pre_hook(lambda *_: encoded.append(1)):
        answers = lm.generate_until(requests)
    order = [row + 4 * turn for row in range(4) for turn in range(3)]
    assert [q for batch in calls.questions for q in batch] == [table[i]["question"] for i in order]
    assert len(encoded) == 4
    caches = [settings["image_cache"] for settings in calls.settings]
    (cache,) = {id(each): each for each in caches}.values()
    assert cache.prefixes.hits == 8
    unknown = table.rename_column("image", "shown").remove_columns("image_width")
    fresh, requests = ask_table(unknown, batch_size=3, **chosen)
    for request in requests:
        request.arguments = (*request.args[:2], lambda row: [row["shown"]], *request.args[3:])
    assert answers == fresh.generate_until(requests)
    assert all(settings["image_cache"] is None for settings in calls.settings[len(caches) :])


def test_a_picture_asked_about_once_is_answered_in_the_usual_way(table, monkeypatch):
    calls = Calls(monkeypatch)
    lm, requests = ask_table(table.select(range(4)), batch_size=4)
    lm.generate_until(requests)
    assert len(calls.questions) == 1 and calls.settings[0]["image_cache"] is None


def test_how_an_answer_is_computed_does_not_depend_on_limit_or_share(table, monkeypatch):
    calls = Calls(monkeypatch)
    lm, requests = ask_table(table, batch_size=4)
    lm.generate_until(requests[:4])  # each picture once
    lm.generate_until(requests[::2])
    assert [settings["image_cache"] is None for settings in calls.settings] == [False] * 3


@pytest.mark.parametrize("fail_at", [2, 3, 5])
def test_a_run_stopped_between_questions_about_one_picture_ends_alike(
    table, tmp_path, monkeypatch, fail_at
):
    def lines(folder):
        lm, requests = ask_table(table, batch_size=2, log_dir=folder)
        lm.generate_until(requests)
        return without_times(read_answers(folder))

    whole = lines(tmp_path / "whole")
    shown = Counter(line["pictures"] for line in whole)
    assert len(shown) == 4 and set(shown.values()) == {3}, "items about one picture share its name"
    with monkeypatch.context() as patch:
        Calls(patch, fail_at=fail_at)
        with pytest.raises(RuntimeError):
            lines(tmp_path / "stopped")
    assert len(read_answers(tmp_path / "stopped")) < 12
    assert lines(tmp_path / "stopped") == whole


def test_the_next_pictures_are_prepared_while_the_model_answers(documents, monkeypatch):
    started, ready = threading.Event(), threading.Event()
    lm = build(documents, batch_size=1)
    prepare = lm._prepare

    def spy(batch):
        if batch.items[0].doc_id == 1:
            assert started.wait(10), "the model does not wait for the second document"
            ready.set()
        return prepare(batch)

    def slow(*given, **settings):
        started.set()
        assert ready.wait(10), "the second document was not looked at meanwhile"
        return ANSWER(*given, **settings)

    monkeypatch.setattr(lm, "_prepare", spy)
    monkeypatch.setattr(OwnModel, "answer", slow)
    lm.generate_until(requests_for(documents, [0, 1]))


def test_equal_pictures_of_a_batch_are_encoded_once(documents, monkeypatch):
    lm = build(documents, batch_size=3)
    seen = []
    encode = lm.model.encode_images
    monkeypatch.setattr(
        lm.model,
        "encode_images",
        lambda images, *rest: seen.append(images := list(images)) or encode(images, *rest),
    )
    lm.generate_until(requests_for(documents, [0, 4, 2]))
    assert len(seen[0]) == 2  # of four pictures


def test_generation_arguments_are_not_changed(documents, tmp_path):
    requests = requests_for(documents, gen_kwargs=GREEDY | {"until": "\n", "num_beams": 1})
    before = [copy.deepcopy(request.arguments[1]) for request in requests]
    build(documents, batch_size=2, log_dir=str(tmp_path)).generate_until(requests)
    assert [request.arguments[1] for request in requests] == before


def test_what_a_task_says_becomes_arguments_of_generate():
    assert generation({}, 1024) == ({"max_new_tokens": 1024, "do_sample": False}, ())
    cold = {"temperature": 0, "top_p": 0.9, "do_sample": True, "num_beams": 2, "until": None}
    expected = {"max_new_tokens": 7, "do_sample": False, "num_beams": 2}
    assert generation(cold | {"image_aspect_ratio": "original"}, 7) == (expected, ())
    warm = {"temperature": 0.5, "top_p": 0.9, "top_k": None, "max_new_tokens": 3, "until": "."}
    expected = {"max_new_tokens": 3, "do_sample": True, "temperature": 0.5, "top_p": 0.9}
    assert generation(warm, 7) == (expected, (".",))
    with pytest.raises(TodreError, match=r"generation argument 'num_beam' .* mean 'num_beams'"):
        generation({"num_beam": 2}, 7)


def test_an_answer_ends_before_the_first_end_string():
    assert cut("blue. It is red\n\nSo", ("\n\n", ".")) == "blue"
    assert cut("left ", ("", "right")) == "left"


def test_end_strings_and_the_longest_answer_reach_the_model(documents, monkeypatch):
    calls = Calls(monkeypatch, says="one two three")
    lm = build(documents, max_new_tokens=5)
    assert lm.generate_until(requests_for(documents, [0], {"until": [" three"]})) == ["one two"]
    (settings,) = calls.settings
    assert settings.pop("image_cache") is None
    assert settings == {"max_new_tokens": 5, "do_sample": False}


def test_sampled_answers_repeat_with_the_seed(documents):
    warm = {"max_new_tokens": 8, "temperature": 5.0}
    drawn = []
    for seed in (0, 0, 1):
        lm = build(documents, batch_size=2, seed=seed)
        drawn.append(lm.generate_until(requests_for(documents, gen_kwargs=warm)))
        torch.manual_seed(len(drawn))
    assert drawn[0] == drawn[1] != drawn[2]


def test_strange_visuals_are_an_error_that_names_the_document(documents):
    item = SimpleNamespace(doc_id=7, task=TASK)
    for visuals in (["a.mp4", "b.mp4"], [{"audio": 1}], [documents[0]["visuals"]()[0], "a.mp4"]):
        with pytest.raises(TodreError, match=f"document 7 of {TASK} must show"):
            shown_of(item, visuals, 5)
    assert shown_of(item, None, 5).images == shown_of(item, [None], 5).images == ()


# ---------------------------------------------------------------------- videos


@pytest.mark.parametrize(
    ("count", "expected"), [(1, [0]), (4, [0, 3, 6, 9]), (5, [0, 2, 4, 6, 9]), (99, range(10))]
)
def test_frames_are_spaced_evenly_over_the_clip(clip, count, expected, monkeypatch):
    monkeypatch.setattr("llava_todre.video._by_number", None)  # not for such a file
    frames = read_clip(clip, count).frames
    grey = [float(np.asarray(frame).mean()) / 25 for frame in frames]
    assert [round(value) for value in grey] == list(expected)
    assert all(frame.size == (96, 64) for frame in frames)
    assert read_clip(clip, count).seconds == pytest.approx([number / 5 for number in expected])


def test_a_clip_whose_times_mislead_is_decoded_from_the_start(tmp_path):
    frames = [np.full((64, 96, 3), 25 * i, np.uint8) for i in range(10)]
    path = tmp_path / "clip.ts"  # seeking to its first picture finds none
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg2video", rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())
    grey = [round(float(np.asarray(frame).mean()) / 25) for frame in read_clip(str(path), 4).frames]
    assert grey == [0, 3, 6, 9]
    assert read_clip(str(path), 4).seconds == pytest.approx([number / 25 for number in grey])


def test_a_question_about_a_video_says_when_its_frames_are_seen(documents):
    lm = build(documents, max_frames=4)
    items, (_, about_a_clip) = items_of(requests_for(documents, [0, 3]))
    asked = [lm._request(item, lm._shown(item)).seconds for item in items.values()]
    assert items[about_a_clip].doc_id == 3
    assert asked == [(), pytest.approx((0, 0.6, 1.2, 1.8))]


def test_a_file_that_is_no_video_is_named(documents, tmp_path, clip):
    text, cut_off = tmp_path / "notes.mp4", tmp_path / "half.mp4"
    text.write_text("no video")
    cut_off.write_bytes(Path(clip).read_bytes()[:900])
    for path in (text, cut_off, tmp_path / "gone.mp4"):
        shown = [{"visuals": lambda path=path: [str(path)], "question": "What?"}]
        with pytest.raises(TodreError, match=rf"video '{path}'") as caught:
            build(shown).generate_until(requests_for(shown))
        assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------- the log


@pytest.fixture(scope="module")
def whole(documents, tmp_path_factory):
    """Answers and log lines of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    given = build(documents, batch_size=2, log_dir=str(folder)).generate_until(
        requests_for(documents)
    )
    return given, read_answers(folder)


def without_times(lines):
    times = ("seconds", "cpu_seconds", "peak_memory_mib")
    return [{k: v for k, v in line.items() if k not in times} for line in lines]


@pytest.mark.parametrize("finished", [0, 1, 2])
def test_an_interrupted_run_computes_the_rest_and_ends_alike(
    documents, whole, tmp_path, monkeypatch, finished
):
    arguments = {"batch_size": 2, "log_dir": str(tmp_path)}
    Calls(monkeypatch, fail_at=finished)
    with pytest.raises(RuntimeError, match="the lights went out"):
        build(documents, **arguments).generate_until(requests_for(documents))
    assert len(lines_in(tmp_path)) == 2 * finished  # and nothing of the batch that failed

    calls = Calls(monkeypatch)
    assert build(documents, **arguments).generate_until(requests_for(documents)) == whole[0]
    text = [document["question"] for document in documents]
    assert calls.questions == [text[start : start + 2] for start in range(2 * finished, 6, 2)]
    assert without_times(read_answers(tmp_path)) == without_times(whole[1])


@pytest.mark.parametrize("torn", [1, 60, 10_000])
def test_a_torn_line_costs_its_batch_only(documents, whole, tmp_path, monkeypatch, torn):
    arguments = {"batch_size": 2, "log_dir": str(tmp_path)}
    build(documents, **arguments).generate_until(requests_for(documents, range(4)))
    (file,) = tmp_path.glob("*/*.jsonl")
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:3], lines[3][:torn]]))
    calls = Calls(monkeypatch)
    assert build(documents, **arguments).generate_until(requests_for(documents)) == whole[0]
    is_whole = torn > len(lines[3])  # only its newline is missing
    assert len(calls.questions) == (1 if is_whole else 2)
    assert without_times(read_answers(tmp_path)) == without_times(whole[1])


def test_a_failed_item_is_named_and_nothing_is_logged_for_it(documents, tmp_path, caplog):
    broken = [*documents]
    broken[3] = documents[3] | {"visuals": lambda: 1 / 0}
    lm = build(broken, batch_size=2, log_dir=str(tmp_path))
    with pytest.raises(ZeroDivisionError):
        lm.generate_until(requests_for(broken))
    assert [line["doc_id"] for line in lines_in(tmp_path)] == [0, 1]
    assert f"task {TASK}, split {SPLIT}, documents [2, 3] failed" in caplog.text


def test_a_decoder_that_computes_nan_fails_and_nothing_is_logged(documents, tmp_path, monkeypatch):
    lm = build(documents, log_dir=str(tmp_path))
    norm = lm.model.model.norm
    monkeypatch.setattr(norm, "variance_epsilon", float("nan"))
    with pytest.raises(TodreError, match="logits of 1 of 1 prompts contain NaN or Inf"):
        lm.generate_until(requests_for(documents))
    assert not lines_in(tmp_path)


def test_an_empty_answer_is_an_answer(documents, tmp_path, monkeypatch):
    calls = Calls(monkeypatch, says="")
    for _ in range(2):
        lm = build(documents, log_dir=str(tmp_path))
        assert lm.generate_until(requests_for(documents, [0])) == [""]
    assert len(calls.questions) == 1


def test_an_answer_serves_only_for_what_was_asked(documents, samples, tmp_path, monkeypatch):
    arguments = {"batch_size": 2, "log_dir": str(tmp_path)}
    build(documents, **arguments).generate_until(requests_for(documents, [0, 5]))
    calls = Calls(monkeypatch)

    def computed(docs, only, gen_kwargs=None):
        before = len(calls.questions)
        build(docs, **arguments).generate_until(requests_for(docs, only, gen_kwargs))
        return len(calls.questions) - before

    assert computed(documents, [0, 5]) == 0
    other_text = [documents[0] | {"question": "Is there a red ring?"}, *documents[1:]]
    other_picture = [documents[0] | {"visuals": lambda: [samples[3].image]}, *documents[1:]]
    assert computed(other_text, [0, 5]) == computed(other_picture, [0, 5]) == 1
    assert computed(documents, [0, 4]) == computed(documents, [0]) == 1  # in other company
    assert computed(documents, [0, 5], GREEDY | {"max_new_tokens": 3}) == 1
    assert computed(documents, [0, 5]) == 0
    names = [build(documents)._fingerprint()[0]]
    for changed in (
        {"retain_ratio": 0.5},
        {"method": "vanilla"},
        {"method": "vanilla", "seed": 1},
        {"tau": 0.2},
        {"template": "mistral_instruct"},
        {"protocol": "paper"},
        {"max_frames": 4},
        {"max_new_tokens": 99},
        {"dtype": "bfloat16"},
        {"attn_implementation": "eager"},
    ):
        names.append(build(documents, **changed)._fingerprint()[0])
    assert len(set(names)) == len(names)


def test_equal_models_share_a_fingerprint_and_any_change_ends_that(documents, monkeypatch):
    monkeypatch.setattr(vlm, "load_pretrained_model", load_pretrained_model)

    def name(settings=()):
        return fingerprint(lm.vlm, dict(settings))[0]

    lm = build(documents)
    before = name()
    lm = build(documents)
    assert before == name() != name({"template": "plain"})
    weight = lm.model.lm_head.weight.data
    weight[0, [0, 1]] = weight[0, [1, 0]]  # the same numbers in another order
    assert name() != before
    weight[0, [0, 1]] = weight[0, [1, 0]]
    assert name() == before
    for place, key, value in (
        (lm.model.config, "image_aspect_ratio", "pad"),
        (lm.model.generation_config, "repetition_penalty", 1.5),
        (lm.model.get_vision_tower().image_processor, "rescale_factor", 1.0),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(place, key, value)
            assert name() != before
        assert name() == before
    lm.vlm.tokenizer.add_tokens(["<new>"])
    assert name() != before


@pytest.mark.parametrize("layout", ["ours", "torchao", "quanto"])
def test_quantised_models_have_fingerprints(layout, monkeypatch):
    from quantised import configuration

    def load(name):
        if layout == "ours":
            pytest.importorskip("bitsandbytes")
            return plugin.LlavaTodre(pretrained=MINI, load_4bit=name != "").model
        chosen = configuration(f"{layout}-{name or 'float8'}")
        return load_pretrained_model(MINI, quantization_config=chosen)[1]

    monkeypatch.setattr(vlm, "load_pretrained_model", load_pretrained_model)
    first, again, other = (weights_digest(load(name)) for name in ("int8", "int8", ""))
    assert first == again != other


def test_a_line_tells_what_the_answer_took(documents, whole):
    line = whole[1][0]
    lm = build(documents)
    stats = answer(
        lm.model, lm.vlm.tokenizer, [Request(line["prompt"], documents[0]["visuals"]())]
    )[0].stats
    assert line["prompt"] == documents[0]["question"]
    assert line["gen_kwargs"] == GREEDY
    assert line["answer"] == whole[0][0]
    assert (line["visual_tokens"], line["kept_tokens"]) == (stats.visual_tokens, stats.kept_tokens)
    assert line["kept_tokens"] == round(0.1 * line["visual_tokens"])
    assert line["mean_visual_tokens_per_layer"] == stats.mean_visual_tokens
    assert line["withdrawn_from"] == stats.withdrawn_from
    assert 0 < line["prefill_flops"] < line["prefill_flops_unpruned"]
    assert line["seconds"] > 0 and line["peak_memory_mib"] > 100
    assert line["cpu_seconds"] > 0 and len(line["pictures"]) == 16
    text_only = whole[1][1]
    assert text_only["pictures"] is None
    assert text_only["visual_tokens"] == text_only["kept_tokens"] == 0
    assert text_only["prefill_flops"] == text_only["prefill_flops_unpruned"]


def test_processes_read_what_others_wrote_and_do_not_repeat_padding(
    documents, tmp_path, monkeypatch
):
    def run(rank, only):
        lm = build(documents, log_dir=str(tmp_path))
        lm._rank = rank
        requests = requests_for(documents, only)
        padding = requests_for(documents, only[-1:], __padding_only__=True)
        return lm.generate_until(requests + padding)

    calls = Calls(monkeypatch)
    given = {rank: run(rank, [rank, rank + 2]) for rank in (0, 1)}
    assert len(calls.questions) == 4
    assert given[0][1] == given[0][2]
    names = sorted(path.name for path in tmp_path.glob("*/*.jsonl"))
    assert names == [f"{TASK}.{SPLIT}.rank{rank}.jsonl" for rank in (0, 1)]
    alone = build(documents, log_dir=str(tmp_path)).generate_until(
        requests_for(documents, range(4))
    )
    assert len(calls.questions) == 4
    assert alone == [given[0][0], given[1][0], given[0][1], given[1][1]]
    assert [line["doc_id"] for line in read_answers(tmp_path)] == [0, 1, 2, 3]


def test_repeated_questions_about_a_document_are_items_of_their_own(documents, tmp_path):
    twice = [*requests_for(documents, [0])] * 2
    build(documents, log_dir=str(tmp_path)).generate_until(twice)
    assert [line["repeat"] for line in lines_in(tmp_path)] == [0, 1]


def test_answers_that_no_longer_count_are_counted_and_the_reason_is_told(
    documents, tmp_path, monkeypatch, caplog
):
    def start(**changed):
        caplog.clear()
        lm = build(documents, log_dir=str(tmp_path), **changed)
        lm.generate_until(requests_for(documents, [0, 1, 2]))
        return [entry.getMessage() for entry in caplog.records if "not used" in entry.getMessage()]

    def told():
        return (tmp_path / (tmp_path / "current").read_text() / "unused.txt").read_text()

    assert start() == start() == []
    first = (tmp_path / "current").read_text()
    (line,) = start(retain_ratio=0.5)
    assert line.startswith("3 answers of an earlier start are not used")
    assert line.endswith(f"changed: settings (method). They stay in {tmp_path / first}.")
    assert told() == f"{line}\n"
    assert start() == [], "it has been here before"
    digests = {"generate": "a", "pruners.todre": "b"}
    monkeypatch.setattr("llava_todre.lmms_plugin.fingerprint.digests", lambda *_: digests)
    (line,) = start()
    assert "changed: source (" in line and " more). They stay" in line
    digests = digests | {"pruners.todre": "c"}
    (line,) = start()
    assert "changed: source (pruners.todre). They stay" in line


# ---------------------------------------------------------------------- arguments


def test_model_args_reach_model_and_method_as_lmms_eval_parses_them(tmp_path):
    lm = plugin.LlavaTodre.create_from_arg_string(
        f"pretrained={MINI},method=todre,retain_ratio=0.2,probe_depths=0.5;0.75,cls_layer=-2,tau=1,"
        "pivot=random,seed=3,dtype=bfloat16,template=plain,max_frames=7,max_new_tokens=9,"
        f"protocol=paper,attn_implementation=eager,log_dir={tmp_path}",
        {"batch_size": "2", "device": "cpu", "max_batch_size": None},
    )
    expected = create_pruner(
        "todre",
        retain_ratio=0.2,
        probe_depths=(0.5, 0.75),
        cls_layer=-2,
        tau=1,
        pivot="random",
        seed=3,
    )
    assert lm.pruner == lm.model.pruner == expected
    assert (lm.batch_size, lm.max_frames, lm.max_new_tokens, lm.seed) == (2, 7, 9, 3)
    assert (lm.template, lm.log_dir, lm.device) == ("plain", str(tmp_path), torch.device("cpu"))
    assert (lm.model.dtype, lm.model.config._attn_implementation) == (torch.bfloat16, "eager")
    assert lm.model.config.mm_patch_merge_type == "spatial"
    assert (lm.rank, lm.world_size) == (0, 1)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("[0.5,0.875]", [0.5, 0.875]),
        ("0.5;0.875", [0.5, 0.875]),
        ("0.5;", [0.5]),
        ("[]", []),
        (-1.0, -1),
        (1.0, 1.0),
        ("null", None),
        ("cls", "cls"),
        (True, True),
    ],
)
def test_an_option_becomes_what_the_method_knows(given, expected):
    assert option(given) == expected
    assert type(option(given)) is type(expected)


def test_a_method_may_be_a_file_or_two_joined(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("method: todre\nprobe_depths: [0.5]\ntau: 0.3\nseed: 4\n")
    pruner, seed = build_pruner(str(file), {"tau": 0.4}, None, ())
    assert pruner == create_pruner("todre", probe_depths=(0.5,), tau=0.4, seed=4)
    assert seed == 4
    assert build_pruner(str(file), {}, 5, ())[0].seed == 5
    joined, _ = build_pruner("random+todre", {"retain_ratio": 0.3, "inside.tau": 0.2}, 6, ())
    assert joined == create_pruner(
        "random+todre", **{"retain_ratio": 0.3, "tau": 0.2, "before.seed": 6, "inside.seed": 6}
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pretrained": None}, "pretrained must be a folder or a hub id, got None"),
        ({"pretrained": "no/such/model"}, "pretrained|model_path"),
        ({"method": "toddre"}, "method 'toddre' is unknown. Did you mean 'todre'"),
        ({"method": "random+vtv"}, "method 'vtv' is unknown. Did you mean 'vtw'"),
        ({"retain_ration": 0.1}, "argument 'retain_ration' is unknown. .* 'retain_ratio'"),
        ({"pretraned": "x"}, "argument 'pretraned' is unknown. Did you mean 'pretrained'"),
        ({"inside.tau": 0.1}, "argument 'inside.tau' is unknown"),
        ({"method": "vanilla", "tau": 0.1}, "argument 'tau' is unknown"),
        ({"retain_ratio": 1.5}, "0 < retain_ratio <= 1, got 1.5"),
        ({"probe_depths": "[0.5"}, "not valid YAML"),
        ({"batch_size": "auto"}, "(?=.*'auto')batch_size .*whole number"),
        ({"max_frames": 0}, r"max_frames .*\b0\b"),
        ({"max_new_tokens": 2.5}, "(?=.*2.5)max_new_tokens .*whole number"),
        ({"template": "vicuna"}, "template 'vicuna' is unknown"),
        ({"template": "x", "backend": "transformers"}, "template 'x' is unknown"),
        ({"protocol": "papr"}, "protocol 'papr' is unknown"),
        ({"seed": "one"}, "(?=.*'one')seed .*whole number"),
        ({"revision": 1e5}, "revision must be text, .* got 100000.0"),
        ({"method": "cdpruner", "relevance": "clip"}, "needs CLIP's text tower"),
        ({"clip_text": "/no/where"}, "clip_text '/no/where'"),
        ({"method": "none.yaml"}, "method file 'none.yaml' cannot be read"),
        ({"device": "cpu", "device_map": "auto"}, "left out with a device_map, got 'cpu'"),
        ({"load_8bit": "maybe"}, "load_8bit must be true or false, got 'maybe'"),
        ({"load_8bit": True, "load_4bit": "true"}, "load_8bit and load_4bit were both given"),
        ({"backend": "both"}, "backend 'both' is unknown"),
        (
            {"backend": "transformers", "protocol": "paper"},
            "protocol must be left out .* got 'paper'",
        ),
        ({"backend": "transformers", "clip_text": "x"}, "clip_text must be left out .* got 'x'"),
        ({"backend": "transformers"}, "does not load"),
        ({"model_base": MINI}, "model_base was given, but .* neither an adapter nor a proj"),
    ],
)
def test_a_bad_argument_is_one_line(arguments, message):
    with pytest.raises(TodreError, match=message) as caught:
        plugin.LlavaTodre(**({"pretrained": MINI} | arguments))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        "tau: 0.1",
        "- todre",
        "a: [",
        "method: 3",
        "method: todre\ntau: 7",
        "method: todre\ntau: 0.1\ntau: 0.2",
        "method: toddre",
    ],
)
def test_a_bad_method_file_is_one_line(tmp_path, content):
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    with pytest.raises(TodreError, match=f"method file '{file}'") as caught:
        build_pruner(str(file), {}, None, ())
    assert "\n" not in str(caught.value)


def test_a_log_dir_that_is_a_file_is_one_line(documents, tmp_path):
    file = tmp_path / "taken"
    file.write_text("")
    with pytest.raises(TodreError, match="log_dir must be a folder to write to"):
        build(documents, log_dir=str(file)).generate_until(requests_for(documents, [0]))


# ---------------------------------------------------------------------- seeds


def test_random_keeps_other_tokens_of_every_document_and_the_same_in_every_batch(
    samples, monkeypatch
):
    documents = [{"visuals": lambda: [samples[0].image], "question": "What color is it?"}] * 3
    kept = []

    def noting(*given, **settings):
        given = ANSWER(*given, **settings)
        kept[-1].extend(one.stats.images[0].keep_idx.tolist() for one in given)
        return given

    monkeypatch.setattr(OwnModel, "answer", noting)
    for batch_size, seed in ((1, 0), (3, 0), (3, 1)):
        kept.append([])
        lm = build(documents, method="random", batch_size=batch_size, seed=seed)
        lm.generate_until(requests_for(documents))
    assert len({tuple(tokens) for tokens in kept[0]}) == 3
    assert kept[0] == kept[1]
    assert all(one != other for one, other in zip(kept[1], kept[2], strict=True))


def test_a_method_draws_if_and_only_if_its_seed_changes_what_it_keeps():
    tokens = visual_tokens(grid=(2, 2), side=6)
    cases = {name: {} for name, method in PRUNERS.items() if hasattr(method, "seed")}
    cases |= {"todre": {"pivot": "random"}, "random": {}}
    assert {"random", "todre", "todre_v1"} <= set(cases)
    for name, knobs in [*cases.items(), ("todre", {}), ("todre", {"pivot": "farthest"})]:
        pruner = create_pruner(name, **knobs)
        kept = {
            tuple(with_seed(pruner, seed).select(tokens, 20).sort().values.tolist())
            for seed in range(5)
        }
        assert draws(pruner) == (len(kept) > 1), name
    assert draws(create_pruner("random+todre"))
    assert not draws(create_pruner("todre+vtw"))
    assert not draws(create_pruner("fastervlm"))


def test_seeds_of_items_differ_and_fit_a_generator():
    seeds = {item_seed(seed, doc_id) for seed in range(20) for doc_id in range(500)}
    assert len(seeds) == 10_000
    torch.Generator().manual_seed(max(seeds))


# ---------------------------------------------------------------------- several processes


def processes(count, device):
    return SimpleNamespace(num_processes=count, device=torch.device(device))


def test_each_of_several_processes_takes_the_device_accelerate_gave_it():
    place = placement
    assert place(processes(1, "cuda"), None, None) == {"device": "auto", "device_map": None}
    assert place(processes(1, "cpu"), None, "auto") == {"device": "auto", "device_map": "auto"}
    for wanted in (None, "auto", "cuda", "cuda:0"):
        assert place(processes(4, "cuda:3"), wanted, None) == {"device": torch.device("cuda:3")}
    assert place(processes(2, "cpu"), "cpu", None) == {"device": torch.device("cpu")}
    with pytest.raises(TodreError, match="each would take all GPUs"):
        place(processes(4, "cuda:3"), None, "auto")
    with pytest.raises(TodreError, match="device must be 'cuda'.* got 'cpu'; .* ACCELERATE"):
        place(processes(2, "cuda:1"), "cpu", None)


@pytest.mark.parametrize("kind", ["NO", "MULTI_CPU", "MULTI_GPU", "DEEPSPEED", "FSDP"])
def test_each_process_holds_a_whole_model(monkeypatch, kind):
    fake = SimpleNamespace(distributed_type=SimpleNamespace(value=kind))
    monkeypatch.setattr("accelerate.Accelerator", lambda **_: fake)
    if kind in ("DEEPSPEED", "FSDP"):
        with pytest.raises(TodreError, match=f"processes must be of type .* got '{kind}'"):
            join_processes()
    else:
        assert join_processes() is fake
