"""``todre ui``: options, address, port, and the end by Ctrl-C."""

from __future__ import annotations

import socket
import sys
import urllib.error
import urllib.request
from typing import Any

import pytest
from browser import need

from llava_todre.cli import main
from llava_todre.ui import serve
from llava_todre.ui.uploads import Limits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ui", "--num-images", "3"], "num_images must be left out with --ui, got 3"),
        (["--ui", "--methods", "todre"], "methods must be left out with --ui, got ['todre']"),
        (["--port", "8000"], "port must be left out without --ui, got 8000"),
        (["--host", "0.0.0.0"], "host must be left out without --ui, got '0.0.0.0'"),
        (["--ui", "--port", "99999"], "port must be from 1 to 65535, got 99999"),
        (["--ui", "--port", "0"], "port must be from 1 to 65535, got 0"),
        (["--ui", "--model", "no/such/folder"], "no/such/folder"),
        (["--ui", "--backend", "lava"], "Did you mean 'llava'?"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    need("gradio")
    assert main(["demo", *options]) == 1
    assert message in capsys.readouterr().err


def test_without_gradio_one_line_says_how_to_get_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["ui"]) == 1
    assert "pip install 'llava-todre[demo]'" in capsys.readouterr().err


def test_a_taken_port_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    need("gradio")
    with socket.socket() as taken:
        taken.bind((serve.LOCAL, 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["ui", "--port", str(port)]) == 1
    assert f"got {port} of 127.0.0.1" in capsys.readouterr().err


def upload(port: int, content: bytes) -> urllib.request.Request:
    """Return a browser's request that sends a file."""
    head = 'Content-Disposition: form-data; name="files"; filename="a.mp4"'
    body = f"--cut\r\n{head}\r\n\r\n".encode() + content + b"\r\n--cut--\r\n"
    form = {"Content-Type": "multipart/form-data; boundary=cut"}
    return urllib.request.Request(f"http://127.0.0.1:{port}/gradio_api/upload", body, form)


def test_the_command_serves_this_machine_only_and_ends_by_ctrl_c(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    need("gradio")
    with socket.socket() as probe:
        probe.bind((serve.LOCAL, 0))
        port = probe.getsockname()[1]
    seen, sought, seek = [], [], socket.getaddrinfo

    def remember(host: str, *rest: Any, **more: Any) -> Any:
        sought.append(host)
        return seek(host, *rest, **more)

    class Visit:
        """Stands where the command waits for Ctrl-C."""

        def wait(self) -> None:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as page:
                seen.append(b"llava_todre" in page.read())
            with pytest.raises(OSError):  # of this machine as well, but not the one that was named
                socket.create_connection(("127.0.0.2", port), timeout=5)
            with pytest.raises(urllib.error.HTTPError, match="413"):  # too large: not even stored
                urllib.request.urlopen(upload(port, bytes(2000)), timeout=10)
            urllib.request.urlopen(upload(port, bytes(500)), timeout=10).close()
            raise KeyboardInterrupt

    monkeypatch.setattr(socket, "getaddrinfo", remember)
    monkeypatch.setattr(serve, "LIMITS", Limits(video_bytes=1000))
    monkeypatch.setattr(serve, "Event", Visit)
    assert main(["ui", "--port", str(port)]) == 0
    assert seen == [True]
    assert set(sought) == {"127.0.0.1", "127.0.0.2"}, "the server asks no other one either"
    assert f"http://127.0.0.1:{port} shows the page, to this machine" in capsys.readouterr().out
    with pytest.raises(OSError):
        socket.create_connection((serve.LOCAL, port), timeout=5)
