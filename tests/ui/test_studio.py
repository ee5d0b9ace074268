"""The model behind the page: the same answers as elsewhere, progress, and an end at any time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from PIL import Image

from llava_todre import TodreError
from llava_todre.cli import main
from llava_todre.model.checkpoint import bundled_checkpoint
from llava_todre.stats import ImageStats
from llava_todre.ui.drawing import frame_stats, kept_picture
from llava_todre.ui.handler import Settings, visit
from llava_todre.ui.progress import Stopped
from llava_todre.ui.session import Outcome, Question, Step, Studio
from llava_todre.ui.uploads import Upload

SCENE = bundled_checkpoint() / "examples" / "scene_0.png"
TEXT = "What does the sign say?"


@pytest.fixture(scope="module")
def studio() -> Iterator[Studio]:
    studio = Studio(str(bundled_checkpoint()))
    yield studio
    studio.close()


def question(**changes: Any) -> Question:
    upload = Upload([Image.open(SCENE).convert("RGB")])
    return Question(**({"upload": upload, "text": TEXT} | changes))


def outcome(studio: Studio, method: str, ratio: float, **changes: Any) -> Outcome:
    *steps, last = studio.answer(question(**changes), method, ratio, Event())
    assert all(isinstance(step, Step) for step in steps)
    assert isinstance(last, Outcome)
    return last


def hooks(studio: Studio) -> int:
    return sum(len(module._forward_pre_hooks) for module in studio.vlm.model.modules())


@pytest.mark.parametrize("method", ["vanilla", "todre", "fastv", "divprune+todre", "vanilla+todre"])
def test_an_answer_and_its_statistics_are_those_of_a_plain_call(
    studio: Studio, method: str
) -> None:
    given = outcome(studio, method, 0.1)
    studio.vlm.set_pruner(given.pruner)
    plain = studio.vlm.ask([SCENE], TEXT)
    assert given.text == plain.text and not given.stopped
    assert given.stats.visual_tokens_per_layer == plain.stats.visual_tokens_per_layer
    assert given.stats.probes == plain.stats.probes
    assert list(given.times_ms) == ["views", "vision", "selection", "prefill", "decode"]
    assert given.new_tokens == 4  # three digits and the end
    holding = [layer for layer, count in enumerate(plain.stats.visual_tokens_per_layer) if count]
    assert [probe.layer for probe in given.ratios] == holding
    assert outcome(studio, method, 0.1, every_layer=False).no_ratios == "not requested"


def test_progress_names_tower_and_prompt_and_the_words_as_they_come(studio: Studio) -> None:
    def wait(*_: Any) -> None:
        time.sleep(0.06)

    handles = [layer.register_forward_hook(wait) for layer in studio.vlm.decoder.layers]
    try:
        news = list(studio.answer(question(every_layer=False), "todre", 0.1, Event()))
    finally:
        for handle in handles:
            handle.remove()
    lines = [step.line for step in news if isinstance(step, Step)]
    assert "reads the prompt, layer 5 of 10" in lines
    grown = [step.text for step in news if isinstance(step, Step) and step.line == "writes"]
    assert grown == sorted(grown, key=len) and {"3", "3 4", "3 4 4"} <= set(grown)
    assert hooks(studio) == 0


def test_stopped_before_the_first_token_there_is_no_answer_and_no_trace(studio: Studio) -> None:
    stop = Event()
    handle = studio.vlm.decoder.layers[3].register_forward_pre_hook(lambda *_: stop.set())
    reached = []
    later = studio.vlm.decoder.layers[5].register_forward_pre_hook(lambda *_: reached.append(1))
    with pytest.raises(Stopped):
        list(studio.answer(question(), "todre", 0.1, stop))
    handle.remove()
    later.remove()
    assert not reached and hooks(studio) == 0
    assert outcome(studio, "todre", 0.1).text == "3 4 4"


def test_who_stops_listening_stops_the_model(studio: Studio) -> None:
    stop = Event()
    handle = studio.vlm.decoder.layers[0].register_forward_pre_hook(lambda *_: time.sleep(0.2))
    news = studio.answer(question(), "vanilla", 1.0, stop)
    assert isinstance(next(news), Step)
    news.close()
    assert stop.is_set()
    handle.remove()
    assert outcome(studio, "todre", 0.1).text == "3 4 4"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wanted": [("tudre", 0.1), ("todre", 0.1)]}, "Did you mean &#x27;todre&#x27;?"),
        ({"wanted": [("todre", 0.0), ("todre", 0.1)]}, "0 &lt; retain_ratio &lt;= 1, got 0.0"),
        ({"question": "  "}, "question &#x27;  &#x27; is empty"),
        ({"path": None}, "There is no image yet"),
        ({"path": "<b>.png"}, "&lt;b&gt;.png"),
    ],
)
def test_mistakes_are_news_and_never_raised(
    studio: Studio, changes: dict[str, Any], message: str
) -> None:
    good: dict[str, Any] = {
        **{"path": SCENE, "question": TEXT, "max_new_tokens": 4, "num_frames": 4},
        **{"every_layer": False, "wanted": [("todre", 0.1), ("todre", 0.1)]},
    }
    *_, last = visit(studio, Settings(**(good | changes)), Event())
    assert 'role="alert"' in last["status"] and message in last["status"]
    *_, last = visit(studio, Settings(**good), Event())
    assert "Done." in last["status"]


def test_frames_share_out_the_tokens_of_their_video(studio: Studio) -> None:
    frames = [Image.open(SCENE).convert("RGB").rotate(5 * i) for i in range(3)]
    upload = Upload(frames, is_video=True)
    given = outcome(studio, "todre", 0.1, upload=upload)
    video = given.stats.images[0]
    each = [frame_stats(video, index) for index in range(3)]
    assert [stats.num_tokens for stats in each] == [64, 64, 64]
    whole = torch.cat([64 * i + s.patches[s.keep_idx] for i, s in enumerate(each)])
    assert torch.equal(whole, video.patches[video.keep_idx])
    assert kept_picture(upload, given.stats, studio.vlm.model).width > 3 * 224


def test_of_a_frame_that_keeps_nothing_nothing_is_left() -> None:
    video = ImageStats(torch.arange(8), 2, torch.tensor([0, 3]))
    assert frame_stats(video, 0).keep_idx.tolist() == [0, 3]
    assert frame_stats(video, 1).keep_idx.tolist() == []


def test_a_model_of_transformers_answers_too(studio: Studio, tmp_path: Path) -> None:
    out = str(tmp_path / "hf")
    assert main(["convert", "--model", str(bundled_checkpoint()), "--out", out]) == 0
    stock = Studio(out, backend="transformers")
    for method in ("vanilla", "todre"):
        ours, theirs = (outcome(each, method, 0.25) for each in (studio, stock))
        assert theirs.text == ours.text
        assert theirs.stats.visual_tokens_per_layer == ours.stats.visual_tokens_per_layer
        shares = [[probe.text_to_visual for probe in each.ratios] for each in (ours, theirs)]
        assert shares[0] == pytest.approx(shares[1], abs=1e-3)
        assert list(theirs.times_ms) == ["up to the first token", "the other tokens"]
    assert not stock.vlm.draws_tokens
    assert set(studio.methods()) - set(stock.methods()) == {"downsample"}
    stock.close()


def test_a_method_that_needs_more_than_the_model_has_is_not_offered(studio: Studio) -> None:
    offered = studio.methods()
    assert {"vanilla", "todre", "fastv"} <= set(offered)
    for name in offered:
        assert outcome(studio, name, 0.5, max_new_tokens=1, every_layer=False).new_tokens == 1
    with pytest.raises(TodreError, match="max_new_tokens 0 is out of range"):
        outcome(studio, "todre", 0.5, max_new_tokens=0, every_layer=False)
