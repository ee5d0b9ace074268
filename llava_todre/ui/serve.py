"""Serving the page: to this machine by default, and without any other server."""

from __future__ import annotations

import signal
import socket
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from pathlib import Path
from threading import Event
from typing import Any

from llava_todre.errors import TodreError
from llava_todre.model.checkpoint import bundled_checkpoint
from llava_todre.ui.gate import Gate, address_of, is_loopback
from llava_todre.ui.page import CSS, build_page
from llava_todre.ui.session import Studio
from llava_todre.ui.uploads import LIMITS

LOCAL = "127.0.0.1"
PORT = 7860
_WAITING = 16
_BUNDLED_NOTE = """The bundled model was trained on drawn scenes like the examples only; it shows
how the methods work and is no evidence about larger models."""


def serve(model_path: str | None, *, host: str = LOCAL, port: int = PORT, **options: Any) -> None:
    """Load a model and show the page until interrupted.

    Args:
        model_path: folder or hub id; the bundled model when None.
        host: the address to listen on; only this machine can reach the default one.
        port: TCP port.
        options: how the model is loaded, see :func:`llava_todre.load`.

    Raises:
        TodreError: gradio is missing, the checkpoint cannot be loaded, or the port is taken.
    """
    _check_address(host, port)  # before minutes of loading
    _gradio()
    studio = Studio(model_path or str(bundled_checkpoint()), **options)
    note = _BUNDLED_NOTE if model_path is None else ""
    if not studio.vlm.draws_tokens:
        note += " Which part of an image each token covers is not known here: nothing is drawn."
    local = is_loopback(host)
    reach = "this machine" if local else "whoever can reach this machine"
    with (
        _ended_as_by_ctrl_c(),
        open_page(studio, model_path or "bundled mini model", note, host, port),
        closing(studio),
        suppress(KeyboardInterrupt),  # the usual end
    ):
        print(f"http://{_written(host)}:{port} shows the page, to {reach}; Ctrl-C ends it.")
        if not local:
            print("Warning: there is no password and no TLS; others can read what is sent.")
        sys.stdout.flush()
        Event().wait()


@contextmanager
def _ended_as_by_ctrl_c() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the page first, so that nothing of it is left."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ends = {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}
    before = {number: signal.signal(number, signal.default_int_handler) for number in ends}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_address(host: str, port: int) -> None:
    """Raise a TodreError unless this machine can listen there."""
    if not 1 <= port <= 65535:
        raise TodreError(f"port must be from 1 to 65535, got {port}.")
    try:
        if not host.strip("[]"):
            raise OSError
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
        for family, kind, protocol, _, place in found[:1]:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(place)
    except (OSError, UnicodeError):
        raise _cannot_be_used(host, port) from None


def _cannot_be_used(host: str, port: int) -> TodreError:
    return TodreError(
        f"port must be free, on an address of this machine such as 127.0.0.1, got {port} of "
        f"{host or repr(host)}."
    )


def _written(host: str) -> str:
    """Return a host as in a URL: IPv6 in brackets."""
    address = address_of(host)
    return host if address is None or address.version == 4 else f"[{address}]"


@contextmanager
def _private_uploads() -> Iterator[None]:
    """Let all that gradio stores go to a folder of this user, removed at the end.

    It is the process's folder for temporary files meanwhile, which is where gradio puts uploads.
    """
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="llava_todre-", ignore_cleanup_errors=True) as folder:
        tempfile.tempdir = folder
        try:
            yield
        finally:
            tempfile.tempdir = before


@contextmanager
def open_page(
    studio: Studio, name: str, note: str = "", host: str = LOCAL, port: int = PORT
) -> Iterator[None]:
    """Serve the page in threads of its own until the block ends.

    Raises:
        TodreError: gradio is missing, or the port is taken.
    """
    gr = _gradio()
    _check_address(host, port)
    with _private_uploads():
        page = build_page(gr, studio, name, note)
        _launch(gr, page, host, port)
        try:
            yield
        finally:
            page.close(verbose=False)


def _launch(gr: Any, page: Any, host: str, port: int) -> None:
    @asynccontextmanager
    async def guarded(app: Any) -> AsyncIterator[None]:
        """Put the gate in front of everything, before the first request."""
        kept, limits = Path(page.GRADIO_CACHE), LIMITS
        app.middleware_stack = Gate(
            app.middleware_stack, host, kept, limits.video_bytes, limits.total_bytes
        )
        yield

    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    theme.set(block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300")
    try:
        page.queue(max_size=_WAITING, api_open=False).launch(
            server_name=_written(host),
            server_port=port,
            share=False,
            prevent_thread_lock=True,
            quiet=True,
            max_file_size=LIMITS.video_bytes,
            ssr_mode=False,
            run_history=False,
            enable_monitoring=False,
            mcp_server=False,
            footer_links=[],
            theme=theme,
            css=CSS,
            app_kwargs={"lifespan": guarded},
        )
    except OSError:
        raise _cannot_be_used(host, port) from None


def _gradio() -> Any:
    try:
        import gradio
    except ImportError:
        raise TodreError("the page needs gradio: pip install 'llava-todre[demo]'.") from None
    return gradio
