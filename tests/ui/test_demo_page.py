"""The demo page in a real browser, with the bundled model behind it."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import chromium, complaints, need, picture_of_all, requests, screen
from PIL import Image
from visitor import Visitor

from llava_todre.model.checkpoint import bundled_checkpoint
from llava_todre.ui.serve import open_page
from llava_todre.ui.session import Studio

av = pytest.importorskip("av", reason="PyAV is not installed (make setup)")
SCENE = Path(__file__).parents[2] / "checkpoints" / "mini" / "examples" / "scene_1.png"


@pytest.fixture(scope="module")
def studio() -> Studio:
    return Studio(str(bundled_checkpoint()))


@pytest.fixture
def slow(studio: Studio) -> Iterator[Callable[[float], None]]:
    """Make every decoder layer of the bundled model wait for so many seconds."""
    handles = []

    def wait(seconds: float) -> None:
        for layer in studio.vlm.decoder.layers:
            hook = layer.register_forward_hook(lambda *_: time.sleep(seconds))
            handles.append(hook)

    yield wait
    for handle in handles:
        handle.remove()


@pytest.fixture
def talkative(studio: Studio) -> Iterator[None]:
    """Let the bundled model write on until the longest answer is reached."""
    config = studio.vlm.model.generation_config
    config.eos_token_id, usual = None, config.eos_token_id
    yield
    config.eos_token_id = usual


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def address(studio: Studio) -> Iterator[str]:
    """Where the page is served."""
    port = free_port()
    with open_page(studio, "bundled mini model", port=port):
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    need("gradio", chromium=True)
    with chromium(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture
def visitor(browser: Any, address: str) -> Visitor:
    """Open the page afresh."""
    screen(browser, 1280, 1400)
    browser.get(address)
    someone = Visitor(browser)
    someone.until(lambda: someone.find("#ask:enabled"), "the page is there")
    browser.get_log("performance")
    browser.get_log("browser")
    return someone


def clip(file: Path, num_frames: int = 6) -> Path:
    """Write a short video of a scene that moves."""
    scene = Image.open(SCENE).convert("RGB").resize((128, 96))
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for shift in range(num_frames):
            frame = np.roll(np.asarray(scene), 8 * shift, axis=1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file


def pictures(visitor: Visitor, side: str) -> list[Any]:
    """Return the pictures of kept tokens that are really drawn."""
    found = visitor.browser.find_elements("css selector", f"#{side}-kept img")
    return [image for image in found if int(image.get_property("naturalWidth")) > 100]


def test_a_question_is_answered_on_both_sides(visitor: Visitor, tmp_path: Path) -> None:
    visitor.press("ask")
    visitor.says("Done.")
    assert (visitor.answer("left"), visitor.answer("right")) == ("3 4 4", "3 4 4")
    left, right = (visitor.find(f"#{side}-facts").text for side in ("left", "right"))
    assert "Method vanilla\n" in left and "Method todre 10%\n" in right
    assert "320 of 320 (100.0%)" in left and "Withdrawn never" in left
    assert "32 of 320 (10.0%)" in right and "Withdrawn from layer 9 on" in right
    for facts in (left, right):
        assert all(stage in facts for stage in ("vision tower", "selection", "prefill", "ms"))
    for side in ("left", "right"):
        visitor.until(lambda side=side: pictures(visitor, side), f"picture on the {side}")
        assert visitor.find(f"#{side}-kept img").get_attribute("alt")
        points = visitor.find(f"#{side}-chart polyline").get_attribute("points")
        assert len(points.split()) == (10 if side == "left" else 9)
    assert "layer 9 on" in visitor.find("#right-chart").text

    for width in (1280, 390):
        picture_of_all(visitor.browser, width, tmp_path / f"{width}.png")
        page = np.asarray(Image.open(tmp_path / f"{width}.png").convert("L"))
        assert page.shape[1] == width and page.std() > 20
        script = "return document.documentElement.scrollWidth"
        assert visitor.browser.execute_script(script) <= width, "nothing sticks out sideways"
    assert complaints(visitor.browser) == []


def test_the_page_asks_no_other_server_for_anything(visitor: Visitor, address: str) -> None:
    visitor.browser.refresh()
    visitor.until(lambda: visitor.find("#ask:enabled"), "the page is there")
    visitor.press("ask")
    visitor.says("Done.")
    asked = requests(visitor.browser)
    assert any(url.startswith(address) for url in asked)
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]


def test_every_control_has_a_name(visitor: Visitor) -> None:
    script = """return [...document.querySelectorAll('input, textarea, button, select')]
      .filter(each => each.offsetParent !== null)
      .filter(each => !(each.labels?.length || each.ariaLabel || each.title
        || each.textContent.trim() || each.querySelector('img[alt]')
        || each.closest('label')?.textContent.trim()))
      .map(each => each.outerHTML)"""
    assert visitor.browser.execute_script(script) == []


def test_a_method_without_a_budget_takes_none(visitor: Visitor) -> None:
    def share(side: str) -> Any:
        return visitor.find(f"#{side}-ratio input[type=number]")

    assert not share("left").is_enabled() and share("right").is_enabled()
    method = visitor.find("#left-method input")
    method.clear()
    method.send_keys("todre\n")
    visitor.until(lambda: share("left").is_enabled(), "a share can be chosen for todre")


def test_broken_uploads_are_named_and_the_page_goes_on(visitor: Visitor, tmp_path: Path) -> None:
    whole = tmp_path / "whole.jpg"
    Image.open(SCENE).convert("RGB").resize((640, 640)).save(whole)
    broken = {
        "text.png": (
            b"this is no picture\n" * 50,
            "must be an image (PNG, JPEG",
        ),
        "half.jpg": (whole.read_bytes()[:4000], "'half.jpg' is closed, damaged or unreadable"),
        "empty.mp4": (b"", "short video (MP4, MOV, WebM, MKV, AVI), got an empty file"),
        "cut.mp4": (clip(tmp_path / "clip.mp4").read_bytes()[:600], "'cut.mp4' is damaged"),
        "large.png": (b"\x89PNG\r\n\x1a\n" + bytes(21 << 20), "20 MiB as an image, got 21.0 MiB"),
    }
    for name, (content, message) in broken.items():
        (tmp_path / name).write_bytes(content)
        visitor.send(tmp_path / name)
        visitor.says(message)
        assert str(tmp_path) not in visitor.status and "gradio" not in visitor.status
        visitor.press("ask")
        visitor.says("There is no image yet")
    visitor.send(whole)
    visitor.until(lambda: visitor.status == "", "the problem is gone")
    visitor.press("ask")
    visitor.says("Done.")
    assert visitor.answer("left") and pictures(visitor, "right")


def test_a_video_is_shown_by_its_frames(visitor: Visitor, tmp_path: Path) -> None:
    visitor.send(clip(tmp_path / "clip.mp4"))
    before = visitor.find("#shown img").get_attribute("src")
    visitor.until(lambda: visitor.find("#shown img").get_attribute("src") != before, "frames")
    visitor.press("ask")
    visitor.says("Done.")
    assert "384 of 384" in visitor.find("#left-facts").text  # 6 frames of 64 patches
    assert "38 of 384" in visitor.find("#right-facts").text
    visitor.until(lambda: pictures(visitor, "right"), "frames with kept tokens")


def test_stop_ends_the_reading_of_a_prompt(visitor: Visitor, slow: Callable[[float], None]) -> None:
    slow(1.0)
    visitor.press("ask")
    visitor.says("every layer: reads the prompt, layer 2 of 10")
    visitor.press("stop")
    visitor.until(lambda: visitor.status == "Stopped.", "stopped within a layer or two", 4)
    assert visitor.answer("left") == visitor.answer("right") == ""
    assert visitor.find("#ask").is_enabled() and not visitor.find("#stop").is_enabled()


def test_stop_ends_an_answer_and_keeps_what_there_is(
    visitor: Visitor, slow: Callable[[float], None], talkative: None
) -> None:
    slow(0.02)
    visitor.press("ask")
    visitor.until(lambda: len(visitor.answer("left")) > 8, "words appear one by one")
    visitor.press("stop")
    visitor.until(lambda: visitor.status == "Stopped.", "stopped", 5)
    assert len(visitor.answer("left")) > 8 and visitor.answer("right") == ""
    assert "(stopped)" in visitor.find("#left-facts").text
    visitor.until(lambda: pictures(visitor, "left"), "the picture of the left side")
    assert visitor.find("#left-chart polyline") and visitor.find("#ask").is_enabled()


def test_a_visitor_who_leaves_does_not_hold_up_the_next(
    visitor: Visitor, address: str, slow: Callable[[float], None]
) -> None:
    slow(0.5)
    visitor.press("ask")
    visitor.says("every layer: reads the prompt")
    visitor.browser.get(address)
    visitor.until(lambda: visitor.find("#ask:enabled"), "the page is there again")
    visitor.press("ask")
    visitor.says("every layer: reads the prompt")
    visitor.press("stop")
    visitor.says("Stopped.")
