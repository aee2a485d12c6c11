"""The server's side of one answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from penstock.live.http.messages import Request
from penstock.live.http.wire import bodiless, header_lines, status_head


class Line(Protocol):
    """What an answer needs of its connection."""

    def put(self, data: bytes) -> None:
        """Send bytes."""

    def overrun(self) -> bool:
        """Cut off a reader that lets too much pile up; say whether that happened."""

    def answered(self) -> None:
        """The answer has ended; the connection may go on."""

    def cut(self, hard: bool) -> None:
        """Close the connection now; ``hard`` with a reset, where a plain close would look like a proper end."""


class Reply:
    """The answer to ``request``: either one ``send``, or ``start``, any ``write`` and ``end``. Nothing here waits.

    All calls after the client has gone, or after the end, do nothing. ``on_disconnect`` is called once, from the event
    loop and never from inside a call here, if the client goes away first: it closed its side (half-closing counts),
    or was cut off because it did not read; a handler that sets it only later looks at ``closed`` first. ``congested``
    says that output piles up; ``on_drain`` is called when that has passed. Headers with control characters raise
    ``ValueError``.
    """

    __slots__ = (
        "_chunked",
        "_keep_alive",
        "_line",
        "_modern",
        "_put",
        "closed",
        "congested",
        "on_disconnect",
        "on_drain",
        "request",
        "started",
    )

    def __init__(self, request: Request, line: Line, modern: bool, keep_alive: bool) -> None:
        self.request = request
        self.closed = False
        self.started = False
        self.congested = False
        self.on_disconnect: Callable[[], None] | None = None
        self.on_drain: Callable[[], None] | None = None
        self._line = line
        self._put = line.put
        self._modern = modern  # HTTP/1.1: chunks are understood
        self._keep_alive = keep_alive
        self._chunked = False

    def send(
        self,
        status: int,
        body: bytes,
        content_type: str = "application/json",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Send the whole answer."""
        if self.closed:
            return
        lines = "" if bodiless(status) else f"Content-Length: {len(body)}\r\n"
        head = self._head(status, content_type, headers, lines)
        silent = bodiless(status) or self.request.method == "HEAD"
        self._put(head if silent else head + body)
        self._over()

    def start(
        self,
        status: int = 200,
        content_type: str = "text/event-stream; charset=utf-8",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Begin a streamed answer: chunked, or up to the close of the connection for a client of HTTP/1.0."""
        if self.closed:
            return
        silent = bodiless(status) or self.request.method == "HEAD"
        if not self._modern and not silent:
            self._keep_alive = False
        framing = "Transfer-Encoding: chunked\r\n" if self._modern and not bodiless(status) else ""
        self._put(self._head(status, content_type, headers, framing))
        self._chunked = self._modern and not silent
        if silent:
            self._put = _nowhere

    def write(self, data: bytes) -> None:
        """Send ``data`` as one chunk, now."""
        if self.closed or not data:  # an empty chunk would end the stream
            return
        if self.congested and self._line.overrun():
            self.closed = True
            return
        if self._chunked:
            self._put(b"%x\r\n%b\r\n" % (len(data), data))
        elif self.started:
            self._put(data)
        else:
            raise RuntimeError("write before start")

    def end(self) -> None:
        """End a streamed answer properly."""
        if self.closed:
            return
        if not self.started:
            raise RuntimeError("end before start")
        if self._chunked:
            self._put(b"0\r\n\r\n")
        self._over()

    def drop(self) -> None:
        """Close the connection without a proper end, so that nobody takes the answer for complete."""
        if not self.closed:
            self.closed = True
            self.forget()
            self._line.cut(hard=not self._chunked)

    @property
    def keep_alive(self) -> bool:
        """Whether another request may follow on this connection."""
        return self._keep_alive

    def close_after(self) -> None:
        """Let the connection end with this answer."""
        self._keep_alive = False

    def _head(self, status: int, content_type: str, headers: Mapping[str, str] | None, lines: str) -> bytes:
        if self.started:
            raise RuntimeError("the answer has been started already")
        if content_type and not bodiless(status):
            lines += header_lines({"Content-Type": content_type})
        if headers:
            lines += header_lines(headers)
        if not self._keep_alive:
            lines += "Connection: close\r\n"
        elif not self._modern:
            lines += "Connection: keep-alive\r\n"
        head = status_head(status, lines)
        self.started = True
        return head

    def forget(self) -> None:
        """Let go of the listeners, which often know this answer: what is in no cycle is freed at once."""
        self.on_disconnect = self.on_drain = None

    def _over(self) -> None:
        self.closed = True
        self.forget()
        self._line.answered()


def _nowhere(data: bytes) -> None:
    """Take the body of an answer that has none."""
