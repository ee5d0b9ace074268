"""Someone who has the demo page open, and what they can see and do."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Visitor:
    browser: Any

    def find(self, selector: str) -> Any:
        return self.browser.find_element("css selector", selector)

    def until(self, holds: Callable[[], Any], what: str, seconds: float = 20.0) -> Any:
        """Wait for something to become true; elements may come and go meanwhile."""
        from selenium.common.exceptions import WebDriverException

        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if found := holds():
                    return found
            except WebDriverException:
                pass
            time.sleep(0.03)
        raise AssertionError(f"not within {seconds} s: {what}; status: {self.status!r}")

    @property
    def status(self) -> str:
        return str(self.find("#status").text)

    def says(self, text: str) -> None:
        self.until(lambda: text in self.status, f"status {text!r}")

    def answer(self, side: str) -> str:
        return str(self.find(f"#{side}-answer textarea").get_property("value"))

    def press(self, name: str) -> None:
        button = self.until(lambda: self.find(f"#{name}:enabled"), f"{name} can be pressed")
        self.browser.execute_script("arguments[0].click()", button)

    def send(self, file: Path) -> None:
        """Upload a file, in place of one that may be there."""
        self.until(
            lambda: (
                not self.browser.find_elements("css selector", "#file [aria-label=Clear]")
                or self.remove()
            ),
            "room for a file",
        )
        self.until(lambda: self.find("#file input[type=file]"), "file input")
        self.find("#file input[type=file]").send_keys(str(file))

    def remove(self) -> None:
        self.find("#file [aria-label=Clear]").click()
