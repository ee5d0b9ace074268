"""Opening the page: to this machine only, unless told otherwise, and without any other server."""

from __future__ import annotations

from threading import Event
from typing import Any

from llava_todre.demo import bundled_checkpoint
from llava_todre.errors import TodreError
from llava_todre.model.prompt import AUTO
from llava_todre.ui.page import CSS, build_page
from llava_todre.ui.studio import Studio
from llava_todre.ui.uploads import LIMITS

LOCAL = "127.0.0.1"
PORT = 7860
_WAITING = 16
_BUNDLED_NOTE = """The bundled model has learnt drawn scenes like the examples, and nothing else; it
shows how the methods work and is no evidence about larger models."""


def serve(
    model_path: str | None,
    backend: str = "auto",
    template: str = AUTO,
    *,
    host: str = LOCAL,
    port: int = PORT,
) -> None:
    """Load a model and show the page until interrupted.

    Args:
        model_path: folder or hub id; the bundled model when None.
        backend: llava, transformers or auto, see :class:`~llava_todre.ui.studio.Studio`.
        template: conversation template, of our class; auto is the checkpoint's own.
        host: the address to listen on; only this machine can reach the default one.
        port: TCP port.

    Raises:
        TodreError: gradio is missing, the checkpoint cannot be loaded, or the port is taken.
    """
    if not 1 <= port <= 65535:
        raise TodreError(f"port {port} is out of range; allowed: 1 to 65535.")
    _gradio()  # before minutes of loading
    studio = Studio(model_path or str(bundled_checkpoint()), backend, template)
    note = _BUNDLED_NOTE if model_path is None else ""
    if not studio.draws_pictures:
        note += " What part of a picture each token sees is not known here, so nothing is drawn."
    page = open_page(studio, model_path or "bundled mini model", note, host, port)
    is_local = host in (LOCAL, "localhost", "::1")
    reach = "this machine" if is_local else "whoever can reach this machine"
    try:
        print(f"http://{host}:{port} shows the page, to {reach}; Ctrl-C ends it.", flush=True)
        Event().wait()
    except KeyboardInterrupt:
        pass  # the way to end it
    finally:
        studio.close()
        page.close(verbose=False)


def open_page(
    studio: Studio, name: str, note: str = "", host: str = LOCAL, port: int = PORT
) -> Any:
    """Serve the page in threads of its own; returns gradio's Blocks, whose ``close`` ends it.

    Raises:
        TodreError: gradio is missing, or the port is taken.
    """
    gr = _gradio()
    page = build_page(gr, studio, name, note)
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    theme.set(block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300")
    try:
        page.queue(max_size=_WAITING, api_open=False).launch(
            server_name=host,
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
        )
    except OSError:
        raise TodreError(
            f"port {port} of {host} cannot be used; allowed: a free port of an address that this "
            "machine has."
        ) from None
    return page


def _gradio() -> Any:
    try:
        import gradio
    except ImportError:
        raise TodreError("the page needs gradio: pip install 'llava-todre[demo]'.") from None
    return gradio
