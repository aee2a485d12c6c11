"""Bytes of one connection to whole requests, within limits."""

from __future__ import annotations

from collections import deque

import httptools
import msgspec

from penstock.live.http.messages import Limits, Request

_FRAMING = ("content-length", "transfer-encoding")


class Fault(msgspec.Struct, frozen=True):
    """Why a request is refused: status and a message for the client."""

    status: int
    message: str


class Incoming(msgspec.Struct):
    """A whole request; ``modern`` for HTTP/1.1."""

    request: Request
    modern: bool
    keep_alive: bool


class RequestReader:
    """Appends whole requests to ``queue``. After ``fault`` is set it reads no more.

    ``httptools`` (llhttp, strict) refuses what request smuggling is made of: a ``Content-Length`` beside a
    ``Transfer-Encoding``, two or malformed lengths, folded headers, bare line feeds, control characters.
    """

    def __init__(self, limits: Limits, peer: str, queue: deque[Incoming]) -> None:
        self.fault: Fault | None = None
        self.idle = True  # between requests
        self.in_head = False
        self.stage_new = False  # idle, head or body has begun since the owner looked
        self.continue_due = False  # the client waits for "100 Continue" before it sends its body
        self._limits = limits
        self._peer = peer
        self._queue = queue
        self._parser = httptools.HttpRequestParser(self)
        self._deaf = False
        self._resume = b""  # with what a new parser goes on
        self._resuming = False  # its callbacks repeat what is known
        self._head_size = 0  # of what the parser gave us
        self._raw_size = 0  # of what it was given
        self._url = b""
        self._headers: dict[str, str] = {}
        self._body: list[bytes] = []
        self._body_size = 0
        self._modern = True

    def feed(self, data: bytes) -> None:
        """Read bytes as they came."""
        if self._deaf:
            return
        was_in_head, was_idle, known, size = self.in_head, self.idle, len(self._queue), len(data)
        try:
            while data and not self._deaf:
                data = self._parse(data)
        except httptools.HttpParserError as error:
            self._fail(400, f"malformed request: {error}")
        if self.in_head and (was_in_head or was_idle) and len(self._queue) == known:
            # The parser keeps an unfinished header to itself, so bytes that did not end the head are counted here.
            self._raw_size += size
            self._check_head()

    def forget(self) -> None:
        """Let go of the parser, which knows us; nothing is read after this."""
        del self._parser

    def _parse(self, data: bytes) -> bytes:
        """Parse; give what the parser left because a client offered another protocol (``Upgrade: h2c``, say).

        We decline by answering in HTTP/1.1. The parser takes all after such a head for the other protocol, also the
        body, so a new one goes on from a head with the same framing.
        """
        try:
            self._parser.feed_data(data)
            return b""
        except httptools.HttpParserUpgrade as upgrade:
            self._parser = httptools.HttpRequestParser(self)
            resume, self._resume = self._resume, b""
            self._resuming = bool(resume)
            return resume + data[upgrade.args[0] :]

    def on_message_begin(self) -> None:
        if self._resuming:
            return
        self.idle = False
        self.in_head = True
        self.stage_new = True
        self._head_size = 0
        self._raw_size = 0
        self._url = b""
        self._headers = {}
        self._body = []
        self._body_size = 0

    def on_url(self, url: bytes) -> None:
        if self._resuming:
            return
        self._url += url
        self._head_size += len(url)
        self._check_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._resuming:
            return
        key = name.decode("latin-1").lower()
        if key == "host" and key in self._headers:
            self._fail(400, "more than one Host header")
        self._head_size += len(name) + len(value) + 4
        self._check_head()
        if self.in_head and self.fault is None:  # trailers after a chunked body are dropped
            self._headers[key] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.in_head = self._resuming = False
        self.stage_new = True
        version = self._parser.get_http_version()
        self._modern = version == "1.1"
        if version not in ("1.0", "1.1"):
            self._fail(505, "HTTP/1.1 is spoken here")
        elif self._parser.get_method() == b"CONNECT":
            self._fail(400, "this is no proxy")
        elif self._modern and "host" not in self._headers:
            self._fail(400, "no Host header")
        elif not self._modern and "transfer-encoding" in self._headers:
            self._fail(400, "HTTP/1.0 has no Transfer-Encoding")
        elif self._body_claimed() > self._limits.body_bytes:
            self._too_large()
        elif self._headers.get("expect", "").lower() == "100-continue" and self._modern:
            self.continue_due = True

    def on_body(self, data: bytes) -> None:
        self.continue_due = False
        self._body_size += len(data)
        if self._body_size > self._limits.body_bytes:
            self._body = []
            self._too_large()
        elif self.fault is None:
            self._body.append(data)

    def on_message_complete(self) -> None:
        if self._parser.should_upgrade() and self._framed() and self.fault is None:
            self._resume = self._head_again()
            return
        self.idle = True
        self.stage_new = True
        self.continue_due = False
        if self.fault is not None:
            return
        target = self._url.decode("latin-1")
        method = self._parser.get_method().decode("latin-1")
        if "://" in target.partition("?")[0] and not target.startswith("/"):
            target = "/" + target.partition("://")[2].partition("/")[2]  # absolute form, as to a proxy
        if not target.startswith("/") and not (method == "OPTIONS" and target == "*"):
            self._fail(400, "the target must be a path")
            return
        path, _, query = target.partition("#")[0].partition("?")
        body = b"".join(self._body)
        self._body = []
        request = Request(method, path, query, self._headers, body, self._peer)
        self._queue.append(Incoming(request, self._modern, bool(self._parser.should_keep_alive())))

    def _framed(self) -> bool:
        return self._body_claimed() > 0 or "transfer-encoding" in self._headers

    def _head_again(self) -> bytes:
        """Write the request's head once more, with nothing but what frames its body."""
        lines = [f"{self._parser.get_method().decode()} / HTTP/{self._parser.get_http_version()}"]
        lines += [f"{name}: {self._headers[name]}" for name in _FRAMING if name in self._headers]
        if "close" in self._headers.get("connection", "").lower():
            lines.append("connection: close")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

    def _body_claimed(self) -> int:
        return int(self._headers.get("content-length", "0"))  # the parser has let digits through only

    def _check_head(self) -> None:
        if max(self._head_size, self._raw_size) > self._limits.head_bytes:
            self._fail(431, f"the headers are larger than {self._limits.head_bytes} bytes")

    def _too_large(self) -> None:
        self._fail(413, f"the body is larger than {self._limits.body_bytes} bytes")

    def _fail(self, status: int, message: str) -> None:
        self._deaf = True
        if self.fault is None:
            self.fault = Fault(status, message)
