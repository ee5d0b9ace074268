"""Loading by one function; questions in, answers out: batches, images, videos, shared encodings."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import llava_todre
from llava_todre import (
    ImageCache,
    LoadOptions,
    Request,
    TodreError,
    answer,
    ask,
    load,
    load_pretrained_model,
    prepare,
)
from llava_todre.model.llava import LlavaLlamaForCausalLM
from llava_todre.model.prompt import conv_templates

GOLDEN = Path(__file__).parent / "golden"
QUESTIONS = ["what is in this picture", "how many cat is left ?", "yes or no"]


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, LlavaLlamaForCausalLM]:
    tokenizer, model, _, _ = load_pretrained_model(GOLDEN / "llava-v1.6-tiny")
    return tokenizer, model


@pytest.fixture
def images() -> list[Image.Image]:
    return [Image.open(GOLDEN / f"v16_{i}.png").convert("RGB") for i in range(3)]


@pytest.mark.parametrize(
    ("method", "knobs"),
    [
        ("vanilla", {}),
        ("random", {"retain_ratio": 0.25}),
        ("todre", {"retain_ratio": 0.25}),
        ("todre_v1", {"retain_ratio": 0.25, "tau": 0.2}),
        ("todre_v1", {"retain_ratio": 1.0, "tau": 0.38}),
    ],
)
def test_a_mixed_batch_equals_its_samples_one_by_one(
    loaded: tuple[Any, Any], images: list[Image.Image], method: str, knobs: dict[str, Any]
) -> None:
    tokenizer, model = loaded
    model.set_pruner(method, **knobs)
    requests = [
        Request(QUESTIONS[0], [images[0]]),
        Request(QUESTIONS[1], [images[1], images[2]]),
        Request(QUESTIONS[2], images, is_video=True),
    ]
    together = answer(model, tokenizer, requests, max_new_tokens=12)
    singly = [answer(model, tokenizer, [one], max_new_tokens=12)[0] for one in requests]
    assert [a.text for a in together] == [a.text for a in singly]
    for a, b in zip(together, singly, strict=True):
        assert a.stats.withdrawn_from == b.stats.withdrawn_from
        assert a.stats.visual_tokens_per_layer == b.stats.visual_tokens_per_layer
        assert [p.text_to_visual for p in a.stats.probes] == pytest.approx(
            [p.text_to_visual for p in b.stats.probes], abs=1e-5
        )


def test_samples_of_one_batch_withdraw_at_different_layers(
    loaded: tuple[Any, Any], images: list[Image.Image]
) -> None:
    tokenizer, model = loaded
    model.set_pruner("todre_v1", retain_ratio=1.0, tau=0.38)
    requests = [Request(q, [i]) for q, i in zip(QUESTIONS, images, strict=True)]
    layers = {a.stats.withdrawn_from for a in answer(model, tokenizer, requests, max_new_tokens=2)}
    assert len(layers) > 1  # otherwise the mixed-batch test above would be easier than it claims


def test_an_image_asked_about_twice_is_encoded_once(
    loaded: tuple[Any, Any], images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, model = loaded
    model.set_pruner("todre", retain_ratio=0.25)
    seen: list[int] = []
    encode = type(model.get_vision_tower()).forward

    def spy(tower: Any, pixels: torch.Tensor, wanted: Any = ()) -> Any:
        seen.append(len(pixels))
        return encode(tower, pixels, wanted)

    monkeypatch.setattr(type(model.get_vision_tower()), "forward", spy)
    answer(model, tokenizer, [Request(q, [images[0]]) for q in QUESTIONS], max_new_tokens=1)
    assert seen == [5]  # thumbnail and 2 x 2 crops, once


@pytest.mark.parametrize("method", ["todre", "fastv", "cdpruner"])
def test_a_memory_encodes_an_image_once_for_all_calls_and_changes_no_answer(
    loaded: tuple[Any, Any],
    images: list[Image.Image],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    tokenizer, model = loaded
    model.set_pruner(method, retain_ratio=0.25)
    batches = [
        [Request(QUESTIONS[0], [images[0]]), Request(QUESTIONS[1], [images[0]])],
        [Request(QUESTIONS[2], [images[0]]), Request(QUESTIONS[1], [images[1]])],
        [Request(QUESTIONS[0], [images[1]]), Request("why", images, is_video=True)],
        [Request(QUESTIONS[1], images, is_video=True), Request("hello")],
    ]
    fresh = [answer(model, tokenizer, batch, max_new_tokens=8) for batch in batches]
    encoded: list[int] = []
    encode = type(model.get_vision_tower()).forward

    def spy(tower: Any, pixels: torch.Tensor, wanted: Any = ()) -> Any:
        encoded.append(len(pixels))
        return encode(tower, pixels, wanted)

    monkeypatch.setattr(type(model.get_vision_tower()), "forward", spy)
    cache = ImageCache(max_images=2)
    again = [
        answer(model, tokenizer, batch, max_new_tokens=8, image_cache=cache) for batch in batches
    ]
    assert [a.text for batch in again for a in batch] == [a.text for b in fresh for a in b]
    assert encoded == [5, 4, 3]  # thumbnail and crops of two images, the frames of the video
    assert cache.prefixes.hits == (3 if method == "todre" else 0)


def test_a_memory_knows_a_file_until_it_changes(
    loaded: tuple[Any, Any], images: list[Image.Image], tmp_path: Path
) -> None:
    tokenizer, model = loaded
    model.set_pruner("todre", retain_ratio=0.25)
    cache, file = ImageCache(), tmp_path / "image.png"

    def answer_about(image: Image.Image, question: str) -> tuple[str, int]:
        image.save(file)
        given = ask(model, tokenizer, file, question, max_new_tokens=8, image_cache=cache)
        fresh = ask(model, tokenizer, file, question, max_new_tokens=8)
        assert given.text == fresh.text
        return given.text, cache.prefixes.hits

    first, hits = answer_about(images[0], QUESTIONS[0])
    assert hits == 0
    ask(model, tokenizer, file, QUESTIONS[1], max_new_tokens=1, image_cache=cache)
    assert cache.prefixes.hits == 1
    second, hits = answer_about(images[1], QUESTIONS[0])
    assert hits == 1 and second != first


def test_a_memory_sees_that_an_image_was_painted_over(
    loaded: tuple[Any, Any], images: list[Image.Image]
) -> None:
    tokenizer, model = loaded
    model.set_pruner("todre", retain_ratio=0.25)
    cache, image = ImageCache(max_images=2), images[0].copy()
    first = ask(model, tokenizer, image, QUESTIONS[0], max_new_tokens=8, image_cache=cache).text
    image.paste(images[1].resize(image.size))
    again = ask(model, tokenizer, image, QUESTIONS[0], max_new_tokens=8, image_cache=cache).text
    fresh = ask(model, tokenizer, image, QUESTIONS[0], max_new_tokens=8).text
    assert again == fresh != first
    copy = images[0].copy()
    assert (
        ask(model, tokenizer, copy, QUESTIONS[0], max_new_tokens=8, image_cache=cache).text == first
    )
    assert cache.prefixes.hits == 1, "equal pixels are the same image"


def test_a_memory_serves_one_model(loaded: tuple[Any, Any], images: list[Image.Image]) -> None:
    tokenizer, model = loaded
    _, other, _, _ = load_pretrained_model(GOLDEN / "llava-v1.6-tiny")
    cache = ImageCache()
    ask(model, tokenizer, images[0], QUESTIONS[0], max_new_tokens=1, image_cache=cache)
    with pytest.raises(TodreError, match="must be of one model"):
        ask(other, tokenizer, images[0], QUESTIONS[0], max_new_tokens=1, image_cache=cache)


def test_a_memory_does_not_carry_over_to_another_method(
    loaded: tuple[Any, Any], images: list[Image.Image]
) -> None:
    tokenizer, model = loaded
    cache = ImageCache(max_images=3)
    for method in ("fastervlm", "todre", "fastervlm"):
        model.set_pruner(method, retain_ratio=0.25)
        given = ask(model, tokenizer, images[0], QUESTIONS[0], max_new_tokens=8, image_cache=cache)
        fresh = ask(model, tokenizer, images[0], QUESTIONS[0], max_new_tokens=8)
        assert given.text == fresh.text
        assert given.stats.as_dict()["keep_idx"] == fresh.stats.as_dict()["keep_idx"]
    assert cache.prefixes.hits == 1


def test_what_is_prepared_ahead_gives_the_same_answer(
    loaded: tuple[Any, Any], images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, model = loaded
    model.set_pruner("todre", retain_ratio=0.25)
    requests = [
        Request(QUESTIONS[0], [images[0]]),
        Request(QUESTIONS[1], [images[1], images[2]]),
        Request(QUESTIONS[2], images, is_video=True),
        Request("hello"),
    ]
    ready = [prepare(model, request) for request in requests]
    with monkeypatch.context() as patched:
        patched.setattr("llava_todre.vlm.process_images", None)  # is not called again
        given = answer(model, tokenizer, ready, max_new_tokens=8, timed=True)
    direct = answer(model, tokenizer, requests, max_new_tokens=8, timed=True)
    assert [a.text for a in given] == [a.text for a in direct]
    assert "views" in given[0].stages_ms and "views" in direct[0].stages_ms
    with pytest.raises(TodreError, match="image must be .* got int"):
        prepare(model, Request("what", [3]))  # type: ignore[list-item]


def test_files_and_pil_images_give_the_same_answer(
    loaded: tuple[Any, Any], images: list[Image.Image]
) -> None:
    tokenizer, model = loaded
    model.set_pruner("todre", retain_tokens=9)
    from_file = ask(model, tokenizer, str(GOLDEN / "v16_0.png"), QUESTIONS[0], max_new_tokens=6)
    from_image = ask(model, tokenizer, images[0], QUESTIONS[0], max_new_tokens=6)
    assert from_file.text == from_image.text
    assert from_file.stats.kept_tokens == 9


def test_stages_are_timed_only_on_request(
    loaded: tuple[Any, Any], images: list[Image.Image]
) -> None:
    tokenizer, model = loaded
    model.set_pruner("todre")
    assert ask(model, tokenizer, images[0], "what", max_new_tokens=3).stages_ms == {}
    stages = ask(model, tokenizer, images[0], "what", max_new_tokens=3, timed=True).stages_ms
    assert not model.clock.enabled
    assert set(stages) == {"views", "vision", "selection", "prefill", "decode"}
    assert all(ms > 0 for ms in stages.values())


def test_an_answer_ends_where_the_template_says(
    loaded: tuple[Any, Any], images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, model = loaded
    model.set_pruner("todre_v1", retain_ratio=0.25)
    whole = ask(model, tokenizer, images[0], "what", max_new_tokens=12).text
    stop = whole[len(whole) // 2 :][:2]
    vicuna = conv_templates["vicuna_v1"]
    monkeypatch.setitem(conv_templates, "stopping", dataclasses.replace(vicuna, stop=stop))
    short = ask(model, tokenizer, images[0], "what", template="stopping", max_new_tokens=12)
    assert short.text == whole.split(stop)[0].strip()


def test_an_answer_ends_where_the_caller_says(
    loaded: tuple[Any, Any], images: list[Image.Image]
) -> None:
    tokenizer, model = loaded
    model.set_pruner("todre_v1", retain_ratio=0.25)
    whole = ask(model, tokenizer, images[0], "what", max_new_tokens=12).text
    stop = whole[len(whole) // 2 :][:2]
    short = ask(model, tokenizer, images[0], "what", max_new_tokens=12, stop_strings=[stop]).text
    assert whole.startswith(short)
    assert stop in short
    assert len(short) < len(whole)


def test_nothing_to_ask(loaded: tuple[Any, Any], images: list[Image.Image]) -> None:
    tokenizer, model = loaded
    assert answer(model, tokenizer, []) == []
    with pytest.raises(TodreError, match="question"):
        ask(model, tokenizer, images[0], "  ")
    with pytest.raises(TodreError, match="at least one frame"):
        answer(model, tokenizer, [Request("what", [], is_video=True)])
    with pytest.raises(TodreError, match="image must be .* got int"):
        ask(model, tokenizer, 3, "what")  # type: ignore[arg-type]


BAD_REQUESTS: list[tuple[Any, Any, str]] = [
    ("image", None, "question must be text, got NoneType"),
    ("image", b"what", "question must be text, got bytes"),
    ("image", ["what"], "question must be text, got list"),
    (None, "what", "image must be a PIL image or a path, got NoneType"),
    (torch.zeros(3, 4, 4), "what", "image must be .* got Tensor"),
    ("closed", "what", "image is closed, .*: Operation on closed image"),
    ("cut short", "what", "image is closed, .*: image file is truncated"),
    ("a\0b.png", "what", "must be a path"),
    ("nowhere.png", "what", "does not exist"),
]


@pytest.mark.parametrize("remembers", [False, True])
@pytest.mark.parametrize(("image", "question", "message"), BAD_REQUESTS)
def test_a_request_that_is_none_is_refused_in_one_line(
    loaded: tuple[Any, Any],
    tmp_path: Path,
    image: Any,
    question: Any,
    message: str,
    remembers: bool,
) -> None:
    tokenizer, model = loaded
    file, short = GOLDEN / "v16_0.png", tmp_path / "short.png"
    short.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    closed = Image.open(file)
    closed.close()
    shown = {"image": file, "closed": closed, "cut short": Image.open(short)}
    cache = ImageCache() if remembers else None
    with pytest.raises(TodreError, match=message) as caught:
        picture = shown.get(image, image) if isinstance(image, str) else image
        ask(model, tokenizer, picture, question, image_cache=cache)
    assert "\n" not in str(caught.value)


def test_arguments_of_an_answer_are_checked_before_any_work(
    loaded: tuple[Any, Any], images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, model = loaded
    monkeypatch.setattr(model, "encode_images", None)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"max_new_tokens": None}, "max_new_tokens None is out of range"),
        ({"max_new_tokens": "5"}, "max_new_tokens '5' is out of range"),
        ({"max_new_tokens": 1.5}, r"max_new_tokens 1\.5 is out of range"),
        ({"num_beams": 100_000}, "num_beams 100000 is out of range"),
        ({"max_new_token": 5}, "'max_new_token' is unknown. Did you mean 'max_new_tokens'"),
        ({"template": []}, r"template \[\] is unknown"),
        ({"image_cache": 3}, "image_cache must be an ImageCache, got int"),
    ]
    for given, message in cases:
        with pytest.raises(TodreError, match=message):
            ask(model, tokenizer, images[0], "what", **given)
    for requests in (None, ["what"], Request("what")):
        with pytest.raises(TodreError, match="requests must be a list of Request"):
            answer(model, tokenizer, requests)  # type: ignore[arg-type]
    for shown in (None, "file.png", images[0]):
        with pytest.raises(TodreError, match="images must be a list"):
            Request("what", shown)  # type: ignore[arg-type]
    with pytest.raises(TodreError, match="seconds must hold finite numbers, got nan"):
        Request("what", [images[0]], is_video=True, seconds=[float("nan")])


def test_a_template_may_end_answers_with_what_the_tokenizer_cannot_write() -> None:
    mini = Path(__file__).parents[1] / "checkpoints" / "mini"
    tokenizer, model, _, _ = load_pretrained_model(mini)
    image = next((mini / "examples").glob("*.png"))
    for template in conv_templates:
        given = ask(model, tokenizer, image, "What does the sign say?", template=template)
        assert "\n" not in given.text


def test_a_question_without_images_fits_beside_others(
    loaded: tuple[Any, Any], images: list[Image.Image]
) -> None:
    tokenizer, model = loaded
    model.set_pruner("todre_v1", retain_ratio=0.25, tau=0.3)
    requests = [Request("yes or no"), Request("what", [images[0]])]
    together = answer(model, tokenizer, requests, max_new_tokens=5)
    singly = [answer(model, tokenizer, [one], max_new_tokens=5)[0] for one in requests]
    assert [a.text for a in together] == [a.text for a in singly]
    assert together[0].stats.visual_tokens == 0 and together[0].stats.withdrawn_from is None


# ---------------------------------------------------------------------- loading


def test_a_loaded_model_answers_as_model_and_tokenizer_do(
    loaded: tuple[Any, Any], images: list[Image.Image]
) -> None:
    tokenizer, model = loaded
    vlm = load(str(GOLDEN / "llava-v1.6-tiny"), LoadOptions(dtype="float32"), template="plain")
    assert type(vlm.model) is type(model) and vlm.template == "plain"
    for each in (vlm, model):
        each.set_pruner("todre", retain_ratio=0.25)
    given = vlm.ask(images, QUESTIONS[0], max_new_tokens=5)
    expected = ask(model, tokenizer, images, QUESTIONS[0], max_new_tokens=5, template="plain")
    assert given.text == expected.text
    assert vlm.last_stats[0].as_dict() == given.stats.as_dict() == expected.stats.as_dict()
    assert vlm.decoder_shape == model.decoder_shape


OWN_ONLY = {"tp_plan": "auto", "protocol": "paper", "template": "plain", "clip_text": "x"}


def test_the_options_of_our_class_are_all_tried_below() -> None:
    own = [each.name for each in dataclasses.fields(LoadOptions) if each.metadata["own"]]
    assert own == list(OWN_ONLY)


@pytest.mark.parametrize("key", OWN_ONLY)
def test_options_of_our_class_are_refused_where_it_does_not_run(key: str) -> None:
    path = str(GOLDEN / "llava-v1.6-tiny")
    for changes in ({key: OWN_ONLY[key]}, {"own_only": {key: OWN_ONLY[key]}}):
        with pytest.raises(TodreError) as caught:
            load(path, backend="transformers", **changes)
        assert str(caught.value).startswith(f"{key} must be left out for '{path}'")
        assert str(caught.value).endswith(f"got '{OWN_ONLY[key]}'.")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtyp": "auto"}, "loading option 'dtyp' is unknown. Did you mean 'dtype'"),
        ({"backend": "lava"}, "backend 'lava' is unknown. Did you mean 'llava'"),
        ({"template": "none"}, "template 'none' is unknown"),
    ],
)
def test_unknown_options_of_loading_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TodreError, match=message):
        load("no/such/model", **options)


# ---------------------------------------------------------------------- old names


def imported() -> Any:
    from llava_todre import Memory  # type: ignore[attr-defined]

    return Memory


def test_old_names_work_and_warn_once(loaded: tuple[Any, Any], images: list[Image.Image]) -> None:
    tokenizer, model = loaded
    old = importlib.import_module("llava_todre.generate")
    cache = ImageCache()
    calls: list[tuple[Callable[[], Any], str, Any]] = [
        (lambda: llava_todre.Memory, "use llava_todre.ImageCache", ImageCache),
        (imported, "use llava_todre.ImageCache", ImageCache),
        (lambda: old.Memory, "use llava_todre.vlm.ImageCache", ImageCache),
        (lambda: old.answer, "use llava_todre.vlm.answer", answer),
        (lambda: old.Views, "use llava_todre.vlm.Views", None),
    ]
    for call, message, expected in calls:
        with pytest.warns(DeprecationWarning, match=message) as caught:
            assert call() is expected or expected is None
        assert [each.filename for each in caught] == [__file__]
    for run in (
        lambda: ask(model, tokenizer, images[0], "what", memory=cache, max_new_tokens=1),
        lambda: answer(model, tokenizer, [], memory=cache),
    ):
        with pytest.warns(DeprecationWarning, match="memory= is deprecated; use image_cache=") as w:
            run()
        assert [each.filename for each in w] == [__file__]
    assert cache._images, "the old keyword does what the new one does"
    with pytest.raises(TodreError, match="give image_cache alone"):
        answer(model, tokenizer, [], memory=cache, image_cache=cache)
    with pytest.raises(TodreError, match="give image_cache alone"):
        ask(model, tokenizer, images[0], "what", memory=cache, image_cache=cache)
    with pytest.raises(AttributeError):
        old.nothing  # noqa: B018
