"""A real Chromium without a window, for tests that look at pages."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"),
    *("disable-background-networking", "disable-component-update", "disable-sync"),
    *("disable-dev-shm-usage", "force-prefers-reduced-motion", "window-size=1280,1400"),
)


def need(*modules: str, chromium: bool = False) -> None:
    """Skip the test where something is missing; fail it where the environment asks for all tests.

    Args:
        modules: Python packages.
        chromium: whether a browser is needed, and selenium to drive it.
    """
    missing = [name for name in modules if find_spec(name) is None]
    if chromium:
        missing += [] if find_spec("selenium") else ["selenium"]
        missing += [] if CHROMIUM and DRIVER else ["chromium and chromium-driver of Debian"]
    if missing:
        reason = f"not installed: {', '.join(missing)}"
        if os.environ.get("TODRE_PAGE_TESTS") == "required":  # as .ci/run says
            pytest.fail(reason)
        pytest.skip(reason)


@contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """Start a browser with an empty profile, and end it."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"user-data-dir={profile}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        yield browser
    finally:
        browser.quit()


def requests(browser: Any) -> list[str]:
    """Return the addresses that pages asked for since the last call."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [event for event in events if event["method"] == "Network.requestWillBeSent"]
    return [event["params"]["request"]["url"] for event in sent]


def complaints(browser: Any) -> list[str]:
    """Return what the pages wrote to the console as an error since the last call."""
    entries = browser.get_log("browser")
    return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]


def screen(browser: Any, width: int, height: int) -> None:
    """Show the page as on a screen of that many pixels."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
    )


def picture_of_all(browser: Any, width: int, file: Path) -> None:
    """Save the whole page, however long, as PNG."""
    screen(browser, width, 900)
    height = browser.execute_script("return document.documentElement.scrollHeight")
    screen(browser, width, height)
    browser.save_screenshot(str(file))
