"""Who may talk to the page, how much may be sent, and what is left of it: raw requests, no browser.

A stand-in answers no question; the page around it is the real one.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from browser import need
from test_demo_page import free_port

from llava_todre.cli import main
from llava_todre.errors import TodreError
from llava_todre.ui import serve
from llava_todre.ui.gate import FORM_BYTES, MOST_BYTES, Gate, is_loopback
from llava_todre.ui.uploads import Limits

LIMITS = Limits(video_bytes=100_000, total_bytes=150_000)
FOREIGN = ("evil.example", "evil.example:7860", "127.0.0.1.evil.example", "localhost.evil", "")
ODD = ("user@127.0.0.1", "127.0.0.1/x", "127.0.0.1:port", "[::1", "127.0.0.1:99999", "a b")


def gate(host: str) -> Gate:
    return Gate(None, host, Path(), 1, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]", "127.0.0.2"])
def test_a_local_page_answers_under_the_names_of_this_machine_alone(host: str) -> None:
    own = gate(host)
    for name in ("127.0.0.1", "localhost:7860", "LocalHost", "[::1]:7860", "127.0.0.1:8000"):
        assert own.is_own([name], []), name
    for name in (*FOREIGN, *ODD, "10.0.0.1", "192.168.1.5:7860", "0.0.0.0", socket.gethostname()):
        assert not own.is_own([name], []), name
    assert not own.is_own([], []) and not own.is_own(["localhost", "localhost"], [])
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_an_open_page_answers_under_every_address_and_its_own_names(host: str) -> None:
    own = gate(host)
    for name in ("10.0.0.1:7860", "[2001:db8::1]:7860", "localhost", socket.gethostname()):
        assert own.is_own([name], []), name
    for name in (*FOREIGN, *ODD):
        assert not own.is_own([name], []), name
    assert not is_loopback(host)


def test_a_page_at_one_address_answers_under_that_one() -> None:
    own = gate("192.168.1.5")
    assert own.is_own(["192.168.1.5:7860"], []) and gate("box.lan").is_own(["BOX.lan:1"], [])
    for name in (*FOREIGN, *ODD, "192.168.1.6", "localhost"):
        assert not own.is_own([name], []), name


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_an_origin_is_the_host_itself(host: str) -> None:
    own = gate(host)
    for name, origin in (
        ("127.0.0.1:7860", "http://127.0.0.1:7860"),
        ("localhost", "http://localhost"),
        ("localhost", "https://localhost"),  # behind something that speaks TLS
        ("[::1]:7860", "http://[::1]:7860"),
    ):
        assert own.is_own([name], [origin]), origin
    for origin in (
        *("http://evil.example", "null", "", "http://127.0.0.1:3000", "http://localhost:7860"),
        *("file://", "http://127.0.0.1:7860.evil.example", "chrome-extension://abc", "http://"),
        *("http://user@127.0.0.1:7860", "http://127.0.0.1:7860/path", "http://127.0.0.1:x"),
    ):
        assert not own.is_own(["127.0.0.1:7860"], [origin]), origin
    assert not own.is_own(["127.0.0.1:7860"], ["http://127.0.0.1:7860"] * 2)


# ---------------------------------------------------------------- a real page


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    need("gradio")
    patch = pytest.MonkeyPatch()
    patch.setattr(serve, "LIMITS", LIMITS)
    studio: Any = SimpleNamespace(methods=lambda: ["vanilla", "todre"])
    number = free_port()
    with serve.open_page(studio, "nobody", port=number):
        yield number
    patch.undo()


def status(port: int, first: str, *headers: str, body: bytes = b"") -> int:
    """Return the status of a request that is sent as it stands."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        head = "\r\n".join([f"{first} HTTP/1.1", *headers, "Connection: close"])
        connection.sendall(f"{head}\r\n\r\n".encode() + body)
        answer = b""
        while b"\r\n" not in answer:
            answer += connection.recv(4096) or b"\r\n"
    return int(answer.split()[1])


def upload(port: int, *files: bytes, host: str = "", origin: str = "") -> int:
    """Return the status of a browser's request that sends files."""
    head = 'Content-Disposition: form-data; name="files"; filename="a.mp4"'
    body = b"".join(f"--cut\r\n{head}\r\n\r\n".encode() + each + b"\r\n" for each in files)
    body += b"--cut--\r\n"
    headers = [f"Host: {host or f'127.0.0.1:{port}'}", f"Content-Length: {len(body)}"]
    headers += ["Content-Type: multipart/form-data; boundary=cut"]
    headers += [f"Origin: {origin}"] if origin else []
    return status(port, "POST /gradio_api/upload", *headers, body=body)


@pytest.mark.parametrize(
    "first",
    ["GET /", "GET /config", "GET /gradio_api/queue/data?session_hash=a", "OPTIONS /"],
)
def test_foreign_hosts_and_origins_get_nothing(port: int, first: str) -> None:
    own = f"127.0.0.1:{port}"
    assert status(port, first, f"Host: {own}") != 403
    assert status(port, first, f"Host: evil.example:{port}") == 403
    assert status(port, first, f"Host: {own}", "Origin: http://evil.example") == 403
    assert status(port, first, f"Host: {own}", "Origin: null") == 403
    assert status(port, first, "Host: a", "Host: b") in (400, 403)


@pytest.mark.parametrize("kind", ["websocket", "http"])
def test_what_is_refused_does_not_reach_the_page(kind: str) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def page(*given: Any) -> None:
        pytest.fail("the page was asked")

    for headers in ([(b"host", b"evil.example")], [(b"host", b"localhost"), (b"origin", b"null")]):
        scope = {"type": kind, "method": "GET", "path": "/", "headers": headers}
        asyncio.run(Gate(page, "127.0.0.1", Path(), 1, 1)(scope, None, send))  # type: ignore
    answers = [message.get("status", message.get("code")) for message in sent]
    assert set(answers) == ({1008} if kind == "websocket" else {403, None})


def test_uploads_of_other_sites_are_refused_and_not_stored(port: int) -> None:
    before = sorted(Path(tempfile.gettempdir()).rglob("*.mp4"))
    assert upload(port, b"x" * 50, origin="http://evil.example") == 403
    assert upload(port, b"x" * 50, host=f"evil.example:{port}") == 403
    assert sorted(Path(tempfile.gettempdir()).rglob("*.mp4")) == before
    assert upload(port, b"x" * 50, origin=f"http://127.0.0.1:{port}") == 200


def test_the_files_of_one_upload_count_together(port: int) -> None:
    half = LIMITS.video_bytes // 2
    assert upload(port, bytes(half), origin=f"http://127.0.0.1:{port}") == 200
    assert upload(port, *[bytes(half)] * 4) == 413


def test_a_request_says_how_long_it_is_and_is_not_too_long(port: int) -> None:
    own = f"Host: 127.0.0.1:{port}"
    join = "POST /gradio_api/queue/join"
    assert status(port, join, own, "Transfer-Encoding: chunked") == 411
    assert status(port, "POST /gradio_api/upload", own, "Transfer-Encoding: chunked") == 411
    assert status(port, join, own, f"Content-Length: {MOST_BYTES + 1}") == 413
    assert status(port, join, own, "Content-Length: 2", body=b"{}") == 422


def test_all_uploads_together_have_a_limit(port: int) -> None:
    answers = [upload(port, bytes([index]) * 60_000) for index in range(5)]
    assert answers[0] == 200 and answers[-1] == 413
    held = sum(file.stat().st_size for file in Path(tempfile.gettempdir()).rglob("*.mp4"))
    assert held <= LIMITS.total_bytes + FORM_BYTES


def test_uploads_are_kept_in_a_private_folder_that_goes_with_the_page() -> None:
    need("gradio")
    usual = tempfile.gettempdir()
    number = free_port()
    studio: Any = SimpleNamespace(methods=lambda: ["vanilla", "todre"])
    with serve.open_page(studio, "nobody", port=number):
        folder = Path(tempfile.gettempdir())
        assert str(folder) != usual and folder.stat().st_mode & 0o77 == 0
        assert upload(number, b"x" * 50) == 200
        assert [file.read_bytes() for file in folder.rglob("*.mp4")] == [b"x" * 50]
    assert not folder.exists() and tempfile.gettempdir() == usual


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize("host", ["", " ", "[]", "http://127.0.0.1", "127.0.0.1:80", "203.0.113.9"])
def test_hosts_that_are_none_are_refused_before_anything_is_loaded(
    host: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    need("gradio")
    monkeypatch.setattr(serve, "Studio", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(TodreError, match="port must be free, on .* got 7860 of "):
        serve.serve(None, host=host)
    assert main(["ui", "--host", host]) == 1
    error = capsys.readouterr().err
    assert "host" in error or "port must be free" in error
    assert error.count("\n") == 1


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the command load no model."""
    need("gradio")

    class Nobody:
        vlm = SimpleNamespace(draws_tokens=True)

        def __init__(self, *given: Any, **options: Any) -> None:
            self.methods = lambda: ["vanilla", "todre"]

        def close(self) -> None:
            pass

    monkeypatch.setattr(serve, "Studio", Nobody)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "::1", "localhost"])
def test_an_open_page_warns_and_is_reached(
    host: str, nobody: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    number = free_port()
    try:
        serve._check_address(host, number)
    except TodreError:
        pytest.skip("no IPv6 here")
    reached = "::1" if ":" in host else "127.0.0.1"

    class Visit:
        def wait(self) -> None:
            with socket.create_connection((reached, number), timeout=5):
                pass
            raise KeyboardInterrupt

    monkeypatch.setattr(serve, "Event", Visit)
    assert main(["ui", "--host", host, "--port", str(number)]) == 0
    told = capsys.readouterr().out
    written = f"[{host}]" if ":" in host else host
    assert f"http://{written}:{number} shows the page" in told
    is_open = host in ("0.0.0.0", "::")
    assert ("no password and no TLS" in told) == ("whoever can reach" in told) == is_open


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_who_ends_the_process_ends_the_page_first(
    name: str, nobody: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    number, port = getattr(signal, name), free_port()
    folders = []

    class Ended:
        def wait(self) -> None:
            assert upload(port, b"x" * 50) == 200
            folders.append(Path(tempfile.gettempdir()))
            os.kill(os.getpid(), number)
            time.sleep(5)
            pytest.fail("nothing came of it")

    before = signal.getsignal(number)
    monkeypatch.setattr(serve, "Event", Ended)
    assert main(["ui", "--port", str(port)]) == 0
    assert not folders[0].exists() and signal.getsignal(number) == before
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
