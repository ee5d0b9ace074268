"""The report in a real browser: nothing missing, nothing asked for, readable on a phone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import chromium, complaints, need, picture_of_all, requests, screen
from PIL import Image

from eval.demo.run import run_demo
from eval.pages.readme import REPRODUCED
from eval.report.command import report


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    need(chromium=True)
    with chromium(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module", params=["demo", "runs"])
def opened(
    request: pytest.FixtureRequest, browser: Any, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    folder = tmp_path_factory.mktemp("report")
    source = REPRODUCED
    if request.param == "demo":
        source = folder / "demo"
        run_demo(None, ["random", "todre"], [0.1], 2, source)
    file = folder / "report.html"
    file.write_text(report(source), encoding="utf-8")
    screen(browser, 1280, 900)
    requests(browser), complaints(browser)
    browser.get(file.as_uri())
    return browser


def test_it_opens_without_errors_or_requests(opened: Any) -> None:
    assert complaints(opened) == []
    asked = requests(opened)
    assert asked and {address.split(":")[0] for address in asked} == {"file", "data"}


def test_tables_and_images_are_there(opened: Any, tmp_path: Path) -> None:
    tables = opened.find_elements("xpath", "//table[not(ancestor::details)]")
    images = opened.find_elements("tag name", "img")
    assert len(tables) >= 3 and all(table.is_displayed() for table in tables)
    assert len(images) >= 8
    widths = [image.get_property("naturalWidth") for image in images]
    assert min(widths) > 100
    drawings = [image for image in images if "svg+xml" in image.get_attribute("src")[:30]]
    assert len(drawings) == 2 and all(image.size["width"] > 700 for image in drawings)
    picture_of_all(opened, 1280, tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as page:
        for image in images:
            left, top = image.location["x"], image.location["y"]
            box = (left, top, left + image.size["width"], top + image.size["height"])
            shown = np.asarray(page.crop(box).convert("L"), dtype=float)
            assert shown.std() > 3, image.get_attribute("alt")


def test_a_phone_shows_it_without_scrolling_the_page_sideways(opened: Any) -> None:
    screen(opened, 390, 844)
    assert opened.execute_script("return document.documentElement.scrollWidth") <= 390
    size = opened.execute_script("return getComputedStyle(document.body).fontSize")
    assert size == "16px"
    drawings = opened.find_elements("css selector", ".charts img")
    assert drawings and all(each.size["width"] > 700 for each in drawings), "text of 6 points"
