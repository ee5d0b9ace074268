"""Access to the page, and the size of requests: checked before gradio sees them.

Another site can make a visitor's browser send requests here: under a name of its own that resolves
to this machine (DNS rebinding), which ``Host`` shows, or across sites, which ``Origin`` shows.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
_PORTS = {"http": 80, "https": 443}
_MIB = 2**20
MOST_BYTES = _MIB
"""Of a request that is no upload: a question and the state of the page."""
FORM_BYTES = 2**16
"""What a form adds to the file it sends."""


def address_of(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return the address that a host is written as, if it is one."""
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches a host."""
    address = address_of(host)
    return host.lower() == "localhost" or (address is not None and address.is_loopback)


class Gate:
    """ASGI middleware that answers what the application must not see."""

    def __init__(
        self, app: App, host: str, uploads: Path, upload_bytes: int, total_bytes: int
    ) -> None:
        """Guard an application.

        Args:
            app: what is guarded.
            host: the address or name it listens on.
            uploads: folder in which uploads are kept.
            upload_bytes: the most that one upload may hold, all its files together.
            total_bytes: the most that all uploads in the folder may hold.
        """
        self._app, self._uploads = app, uploads
        self._upload_bytes, self._total_bytes = upload_bytes, total_bytes
        self._promised = 0
        """Bytes of uploads on their way."""
        address = address_of(host)
        self._is_open = address is not None and address.is_unspecified
        self._names = {host.strip("[]").lower()}
        if is_loopback(host) or self._is_open:
            self._names |= _LOOPBACK
        if self._is_open:
            name = socket.gethostname().lower()
            self._names |= {name, f"{name}.local"}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer, or let the application answer."""
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        headers: dict[bytes, list[str]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.lower(), []).append(value.decode("latin-1"))
        if not self.is_own(headers.get(b"host", []), headers.get(b"origin", [])):
            return await _refuse(scope, send, 403, "This page answers under its own address only.")
        if scope["type"] == "websocket":
            return await self._app(scope, receive, send)
        size = _size(headers)
        if size is None:
            return await _refuse(scope, send, 411, "Say how long the request is.")
        if not (scope["method"] == "POST" and scope["path"].endswith("/upload")):
            if size > MOST_BYTES:
                return await _refuse(scope, send, 413, "The request is too long.")
            return await self._app(scope, receive, send)
        problem = self._no_room(size)
        if problem:
            return await _refuse(scope, send, 413, problem)
        self._promised += size
        try:
            await self._app(scope, receive, send)
        finally:
            self._promised -= size
        return None

    def is_own(self, hosts: list[str], origins: list[str]) -> bool:
        """Return whether a request is for this page, and comes from it or from no page at all.

        The port may differ, as after a tunnel; an origin must have that of the host.

        Args:
            hosts: what its ``Host`` headers say.
            origins: what its ``Origin`` headers say.
        """
        if len(hosts) != 1 or len(origins) > 1:
            return False
        host = _place(f"http://{hosts[0]}")
        if host is None:
            return False
        # An address cannot be made to lead elsewhere, so an open page answers under all of them.
        if not (host[0] in self._names or (self._is_open and address_of(host[0]) is not None)):
            return False
        if not origins:
            return True
        scheme = origins[0].partition(":")[0]
        return scheme in _PORTS and _place(origins[0]) == _place(f"{scheme}://{hosts[0]}")

    def _no_room(self, size: int) -> str:
        """Return why an upload of so many bytes is not taken, or nothing."""
        if size > self._upload_bytes + FORM_BYTES:
            return f"An upload exceeds the maximum allowed size of {self._upload_bytes} bytes."
        held = sum(map(_bytes_of, self._uploads.rglob("*")))
        if held + self._promised + size > self._total_bytes + FORM_BYTES:
            most = self._total_bytes / _MIB
            return (
                f"The uploads of this page must have at most {most:g} MiB together, got "
                f"{held / _MIB:.0f} MiB; they are removed after an hour."
            )
        return ""


def _bytes_of(file: Path) -> int:
    try:
        return file.stat().st_size if file.is_file() else 0
    except FileNotFoundError:  # removed meanwhile
        return 0


def _size(headers: dict[bytes, list[str]]) -> int | None:
    """Return the bytes of a request's body; None where it does not say."""
    stated = headers.get(b"content-length", ["0"])
    if b"transfer-encoding" in headers or len(stated) != 1 or not stated[0].isdecimal():
        return None
    return int(stated[0])


def _place(url: str) -> tuple[str, int] | None:
    """Return host and port; None if the URL holds more than these, or is damaged."""
    try:
        parts = urlsplit(url)
        port, name = parts.port, parts.hostname
    except ValueError:
        return None
    more = parts.path or parts.query or parts.fragment or "@" in parts.netloc
    if name is None or more:
        return None
    return name, port or _PORTS[parts.scheme]


async def _refuse(scope: Message, send: Send, status: int, line: str) -> None:
    if scope["type"] == "websocket":
        return await send({"type": "websocket.close", "code": 1008, "reason": line})
    kind = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": kind})
    await send({"type": "http.response.body", "body": f"{line}\n".encode()})
    return None
