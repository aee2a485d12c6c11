"""HTTP/1.1 client: callbacks for streams, ``fetch`` for whole answers, a keep-alive pool per origin."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from ssl import SSLContext
from typing import cast

from penstock.live.http.messages import Call, Head, HttpFault, Response, Sink
from penstock.live.http.origin import Origin
from penstock.live.http.wire import header_lines

__all__ = ["HttpClient"]


class HttpClient:
    """Calls servers over keep-alive connections, the one used last first.

    Parameters
    ----------
    connect_s : float
        Seconds to wait for a connection.
    idle_s : float
        Seconds to keep an idle connection.
    per_origin : int
        At most this many connections to one origin, further calls wait in order; 0 for no limit.
    tls : ssl.SSLContext or None
        For ``https`` origins; the system's defaults if ``None``.
    """

    def __init__(
        self, connect_s: float = 2.0, idle_s: float = 20.0, per_origin: int = 0, tls: SSLContext | None = None
    ) -> None:
        self._connect_s = connect_s
        self._idle_s = idle_s
        self._per_origin = per_origin
        self._tls = tls
        self._origins: dict[str, Origin] = {}
        self._closed = False

    def open(
        self,
        origin: str,
        method: str,
        path: str,
        sink: Sink,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
    ) -> Call:
        """Begin a call and return at once; ``sink`` hears of the answer from the event loop, never from in here.

        ``origin`` is like ``http://127.0.0.1:8000``, ``path`` goes with its query. A call on a kept connection that
        the server turns out to have closed before any byte of an answer is repeated once on a fresh connection.

        Raises
        ------
        ValueError
            Origin, method, path or a header is malformed.
        """
        if not method.isalpha() or not path.startswith("/") or not path.isascii() or not path.isprintable():
            raise ValueError(f"not a request: {method!r} {path!r}")
        if " " in path:
            raise ValueError(f"a path has no spaces: {path!r}")
        place = self._origins.get(origin)
        if place is None:
            place = self._origins[origin] = Origin(origin, self._connect_s, self._idle_s, self._per_origin, self._tls)
        lines = header_lines(headers) if headers else ""
        if body or method in ("POST", "PUT", "PATCH"):
            lines += f"Content-Length: {len(body)}\r\n"
        head = f"{method} {path} HTTP/1.1\r\nHost: {place.host_header}\r\n{lines}\r\n".encode("latin-1")
        return place.open(head + body, method == "HEAD", sink, self._closed)

    async def fetch(
        self,
        origin: str,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 30.0,
    ) -> Response:
        """Call and wait for the whole answer.

        Raises
        ------
        HttpFault
            There was none, or not within ``timeout_s`` seconds.
        """
        whole = _Whole(asyncio.get_running_loop().create_future())
        call = self.open(origin, method, path, whole, headers, body)
        try:
            async with asyncio.timeout(timeout_s):
                return await whole.answer
        except TimeoutError:
            raise HttpFault(f"no answer within {timeout_s:g} s") from None
        finally:
            call.abort()

    async def close(self) -> None:
        """Close all connections; calls in progress end in a fault."""
        self._closed = True
        for place in self._origins.values():
            place.close()
        while any(place.count for place in self._origins.values()):
            await asyncio.sleep(0)


class _Whole:
    """A sink that gathers a whole response."""

    def __init__(self, answer: asyncio.Future[Response]) -> None:
        self.answer = answer
        self._head: Head | None = None
        self._parts: list[bytes] = []

    def on_head(self, head: Head) -> None:
        self._head = head

    def on_body(self, data: bytes) -> None:
        self._parts.append(data)

    def on_end(self) -> None:
        head = cast(Head, self._head)
        if not self.answer.done():
            self.answer.set_result(Response(head.status, head.headers, b"".join(self._parts)))

    def on_fault(self, fault: HttpFault) -> None:
        if not self.answer.done():
            self.answer.set_exception(fault)
