"""The server's connection on a transport in memory: any cut of any requests, and any garbage."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from penstock.live.http import HttpServer, Limits, Reply
from penstock.live.http.connection import Connection
from tests.live.http.support import MemoryTransport, cuts

LIMITS = Limits(head_bytes=2000, body_bytes=3000)
BODY = st.binary(max_size=300)


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


class Conversation:
    """A connection whose handler answers at once, or when ``answer_all`` is called."""

    def __init__(self, loop: asyncio.AbstractEventLoop, at_once: bool) -> None:
        self.replies: list[Reply] = []
        self.requests: list[tuple[str, str, bytes]] = []
        self.at_once = at_once
        self.transport = MemoryTransport()
        server = HttpServer(self.handle, LIMITS)
        self.connection = Connection(server, loop)
        self.connection.connection_made(self.transport)

    def handle(self, reply: Reply) -> None:
        request = reply.request
        self.requests.append((request.method, request.path, request.body))
        self.replies.append(reply)
        if self.at_once:
            reply.send(200, request.body)

    def feed(self, data: bytes) -> None:
        if not self.transport.closing and self.transport.reading:
            self.connection.data_received(data)

    def answer_all(self) -> None:
        done = 0
        while done < len(self.replies):
            reply = self.replies[done]
            assert done == len(self.replies) - 1, "a request was handed over before the answer to the one before"
            done += 1
            reply.start(200)
            reply.write(b"<" + reply.request.body + b">")
            reply.end()

    def close(self) -> None:
        self.connection.connection_lost(None)


def on_the_wire(method: str, path: str, body: bytes, chunks: list[int]) -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: a\r\nX-Pad: 1\r\n".encode()
    if method == "GET":
        return head + b"\r\n"
    if not chunks:
        return head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    pieces = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in cuts(body, chunks) if piece)
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + pieces + b"0\r\n\r\n"


REQUEST = st.tuples(
    st.sampled_from(["GET", "POST"]), st.sampled_from(["/", "/v1/x?y=1"]), BODY, st.lists(st.integers(0, 300))
)


@given(st.lists(REQUEST, max_size=6), st.lists(st.integers(0, 10_000), max_size=40), st.booleans())
def test_requests_arrive_whole_and_in_order(
    loop: asyncio.AbstractEventLoop,
    requests: list[tuple[str, str, bytes, list[int]]],
    places: list[int],
    at_once: bool,
) -> None:
    talk = Conversation(loop, at_once)
    for piece in cuts(b"".join(on_the_wire(*request) for request in requests), places):
        talk.feed(piece)
    if not at_once:
        assert len(talk.requests) <= 1
        talk.answer_all()
    expected = [
        (method, path.partition("?")[0], body if method == "POST" else b"") for method, path, body, _ in requests
    ]
    assert talk.requests == expected
    assert talk.transport.written.count(b"HTTP/1.1 200 OK\r\n") == len(requests)
    if not at_once:
        assert [body for _, _, body in expected] == [
            match.split(b"\r\n", 1)[1][1 : int(match.split(b"\r\n", 1)[0], 16) - 1]
            for match in talk.transport.written.split(b"event-stream; charset=utf-8\r\n\r\n")[1:]
        ]
    talk.close()


VALID = on_the_wire("POST", "/p", b"hello", [2])


@given(st.binary(max_size=400), st.lists(st.integers(0, 1000), max_size=10), st.integers(0, len(VALID)))
@example(b"\x16\x03\x01\x02\x00\x01", [], 0)  # a TLS client
@example(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [], 0)  # an HTTP/2 client
def test_garbage_is_refused_or_awaited(
    loop: asyncio.AbstractEventLoop, garbage: bytes, places: list[int], prefix: int
) -> None:
    talk = Conversation(loop, at_once=True)
    for piece in cuts(VALID[:prefix] + garbage, places):
        talk.feed(piece)
    statuses = re.findall(rb"HTTP/1\.1 (\d{3}) ", talk.transport.written)
    assert set(statuses) <= {b"200", b"400", b"413", b"431", b"505"}
    assert len(statuses) <= len(talk.requests) + 1
    if any(status != b"200" for status in statuses):
        assert talk.transport.closing
    talk.close()


HEAD = b"POST / HTTP/1.1\r\nHost: a\r\n"


@pytest.mark.parametrize(
    ("message", "status"),
    [
        (HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n", 400),
        (HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!", 400),
        (HEAD + b"Content-Length: +5\r\n\r\nhello", 400),
        (HEAD + b"Content-Length: 5, 5\r\n\r\nhello", 400),
        (HEAD + b"Content-Length: -1\r\n\r\n", 400),
        (HEAD + b"Content-Length: 0x5\r\n\r\nhello", 400),
        (HEAD + b"Content-Length: 99999999999999999999999\r\n\r\n", 400),
        (HEAD + b"Transfer-Encoding: gzip\r\n\r\n", 400),
        (HEAD + b"Connection: upgrade\r\nUpgrade: h2c\r\nTransfer-Encoding: gzip\r\n\r\nhi", 400),
        (HEAD + b"Connection: upgrade\r\nUpgrade: h2c\r\nContent-Length: 3001\r\n\r\nhi", 413),
        (HEAD + b"Transfer-Encoding: xchunked\r\n\r\n", 400),
        (HEAD + b"Transfer-Encoding: chunked, identity\r\n\r\n", 400),
        (HEAD + b"Transfer-Encoding : chunked\r\n\r\n", 400),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n0\r\n\r\n", 400),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello!!\r\n0\r\n\r\n", 400),
        (HEAD + b"X: a\r\n folded\r\n\r\n", 400),
        (HEAD + b"X: a\x00b\r\n\r\n", 400),
        (HEAD + b"X: a\rb\r\n\r\n", 400),
        (b"GET / HTTP/1.1\nHost: a\n\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"GET /\r\n\r\n", 505),
        (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505),
        (b"GET a HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"CONNECT / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 500, 431),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 2000, 431),
        (b"GET /" + b"y" * 2000, 431),
        (HEAD + b"Content-Length: 3001\r\n\r\n", 413),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nbb9\r\n" + b"a" * 3001, 413),
    ],
)
@pytest.mark.parametrize("by_byte", [False, True])
def test_refused(loop: asyncio.AbstractEventLoop, message: bytes, status: int, by_byte: bool) -> None:
    talk = Conversation(loop, at_once=True)
    for piece in [bytes([byte]) for byte in message] if by_byte else [message]:
        talk.feed(piece)
    assert talk.transport.written.startswith(b"HTTP/1.1 %d " % status)
    assert talk.transport.written.count(b"\r\nDate: ") == 1
    assert b"Connection: close\r\n" in talk.transport.written
    assert talk.requests == []
    assert talk.transport.closing
    talk.close()


def test_valid_requests_before_garbage_are_answered_first(loop: asyncio.AbstractEventLoop) -> None:
    talk = Conversation(loop, at_once=False)
    talk.feed(VALID + VALID + b"?\r\n\r\n")
    talk.answer_all()
    assert len(talk.requests) == 2
    assert re.findall(rb"HTTP/1\.1 (\d{3})", talk.transport.written) == [b"200", b"200", b"400"]
    talk.close()


def test_a_thousand_pipelined_requests_neither_recurse_nor_pile_up(loop: asyncio.AbstractEventLoop) -> None:
    talk = Conversation(loop, at_once=True)
    talk.feed(on_the_wire("GET", "/", b"", []) * 5000)
    assert len(talk.requests) == 5000
    talk.close()

    talk = Conversation(loop, at_once=False)
    for _ in range(100):
        talk.feed(on_the_wire("POST", "/", b"a" * 1000, []))
    assert talk.transport.is_paused()
    assert len(talk.requests) == 1
    talk.answer_all()
    assert not talk.transport.is_paused()
    assert 60 < len(talk.requests) < 70  # what was kept, 64 KiB of it
    talk.close()


def test_absolute_targets(loop: asyncio.AbstractEventLoop) -> None:
    talk = Conversation(loop, at_once=True)
    talk.feed(b"GET http://a/b?c HTTP/1.1\r\nHost: a\r\n\r\n")
    assert talk.requests == [("GET", "/b", b"")]
    talk.close()


UPGRADE = b"Host: a\r\nConnection: upgrade\r\nUpgrade: h2c\r\n"


@given(st.lists(st.integers(0, 1000), max_size=20))
def test_an_offered_upgrade_is_ignored_and_the_body_kept(loop: asyncio.AbstractEventLoop, places: list[int]) -> None:
    talk = Conversation(loop, at_once=True)
    stream = b"POST /a HTTP/1.1\r\n" + UPGRADE + b"Content-Length: 2\r\n\r\nhi"
    stream += b"GET /b HTTP/1.1\r\n" + UPGRADE + b"\r\n"
    stream += b"POST /c HTTP/1.1\r\n" + UPGRADE + b"Transfer-Encoding: chunked\r\n\r\n2\r\nho\r\n0\r\n\r\n"
    stream += on_the_wire("GET", "/d", b"", [])
    for piece in cuts(stream, places):
        talk.feed(piece)
    assert talk.requests == [("POST", "/a", b"hi"), ("GET", "/b", b""), ("POST", "/c", b"ho"), ("GET", "/d", b"")]
    assert not talk.transport.closing
    talk.close()
