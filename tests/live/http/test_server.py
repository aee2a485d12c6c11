"""The server over real sockets: answers, limits in time and number, clients that go away or do not read."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest

from penstock.core.errors import PenstockError
from penstock.live.http import Head, HttpClient, HttpFault, HttpServer, Limits, Reply
from penstock.live.http.connection import Connection
from penstock.live.http.exchange import Channel, Exchange
from penstock.live.http.requests import RequestReader
from tests.live.http.support import PATIENCE_S, Recorder, raw, run, served

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


def echo(reply: Reply) -> None:
    reply.send(200, reply.request.body or b"{}")


def three_chunks(reply: Reply) -> None:
    reply.start()
    for i in range(3):
        reply.write(b"data: %d\n\n" % i)
        reply.write(b"")  # must not end the stream
    reply.end()
    reply.write(b"late")
    reply.end()
    assert reply.closed


class Held:
    """A handler that starts a stream and keeps it open."""

    def __init__(self) -> None:
        self.reply: Reply
        self.started = asyncio.Event()
        self.gone = asyncio.Event()
        self.times_gone = 0

    def __call__(self, reply: Reply) -> None:
        self.reply = reply
        reply.on_disconnect = self.left
        reply.start()
        reply.write(b"x")
        self.started.set()

    def left(self) -> None:
        self.times_gone += 1
        assert self.reply.closed
        self.gone.set()


def state(reply: Reply) -> tuple[bool, bool]:
    return reply.congested, reply.closed


def test_forms_of_an_answer_on_the_wire() -> None:
    async def main() -> None:
        def handler(reply: Reply) -> None:
            match reply.request.path:
                case "/stream":
                    three_chunks(reply)
                case "/none":
                    reply.send(204, b"")
                case _:
                    reply.send(201, reply.request.query.encode(), "text/plain", {"X-A": "b"})

        async with served(handler) as (_, port), raw(port) as client:
            client.send(b"GET /a?q=1 HTTP/1.1\r\nHost: a\r\n\r\n")
            status, headers, body = await client.answer()
            assert (status, body) == (201, b"q=1")
            assert headers["content-type"] == "text/plain" and headers["x-a"] == "b" and "date" in headers
            assert "connection" not in headers
            client.send(b"HEAD /a?q=1 HTTP/1.1\r\nHost: a\r\n\r\nHEAD /stream HTTP/1.1\r\nHost: a\r\n\r\n")
            head = await client.reader.readuntil(b"\r\n\r\n")
            assert b"Content-Length: 3\r\n" in head
            head = await client.reader.readuntil(b"\r\n\r\n")
            assert b"Transfer-Encoding: chunked\r\n" in head and b"text/event-stream" in head
            client.send(b"GET /none HTTP/1.1\r\nHost: a\r\n\r\n")
            head = await client.reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 204 ") and b"Content-" not in head
            client.send(b"GET /stream HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            data = await client.rest()
            chunks = b"9\r\ndata: 0\n\n\r\n9\r\ndata: 1\n\n\r\n9\r\ndata: 2\n\n\r\n0\r\n\r\n"
            assert data.partition(b"\r\n\r\n")[2] == chunks
            assert b"Connection: close\r\n" in data

    run(main())


def test_http_1_0_streams_to_the_close() -> None:
    async def main() -> None:
        async with served(three_chunks) as (_, port), raw(port) as client:
            client.send(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
            head, _, body = (await client.rest()).partition(b"\r\n\r\n")
            assert b"chunked" not in head and b"Connection: close" in head
            assert body == b"data: 0\n\ndata: 1\n\ndata: 2\n\n"
        async with served(echo) as (_, port), raw(port) as client:
            for _ in range(2):
                client.send(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
                _, headers, body = await client.answer()
                assert headers["connection"] == "keep-alive" and body == b"{}"

    run(main())


def test_expect_100_continue() -> None:
    async def main() -> None:
        async with served(echo, Limits(body_bytes=10)) as (_, port), raw(port) as client:
            head = b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: "
            client.send(head + b"5\r\n\r\n")
            assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            client.send(b"hello")
            assert (await client.answer())[2] == b"hello"
            client.send(head + b"11\r\n\r\n")
            assert (await client.answer())[0] == 413

    run(main())


@pytest.mark.parametrize(
    ("sent", "limits", "status"),
    [
        (b"GET / HTTP/1.1\r\n", Limits(head_s=0.05), 408),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nabc", Limits(body_s=0.05), 408),
        (GET + b"GET / HT", Limits(head_s=0.05), 408),
    ],
)
def test_slow_requests_time_out(sent: bytes, limits: Limits, status: int) -> None:
    async def main() -> None:
        async with served(echo, limits) as (_, port), raw(port) as client:
            client.send(sent)
            for _ in range(sent.count(b"GET / HTTP/1.1\r\nHost")):
                assert (await client.answer())[0] == 200
            answer = await client.rest()
            assert answer.startswith(b"HTTP/1.1 %d " % status)

    run(main())


def test_a_trickle_does_not_push_the_clock_back() -> None:
    async def main() -> None:
        async with served(echo, Limits(head_s=0.1)) as (_, port), raw(port) as client:
            client.send(b"GET / HTTP/1.1\r\n")

            async def trickle() -> None:
                while True:
                    client.send(b"a: b\r\n")
                    await asyncio.sleep(0.01)

            dripping = asyncio.create_task(trickle())
            assert (await client.answer())[0] == 408
            dripping.cancel()

    run(main())


def test_idle_connections_are_closed_without_a_word() -> None:
    async def main() -> None:
        async with served(echo, Limits(idle_s=0.05)) as (_, port):
            async with raw(port) as client:
                assert await client.rest() == b""
            async with raw(port) as client:
                client.send(GET)
                assert (await client.answer())[0] == 200
                assert await client.rest() == b""

    run(main())


def test_a_running_answer_has_no_clock() -> None:
    async def main() -> None:
        held = Held()
        limits = Limits(idle_s=0.01, head_s=0.01, body_s=0.01)
        async with served(held, limits) as (_, port), raw(port) as client:
            client.send(GET)
            await held.started.wait()
            ticks = asyncio.Event()
            asyncio.get_running_loop().call_later(0.1, ticks.set)
            await ticks.wait()
            held.reply.end()
            assert (await client.rest()).endswith(b"1\r\nx\r\n0\r\n\r\n")

    run(main())


def test_too_many_connections() -> None:
    async def main() -> None:
        async with served(echo, Limits(connections=2)) as (server, port):
            async with raw(port) as first, raw(port) as second:
                for client in (first, second):
                    client.send(GET)
                    assert (await client.answer())[0] == 200
                for _ in range(3):
                    async with raw(port) as third:
                        status, headers, _ = await third.answer()
                        assert status == 503 and headers["retry-after"] == "1"
                        assert await third.rest() == b""
            while server.connections:
                await asyncio.sleep(0)
            async with raw(port) as client:
                client.send(GET)
                assert (await client.answer())[0] == 200

    run(main())


def test_a_body_too_large_is_answered_although_it_is_still_coming() -> None:
    async def main() -> None:
        async with served(echo, Limits(body_bytes=1000)) as (_, port), raw(port) as client:
            client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5000000\r\n\r\n" + b"a" * 4_000_000)
            assert (await client.answer())[0] == 413

    run(main())


def leave_by_close(client_socket: socket.socket) -> None:
    client_socket.close()


def leave_by_half_close(client_socket: socket.socket) -> None:
    client_socket.shutdown(socket.SHUT_WR)


def leave_by_reset(client_socket: socket.socket) -> None:
    client_socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client_socket.close()


@pytest.mark.parametrize("leave", [leave_by_close, leave_by_half_close, leave_by_reset])
@pytest.mark.parametrize("pipelined", [b"", GET])
def test_a_client_that_leaves_is_noticed(leave: Callable[[socket.socket], None], pipelined: bytes) -> None:
    async def main() -> None:
        held = Held()
        async with served(held) as (_, port):
            loop = asyncio.get_running_loop()
            client = socket.socket()
            client.setblocking(False)
            await loop.sock_connect(client, ("127.0.0.1", port))
            await loop.sock_sendall(client, GET + pipelined)
            await held.started.wait()
            leave(client)
            await asyncio.wait_for(held.gone.wait(), PATIENCE_S)
            held.reply.write(b"nobody reads this")
            held.reply.end()
            client.close()
        assert held.times_gone == 1

    run(main())


def test_no_disconnect_after_the_end() -> None:
    async def main() -> None:
        held = Held()
        async with served(held) as (server, port):
            async with raw(port) as client:
                client.send(GET)
                await held.started.wait()
                held.reply.end()
            while server.connections:
                await asyncio.sleep(0)
        assert held.times_gone == 0

    run(main())


def test_congestion_and_drain() -> None:
    async def main() -> None:
        held = Held()
        drained = asyncio.Event()
        async with served(held) as (_, port), raw(port) as client:
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]
            client.send(GET)
            await held.started.wait()
            held.reply.on_drain = drained.set
            written = 1
            while state(held.reply) == (False, False):
                held.reply.write(b"|" * 65536)
                written += 65536
                await asyncio.sleep(0)
            client.writer.transport.resume_reading()  # type: ignore[attr-defined]
            reading = asyncio.create_task(client.rest())
            await asyncio.wait_for(drained.wait(), PATIENCE_S)
            assert state(held.reply) == (False, False)
            held.reply.close_after()
            held.reply.end()
            data = await reading
            assert data.count(b"|") == written - 1
            assert data.endswith(b"0\r\n\r\n")

    run(main())


def test_a_reader_too_slow_is_cut_off() -> None:
    async def main() -> None:
        held = Held()
        async with served(held, Limits(write_buffer=100_000)) as (_, port), raw(port) as client:
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]
            client.send(GET)
            await held.started.wait()
            while not held.reply.closed:
                held.reply.write(b"|" * 65536)
                await asyncio.sleep(0)
            await asyncio.wait_for(held.gone.wait(), PATIENCE_S)
        assert held.times_gone == 1

    run(main())


def test_a_reader_that_stops_is_cut_off_in_time() -> None:
    async def main() -> None:
        held = Held()
        async with served(held, Limits(body_s=0.05)) as (_, port), raw(port) as client:
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]
            client.send(GET)
            await held.started.wait()
            while not held.reply.congested:  # a handler that heeds congestion and waits for on_drain
                held.reply.write(b"|" * 65536)
                await asyncio.sleep(0)
            await asyncio.wait_for(held.gone.wait(), PATIENCE_S)

    run(main())


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_a_dropped_stream_does_not_look_complete(version: bytes) -> None:
    async def main() -> None:
        held = Held()
        async with served(held) as (_, port), raw(port) as client:
            client.send(b"GET / HTTP/%b\r\nHost: a\r\n\r\n" % version)
            await held.started.wait()
            if version == b"1.1":
                held.reply.drop()
                assert (await client.rest()).endswith(b"\r\n\r\n1\r\nx\r\n")
            else:
                await client.reader.readuntil(b"\r\n\r\nx")
                held.reply.drop()
                with pytest.raises(ConnectionResetError):
                    await asyncio.wait_for(client.reader.read(), PATIENCE_S)
        assert held.reply.closed and held.times_gone == 0

    run(main())


def test_a_failing_handler() -> None:
    async def main() -> None:
        def handler(reply: Reply) -> None:
            if reply.request.path == "/late":
                reply.start()
                reply.write(b"x")
            raise ZeroDivisionError("secret")

        async with served(handler) as (_, port), raw(port) as client:
            client.send(GET)
            status, _, body = await client.answer()
            assert status == 500 and b"secret" not in body
            client.send(b"GET /late HTTP/1.1\r\nHost: a\r\n\r\n")
            assert (await client.rest()).endswith(b"\r\n1\r\nx\r\n")

    run(main())


@pytest.mark.parametrize("headers", [{"X": "a\r\nY: b"}, {"X\r\nY": "b"}, {"X": "a\nb"}, {"": "a"}, {"X:": "a"}])
def test_no_header_injection(headers: dict[str, str]) -> None:
    async def main() -> None:
        refused: list[ValueError] = []

        def handler(reply: Reply) -> None:
            for attempt in (
                partial(reply.send, 200, b"", headers=headers),
                partial(reply.start, headers=headers),
                partial(reply.send, 200, b"", content_type="a\r\nb: c"),
            ):
                try:
                    attempt()
                except ValueError as error:
                    refused.append(error)
            reply.send(200, b"fine")

        async with served(handler) as (_, port), raw(port) as client:
            client.send(GET)
            assert (await client.answer())[2] == b"fine"
        assert len(refused) == 3

    run(main())


def test_stop_lets_answers_end_and_closes_idle_connections() -> None:
    async def main() -> None:
        held = Held()
        async with served(held) as (server, port), raw(port) as busy, raw(port) as idle:
            busy.send(GET)
            await held.started.wait()
            stopping = asyncio.create_task(server.stop(PATIENCE_S))
            assert await idle.rest() == b""
            with pytest.raises(OSError):
                await asyncio.open_connection("127.0.0.1", port)
            assert not stopping.done()
            held.reply.end()
            assert (await busy.rest()).endswith(b"0\r\n\r\n")
            await asyncio.wait_for(stopping, PATIENCE_S)
        assert held.times_gone == 0

    run(main())


def test_stop_without_grace_tells_the_handler() -> None:
    async def main() -> None:
        held = Held()
        async with served(held) as (server, port), raw(port) as client:
            client.send(GET)
            await held.started.wait()
            await server.stop()
            assert held.times_gone == 1
            assert not (await client.rest()).endswith(b"0\r\n\r\n")

    run(main())


def test_a_taken_port_is_a_user_error() -> None:
    async def main() -> None:
        async with served(echo) as (_, port):
            with pytest.raises(PenstockError, match=f"cannot listen on 127.0.0.1:{port}"):
                await HttpServer(echo).start("127.0.0.1", port)

    run(main())


def test_five_hundred_streams_at_once() -> None:
    async def main() -> None:
        open_replies: list[Reply] = []
        all_here = asyncio.Event()

        def handler(reply: Reply) -> None:
            reply.start()
            open_replies.append(reply)
            if len(open_replies) == 500:
                all_here.set()

        async with served(handler) as (_, port):
            client = HttpClient()
            sinks = [Recorder() for _ in range(500)]
            for sink in sinks:
                client.open(f"http://127.0.0.1:{port}", "GET", "/", sink)
            await asyncio.wait_for(all_here.wait(), PATIENCE_S)
            for i in range(20):
                for reply in open_replies:
                    reply.write(b"data: %d\n\n" % i)
                await asyncio.sleep(0)
            for reply in open_replies:
                reply.end()
            for sink in sinks:
                await asyncio.wait_for(sink.over.wait(), PATIENCE_S)
                assert sink.ended
                assert sink.body == b"".join(b"data: %d\n\n" % i for i in range(20))
            await client.close()

    run(main())


class Relay:
    """Passes an answer on."""

    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self.on_body = reply.write

    def on_head(self, head: Head) -> None:
        self.reply.start(head.status)

    def on_end(self) -> None:
        self.reply.end()

    def on_fault(self, fault: HttpFault) -> None:
        self.reply.drop()


def test_small_writes_do_not_wait_for_an_acknowledgement() -> None:
    async def main() -> None:
        held = Held()
        async with served(held) as (server, port):
            client = HttpClient()
            sink = Recorder()
            client.open(f"http://127.0.0.1:{port}", "GET", "/", sink)
            await held.started.wait()
            (connection,) = server.connections
            (place,) = client._origins.values()
            (channel,) = place._busy
            for transport in (connection._transport, channel._transport):
                sock = transport.get_extra_info("socket")
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            await client.close()
            assert sink.fault is not None

    run(main())


@pytest.mark.parametrize("aborted", [False, True])
def test_nothing_is_left_to_the_garbage_collector(aborted: bool) -> None:
    kinds = (Connection, RequestReader, Reply, Channel, Exchange, Relay)

    def alive() -> dict[str, int]:
        return dict(Counter(type(thing).__name__ for thing in gc.get_objects() if type(thing) in kinds))

    async def main() -> None:
        client, held = HttpClient(), Held()
        async with served(held) as (_, upstream):

            def relay(reply: Reply) -> None:
                call = client.open(f"http://127.0.0.1:{upstream}", "GET", "/", Relay(reply))
                reply.on_disconnect = call.abort

            async with served(relay) as (server, port):
                for _ in range(5):
                    held.started.clear()
                    async with raw(port) as reader:
                        reader.send(GET.replace(b"Host", b"Connection: close\r\nHost"))
                        await held.started.wait()
                        await reader.reader.readuntil(b"x")
                        if aborted:
                            held.gone.clear()
                            reader.writer.close()
                            await asyncio.wait_for(held.gone.wait(), PATIENCE_S)
                        else:
                            held.reply.end()
                            await reader.rest()
                    while server.connections:
                        await asyncio.sleep(0)
        await client.close()
        del held.reply

    gc.collect()
    gc.disable()
    try:
        before = alive()
        run(main())
        assert alive() == before
    finally:
        gc.enable()
