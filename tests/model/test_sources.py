"""Where an image may come from, and in which words everything else is refused."""

from __future__ import annotations

import base64
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest

from llava_todre import TodreError, load_image
from llava_todre.files import check_regular, read_mapping
from llava_todre.model import sources
from llava_todre.model.checkpoint import read_json
from llava_todre.model.images import open_picture
from llava_todre.ui.uploads import read_upload
from llava_todre.video import read_clip

PICTURE = Path(__file__).parents[1] / "cases" / "palette_alpha.png"
DATA = PICTURE.read_bytes()
ENCODED = base64.b64encode(DATA).decode()


@pytest.mark.parametrize(
    "uri",
    [
        f"data:image/png;base64,{ENCODED}",
        f"data:;base64,{ENCODED}",
        f"DATA:image/jpeg;charset=x;BASE64,{ENCODED}",  # what it is decides, not what it is called
        f"data:image/png;base64,{ENCODED[:70]}\n {ENCODED[70:]}\n".replace("=", ""),
        f"data:image/png;base64,{quote(ENCODED, safe='')}",
        f"data:image/png,{quote(DATA)}",
    ],
)
def test_a_data_uri_is_the_picture_in_it(uri: str) -> None:
    assert np.array_equal(load_image(uri), load_image(PICTURE))
    assert np.array_equal(open_picture(uri), load_image(PICTURE))


def test_a_tilde_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.png").write_bytes(DATA)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert np.array_equal(load_image("~/x.png"), load_image(PICTURE))
    with pytest.raises(TodreError, match=r"'.*/none\.png' does not exist"):
        load_image(Path("~/none.png"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("data:image/png", "must be a data URI such as data:image/png;base64,"),
        ("data:image/png;base64,@@@@", "'data:image/png;base64,...' is not valid base64"),
        (f"data:image/png;base64,{ENCODED[:4000]}", "'data:image/png;base64,...' is closed, dama"),
        (f"data:{'x' * 9999},aaaa", "must be one of PNG"),
        ("data:text/plain,hello", "'data:text/plain,...' must be one of PNG"),
        ("https://me:secret@host/x.png?key=secret", "'https://host/x.png' is a URL"),
        ("s3://bucket/x.png", r"or an http\(s\) URL, got '(s3|file)"),
        ("file:///etc/passwd", r"or an http\(s\) URL, got '(s3|file)"),
        ("x" * 5000, "cannot be read: File name too long"),
        ("a\0b", "must be a path"),
        (b"x.png", "must be a path"),
        (5, "must be a path"),
        ("/dev/zero", "'/dev/zero' cannot be read: it is not a regular file"),
    ],
)
def test_everything_else_is_one_short_line(source: str, message: str) -> None:
    with pytest.raises(TodreError, match=message) as caught:
        load_image(source)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_what_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_BYTES", len(DATA) - 1)
    for body in (ENCODED, ENCODED * 9):
        with pytest.raises(TodreError, match="'data:;base64,...' must have at most"):
            load_image(f"data:;base64,{body}")


def test_no_reader_waits_at_a_pipe(tmp_path: Path) -> None:
    """Opening one waits for a writer, forever."""
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    for read in (
        lambda: load_image(pipe),
        lambda: read_clip(str(pipe), 4),
        lambda: read_upload(pipe, 4),
        lambda: read_mapping(pipe, "config"),
        lambda: read_json(pipe),
        lambda: open_picture("/dev/stdin" if not os.path.isfile("/dev/stdin") else pipe),
    ):
        with pytest.raises(TodreError, match="it is not a regular file"):
            read()
    check_regular(PICTURE, "image")


# ---------------------------------------------------------------------- URLs


class Handler(BaseHTTPRequestHandler):
    """Answers by the name of what is asked for."""

    def do_GET(self) -> None:  # noqa: N802 (its name there)
        name = self.path.strip("/").partition("?")[0]
        where = {"moved": "/picture", "loop": "/loop", "away": "file:///etc/passwd"}.get(name)
        self.send_response(302 if where else 200 if name != "none" else 404)
        if where:
            self.send_header("Location", where)
        self.end_headers()
        if name == "slow":
            time.sleep(0.3)
        for _ in range(1 if name in ("picture", "slow") else 0):
            self.wfile.write(DATA)
        if name == "endless":
            try:
                while True:
                    self.wfile.write(bytes(2**16))
            except OSError:  # the reader has seen enough
                pass

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


def test_a_url_is_fetched_where_asked_for(server: str) -> None:
    for name in ("picture", "moved"):
        shown = load_image(f"{server}/{name}", allow_urls=True)
        assert np.array_equal(shown, load_image(PICTURE))
    for read in (lambda: load_image(f"{server}/picture"), lambda: open_picture(f"{server}/x")):
        with pytest.raises(TodreError, match=r"load_image\(url, allow_urls=True\), or --allow"):
            read()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none", "cannot be fetched: the server answers 404 Not Found"),
        ("loop", "cannot be fetched: the server answers 302"),
        ("away", "cannot be fetched: the server answers 302"),
        ("empty", "must be one of PNG"),
        ("endless", "must have at most 1 MiB"),
        ("slow", "cannot be fetched: timed out"),
    ],
)
def test_what_a_server_may_do_wrong(
    server: str, name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MAX_BYTES", 2**20)
    monkeypatch.setattr(sources, "_SILENCE", 0.1)
    with pytest.raises(TodreError, match=message) as caught:
        load_image(f"{server}/{name}?token=secret", allow_urls=True)
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/x", "http://127.0.0.1:x/", "http://", "http://[::/"]
)
def test_an_address_that_leads_nowhere_is_one_line(url: str) -> None:
    with pytest.raises(TodreError, match="cannot be fetched"):
        load_image(url, allow_urls=True)


def test_a_server_that_trickles_is_left(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SECONDS", 0.0)
    with pytest.raises(TodreError, match="not finished after 0 seconds"):
        load_image(f"{server}/picture", allow_urls=True)
