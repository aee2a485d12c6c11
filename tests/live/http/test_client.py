"""The client: any cut of any answer, dead connections, aborts, the pool."""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
import subprocess
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from penstock.live.http import HttpClient, HttpFault, HttpServer, Reply
from penstock.live.http.connection import Connection
from penstock.live.http.exchange import Channel, Exchange
from tests.live.http.support import PATIENCE_S, MemoryTransport, Raw, Recorder, cuts, raw, run, scripted, served

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Pool:
    """An origin that only counts."""

    def __init__(self) -> None:
        self.released = 0
        self.lost_ones = 0
        self.dispatched = 0

    def dispatch(self, exchange: Exchange) -> None:
        self.dispatched += 1

    def withdraw(self, exchange: Exchange) -> None:
        raise AssertionError("never waits here")

    def release(self, channel: Channel) -> None:
        self.released += 1

    def lost(self, channel: Channel) -> None:
        self.lost_ones += 1


def hear(pieces: list[bytes], head_request: bool = False, eof: bool = False) -> tuple[Recorder, Pool, MemoryTransport]:
    """Let a channel hear the pieces of an answer."""
    pool, sink, transport = Pool(), Recorder(), MemoryTransport()
    channel = Channel(pool)
    channel.connection_made(transport)
    channel.begin(Exchange(pool, b"GET ...", head_request, sink))
    assert transport.written == b"GET ..."
    for piece in pieces:
        if not transport.closing:
            channel.data_received(piece)
    if eof and not transport.closing:
        channel.eof_received()
        transport.closing = True
    if transport.closing:
        channel.connection_lost(None)
    return sink, pool, transport


# Payloads that look like framing themselves.
PAYLOAD = st.lists(
    st.sampled_from([b"a", b"\r\n", b"0\r\n\r\n", b"5\r\nhello\r\n", b"HTTP/1.1 200 OK\r\n"]), max_size=8
)
PLACES = st.lists(st.integers(0, 2000), max_size=30)


@given(PAYLOAD, st.sampled_from(["length", "chunks", "close"]), st.booleans(), st.booleans(), PLACES)
@example([b"5\r\nhello\r\n"], "chunks", False, False, list(range(200)))
def test_an_answer_in_any_cut(
    parts: list[bytes], framing: str, interim: bool, trailer: bool, places: list[int]
) -> None:
    body = b"".join(parts)
    stream = b"HTTP/1.1 100 Continue\r\nX: interim\r\n\r\n" if interim else b""
    stream += b"HTTP/1.1 201 Made\r\nX-A: b\r\n"
    if framing == "length":
        stream += b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    elif framing == "close":
        stream += b"\r\n" + body
    else:
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
        stream += b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n" + b"T: 1\r\n" * trailer + b"\r\n"
    sink, pool, transport = hear(cuts(stream, places), eof=framing == "close")
    assert sink.ended and sink.head is not None
    assert sink.head.status == 201 and sink.head.headers["x-a"] == "b"
    assert "x" not in sink.head.headers and "t" not in sink.head.headers
    assert sink.body == body
    assert (pool.released, pool.lost_ones) == ((0, 1) if framing == "close" else (1, 0))
    assert transport.closing == (framing == "close")


@given(st.binary(max_size=200), st.integers(0, len(OK)), PLACES)
def test_garbage_ends_in_a_fault_or_an_answer(garbage: bytes, prefix: int, places: list[int]) -> None:
    sink, pool, _ = hear(cuts(OK[:prefix] + garbage, places), eof=True)
    assert sink.over.is_set()
    assert sink.ended == (sink.fault is None)
    assert pool.lost_ones == 1


@pytest.mark.parametrize(
    "stream",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 300_000,
        b"SSH-2.0-OpenSSH\r\n",
    ],
)
def test_an_answer_cut_short_or_malformed_is_a_fault(stream: bytes) -> None:
    sink, pool, transport = hear([stream], eof=True)
    assert sink.fault is not None and sink.fault.sent and not sink.ended
    assert transport.closing and pool.released == 0


@pytest.mark.parametrize(
    ("stream", "kept"),
    [
        (OK, True),
        (OK + OK, False),
        (OK + b"x", False),
        (OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"), False),
        (OK.replace(b"1.1", b"1.0"), False),
        (b"HTTP/1.1 204 No Content\r\n\r\n", True),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", True),
    ],
)
def test_which_connections_are_kept(stream: bytes, kept: bool) -> None:
    sink, pool, transport = hear([stream])
    assert sink.ended
    assert (pool.released == 1) == kept == (not transport.closing)


def test_an_answer_to_head_has_no_body() -> None:
    sink, pool, _ = hear([OK[:-2]], head_request=True)
    assert sink.ended and sink.body == b"" and pool.released == 1
    sink, pool, _ = hear([OK], head_request=True)
    assert sink.ended and sink.body == b"" and pool.released == 0


def test_a_sink_that_raises_gets_a_fault_and_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    class Bad(Recorder):
        def on_body(self, data: bytes) -> None:
            raise ZeroDivisionError

    pool, sink, transport = Pool(), Bad(), MemoryTransport()
    channel = Channel(pool)
    channel.connection_made(transport)
    channel.begin(Exchange(pool, b"", False, sink))
    channel.data_received(OK)
    assert sink.fault is not None and transport.closing
    assert "ZeroDivisionError" in caplog.text


def origin(port: int, scheme: str = "http") -> str:
    return f"{scheme}://127.0.0.1:{port}"


async def request(peer: Raw) -> bytes:
    """Read one request without a body, or with one announced."""
    head = await peer.reader.readuntil(b"\r\n\r\n")
    length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
    return head + await peer.reader.readexactly(int(length or b"0"))


def test_connections_are_kept_and_the_request_is_as_asked() -> None:
    async def main() -> None:
        got: list[bytes] = []

        async def two_answers(peer: Raw) -> None:
            for _ in range(2):
                got.append(await request(peer))
                peer.send(OK)

        async with scripted(two_answers) as (seen, port):
            client = HttpClient()
            for _ in range(2):
                response = await client.fetch(origin(port), "POST", "/a?b", b"{}", {"X-Y": "z"})
                assert (response.status, response.body) == (200, b"ok")
            assert seen == [0]
            assert got[0] == b"POST /a?b HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nX-Y: z\r\nContent-Length: 2\r\n\r\n{}" % port
            await client.close()

    run(main())


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_stale_connection_is_retried_once(method: str) -> None:
    async def main() -> None:
        async def answer_then_swallow(peer: Raw) -> None:
            await request(peer)
            peer.send(OK)
            await request(peer)  # and close without a byte

        async def answer(peer: Raw) -> None:
            await request(peer)
            peer.send(OK)
            await peer.rest()

        async with scripted(answer_then_swallow, answer) as (seen, port):
            client = HttpClient()
            for _ in range(2):
                assert (await client.fetch(origin(port), method, "/")).body == b"ok"
            assert seen == [0, 1]
            await client.close()

    run(main())


def test_no_retry_on_a_fresh_connection_or_after_a_byte() -> None:
    async def main() -> None:
        async def swallow(peer: Raw) -> None:
            await request(peer)

        async def answer_then_break(peer: Raw) -> None:
            await request(peer)
            peer.send(OK)
            await request(peer)
            peer.send(b"H")

        async with scripted(swallow, answer_then_break, swallow) as (seen, port):
            client = HttpClient()
            with pytest.raises(HttpFault, match="without an answer") as caught:
                await client.fetch(origin(port), "GET", "/")
            assert caught.value.sent and seen == [0]
            assert (await client.fetch(origin(port), "GET", "/")).body == b"ok"
            with pytest.raises(HttpFault, match="in the middle"):
                await client.fetch(origin(port), "GET", "/")
            assert seen == [0, 1]
            await client.close()

    run(main())


def test_a_retry_that_fails_too_is_a_fault_that_may_have_been_seen() -> None:
    async def main() -> None:
        async def answer_then_swallow(peer: Raw) -> None:
            await request(peer)
            peer.send(OK)
            await request(peer)

        async def swallow(peer: Raw) -> None:
            await request(peer)

        async with scripted(answer_then_swallow, swallow) as (seen, port):
            client = HttpClient()
            await client.fetch(origin(port), "GET", "/")
            with pytest.raises(HttpFault) as caught:
                await client.fetch(origin(port), "GET", "/")
            assert caught.value.sent and seen == [0, 1]
            await client.close()

    run(main())


def test_nobody_listens() -> None:
    async def main() -> None:
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            port = closed.getsockname()[1]
        client = HttpClient()
        with pytest.raises(HttpFault, match="refused") as caught:
            await client.fetch(origin(port), "GET", "/")
        assert not caught.value.sent
        with pytest.raises(HttpFault, match="cannot connect") as caught:
            await client.fetch("http://nowhere.invalid", "GET", "/")
        assert not caught.value.sent
        await client.close()

    run(main())


def test_a_connection_that_does_not_come_about() -> None:
    async def main() -> None:
        with socket.socket() as deaf, socket.socket() as filler:
            deaf.bind(("127.0.0.1", 0))
            deaf.listen(0)
            filler.connect(deaf.getsockname())  # the queue is full: the kernel drops what comes now
            client = HttpClient(connect_s=0.05)
            with pytest.raises(HttpFault, match="no connection within") as caught:
                await client.fetch(origin(deaf.getsockname()[1]), "GET", "/")
            assert not caught.value.sent
            await client.close()

    run(main())


def test_fetch_times_out_and_closes() -> None:
    async def main() -> None:
        gone = asyncio.Event()

        async def silent(peer: Raw) -> None:
            await request(peer)
            assert await peer.rest() == b""
            gone.set()

        async with scripted(silent) as (_, port):
            client = HttpClient()
            with pytest.raises(HttpFault, match=r"no answer within 0\.05 s"):
                await client.fetch(origin(port), "GET", "/", timeout_s=0.05)
            await asyncio.wait_for(gone.wait(), PATIENCE_S)
            await client.close()

    run(main())


@pytest.mark.parametrize("stage", ["at once", "connecting", "in the body"])
def test_abort_is_silent_and_noticed(stage: str) -> None:
    async def main() -> None:
        started, gone = asyncio.Event(), asyncio.Event()

        def handler(reply: Reply) -> None:
            reply.on_disconnect = gone.set
            reply.start()
            reply.write(b"x")
            started.set()

        async with served(handler) as (server, port):
            client = HttpClient()
            sink = Recorder()
            call = client.open(origin(port), "GET", "/", sink)
            if stage == "connecting":
                await asyncio.sleep(0)
            elif stage == "in the body":
                await asyncio.wait_for(sink.more.wait(), PATIENCE_S)
            call.abort()
            call.abort()
            if stage == "in the body":
                await asyncio.wait_for(gone.wait(), PATIENCE_S)
            elif stage == "at once":
                assert not server.connections
            await client.close()
            assert not sink.over.is_set()
            assert [place.count for place in client._origins.values()] == [0]

    run(main())


def test_a_limit_of_connections_makes_calls_wait_in_order() -> None:
    async def main() -> None:
        order: list[str] = []

        def handler(reply: Reply) -> None:
            order.append(reply.request.path)
            asyncio.get_running_loop().call_soon(reply.send, 200, b"{}")

        async with served(handler) as (server, port):
            client = HttpClient(per_origin=1)
            sinks = [Recorder() for _ in range(6)]
            calls = [client.open(origin(port), "GET", f"/{i}", sink) for i, sink in enumerate(sinks)]
            calls[2].abort()  # while it waits
            calls[0].abort()  # while it connects
            for i, sink in enumerate(sinks):
                if i not in (0, 2):
                    await asyncio.wait_for(sink.over.wait(), PATIENCE_S)
                    assert sink.ended
                    assert len(server.connections) == 1
            assert order == ["/1", "/3", "/4", "/5"]
            await client.close()

    run(main())


def test_a_sink_may_call_again_from_its_end() -> None:
    async def main() -> None:
        connections: set[Connection] = set()

        async with served(lambda reply: reply.send(200, b"{}")) as (server, port):
            client = HttpClient()
            done = asyncio.Event()

            class Again(Recorder):
                left = 50

                def on_end(self) -> None:
                    connections.update(server.connections)
                    if Again.left:
                        Again.left -= 1
                        client.open(origin(port), "GET", "/", Again())
                    else:
                        done.set()

            client.open(origin(port), "GET", "/", Again())
            await asyncio.wait_for(done.wait(), PATIENCE_S)
            assert len(connections) == 1
            await client.close()

    run(main())


def test_idle_connections_are_closed() -> None:
    async def main() -> None:
        closed = asyncio.Event()

        async def answer(peer: Raw) -> None:
            await request(peer)
            peer.send(OK)
            assert await peer.rest() == b""
            closed.set()

        async with scripted(answer) as (_, port):
            client = HttpClient(idle_s=0.05)
            await client.fetch(origin(port), "GET", "/")
            await asyncio.wait_for(closed.wait(), PATIENCE_S)
            await client.close()

    run(main())


def test_close_fails_what_runs_and_what_comes() -> None:
    async def main() -> None:
        held = asyncio.Event()

        def handler(reply: Reply) -> None:
            held.set()

        async with served(handler) as (_, port):
            client = HttpClient(per_origin=1)
            running, waiting, late = Recorder(), Recorder(), Recorder()
            client.open(origin(port), "GET", "/", running)
            client.open(origin(port), "GET", "/", waiting)
            await held.wait()
            await client.close()
            client.open(origin(port), "GET", "/", late)
            await asyncio.wait_for(late.over.wait(), PATIENCE_S)
            faults = [sink.fault for sink in (running, waiting, late)]
            assert [fault.sent for fault in faults if fault] == [True, False, False]

    run(main())


@pytest.mark.parametrize(
    ("where", "method", "path", "headers"),
    [
        ("ftp://a", "GET", "/", {}),
        ("http://a/b", "GET", "/", {}),
        ("http://", "GET", "/", {}),
        ("http://a", "GET", "/ HTTP/1.1\r\nX: y", {}),
        ("http://a", "GET", "/a b", {}),
        ("http://a", "GET", "a", {}),
        ("http://a", "GE T", "/", {}),
        ("http://a", "GET", "/", {"X": "a\r\nY: b"}),
    ],
)
def test_no_request_is_smuggled(where: str, method: str, path: str, headers: dict[str, str]) -> None:
    async def main() -> None:
        client = HttpClient()
        with pytest.raises(ValueError, match=r"not a|no spaces|does not allow"):
            client.open(where, method, path, Recorder(), headers)
        await client.close()

    run(main())


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with the openssl command")
def test_https(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )

    async def main() -> None:
        server_side = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        server_side.load_cert_chain(certificate, key)
        owner = HttpServer(lambda reply: reply.send(200, reply.request.body))
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: Connection(owner, loop), "127.0.0.1", 0, ssl=server_side)
        port = server.sockets[0].getsockname()[1]
        trusting = HttpClient(tls=ssl.create_default_context(cafile=certificate))
        for _ in range(2):
            assert (await trusting.fetch(origin(port, "https"), "POST", "/", b"a" * 100_000)).body == b"a" * 100_000
        assert len(owner.connections) == 1
        await trusting.close()
        strict = HttpClient()
        with pytest.raises(HttpFault, match="cannot connect") as caught:
            await strict.fetch(origin(port, "https"), "GET", "/")
        assert not caught.value.sent
        await strict.close()
        server.close()
        await owner.stop()

    run(main())


def test_garbage_at_one_connection_leaves_the_server_alive() -> None:
    async def main() -> None:
        async with served(lambda reply: reply.send(200, b"{}")) as (_, port):
            for garbage in (b"\x00" * 1000, b"\x16\x03\x01\x00", b"GET", b"\r\n" * 1000, b"{}" * 50_000):
                async with raw(port) as client:
                    client.send(garbage)
            client_of_worth = HttpClient()
            assert (await client_of_worth.fetch(origin(port), "GET", "/")).status == 200
            await client_of_worth.close()

    run(main())
