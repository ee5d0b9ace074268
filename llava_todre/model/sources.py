"""Where the bytes of an image come from: a file, a data URI or, only if allowed, a URL."""

from __future__ import annotations

import base64
import http.client
import os
import re
import time
import urllib.request
from io import BytesIO
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import unquote_to_bytes

from llava_todre.errors import TodreError
from llava_todre.files import check_regular
from llava_todre.version import __version__

MAX_BYTES = 20 * 2**20
"""Of an image that comes from elsewhere: a data URI, a URL, an upload."""
SECONDS = 30.0
"""How long the content of a URL may take."""
_SILENCE = 10.0
"""How long a server may send nothing."""
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_SHOWN = 200
"""Characters of a name in a message."""


def called(source: str | os.PathLike[str]) -> str:
    """Return how messages name a source: without the data in it, or the secrets of a URL."""
    text = str(source)
    if _is_data(text):
        return repr(text[:5] + text[5 : text.find(",") + 1][:40] + "...")
    if _SCHEME.match(text):
        text = re.sub(r"//[^/]*@", "//", re.split("[?#]", text)[0])
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")


def open_source(source: str | os.PathLike[str], allow_urls: bool = False) -> Path | BytesIO:
    """Return a file to read, or what a data URI or a URL holds.

    Args:
        source: a path, in which ``~`` is the home directory; a data URI; or an http(s) URL.
        allow_urls: whether a URL is fetched.

    Raises:
        TodreError: nothing there, not a regular file, not allowed, or more than ``MAX_BYTES``.
    """
    text = os.fspath(source) if isinstance(source, os.PathLike) else source
    if not isinstance(text, str) or "\0" in text:
        raise TodreError(f"image must be a path without NUL characters, got {source!r}.")
    if _is_data(text):
        return BytesIO(_data(text))
    scheme = _SCHEME.match(text)
    if scheme is None:
        return _file(text)
    if scheme[1].lower() not in ("http", "https"):
        raise TodreError(f"image must be a file or an http(s) URL, got {called(text)}.")
    if not allow_urls:
        raise TodreError(
            f"image {called(text)} is a URL, which is fetched only with "
            "load_image(url, allow_urls=True), or --allow-urls in a shell."
        )
    return BytesIO(_fetched(text))


def _is_data(text: str) -> bool:
    return text[:5].lower() == "data:"


def _file(text: str) -> Path:
    path = Path(os.path.expanduser(text))
    try:
        is_directory = path.is_dir()
        path.stat()
    except FileNotFoundError:
        raise TodreError(f"image {called(path)} does not exist.") from None
    except OSError as error:
        raise TodreError(f"image {called(path)} cannot be read: {error.strerror}.") from None
    if is_directory:
        raise TodreError(f"image {called(path)} is a directory; give one image file.")
    check_regular(path, "image")
    return path


def _data(text: str) -> bytes:
    """Return what a data URI holds, base64 or percent-encoded (RFC 2397)."""
    head, comma, body = text.partition(",")
    if not comma:
        raise TodreError(
            f"image must be a data URI such as data:image/png;base64,..., got {called(text)}."
        )
    if len(body) > 4 * MAX_BYTES:  # more than any encoding of that many bytes but the wasteful
        raise _too_large(text)
    content = unquote_to_bytes(body)
    if head.lower().endswith(";base64"):
        content = b"".join(content.split()).rstrip(b"=")
        try:
            content = base64.b64decode(content + b"=" * (-len(content) % 4), validate=True)
        except ValueError as error:
            raise TodreError(f"image {called(text)} is not valid base64: {error}.") from None
    if len(content) > MAX_BYTES:
        raise _too_large(text)
    return content


def _too_large(source: str) -> TodreError:
    most = MAX_BYTES // 2**20
    return TodreError(f"image {called(source)} must have at most {most} MiB, got more.")


class _FewRedirects(urllib.request.HTTPRedirectHandler):
    max_redirections = 3


def _fetched(url: str) -> bytes:
    """Return what a URL holds; no other kind of address is opened on the way."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
        _FewRedirects,
    ):
        opener.add_handler(handler())
    end = time.monotonic() + SECONDS
    content = bytearray()
    try:
        request = urllib.request.Request(url, headers={"User-Agent": f"llava_todre/{__version__}"})
        with opener.open(request, timeout=_SILENCE) as answer:
            while part := answer.read1(2**16):
                content += part
                if len(content) > MAX_BYTES:
                    raise _too_large(url)
                if time.monotonic() > end:
                    raise TimeoutError(f"not finished after {SECONDS:g} seconds")
    except HTTPError as error:
        reason = f"the server answers {error.code} {error.reason}"
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        reason = str(getattr(error, "reason", None) or error) or type(error).__name__
    except TodreError:
        raise
    except ValueError as error:  # such as a port that is none
        reason = str(error)
    else:
        return bytes(content)
    raise TodreError(f"image {called(url)} cannot be fetched: {' '.join(reason.split())}.")
