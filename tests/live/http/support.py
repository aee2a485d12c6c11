"""What the HTTP tests share: a transport in memory, a raw client, a recording sink, a running server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import uvloop

from penstock.live.http import Handler, Head, HttpFault, HttpServer, Limits

PATIENCE_S = 20.0  # an event that has not come by then never comes


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run on uvloop, as the product does, and never hang."""

    async def bounded() -> None:
        await asyncio.wait_for(main, 2 * PATIENCE_S)

    uvloop.run(bounded())


class MemoryTransport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closing = False
        self.reading = True

    def write(self, data: Any) -> None:
        if not self.closing:
            self.written += data

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    abort = close

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.closing = True

    def is_paused(self) -> bool:
        return not self.reading

    def pause_reading(self) -> None:
        assert self.reading
        self.reading = False

    def resume_reading(self) -> None:
        assert not self.reading
        self.reading = True

    def get_write_buffer_size(self) -> int:
        return 0

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("192.0.2.1", 4711) if name == "peername" else default


class Recorder:
    """A sink that keeps everything and checks the order of calls."""

    def __init__(self) -> None:
        self.head: Head | None = None
        self.body = b""
        self.fault: HttpFault | None = None
        self.ended = False
        self.over = asyncio.Event()
        self.headed = asyncio.Event()
        self.more = asyncio.Event()

    def on_head(self, head: Head) -> None:
        assert self.head is None and not self.over.is_set()
        self.head = head
        self.headed.set()

    def on_body(self, data: bytes) -> None:
        assert self.head is not None and not self.over.is_set() and data
        self.body += data
        self.more.set()

    def on_end(self) -> None:
        assert self.head is not None and not self.over.is_set()
        self.ended = True
        self.over.set()

    def on_fault(self, fault: HttpFault) -> None:
        assert not self.over.is_set()
        self.fault = fault
        self.over.set()


class Raw:
    """A client that sends what it is told."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Read one answer with a length, or one without a body."""
        head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), PATIENCE_S)
        first, *lines = head.decode().split("\r\n")[:-2]
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        body = await self.reader.readexactly(int(headers.get("content-length", "0")))
        return int(first.split()[1]), headers, body

    async def rest(self) -> bytes:
        """Read to the end of the connection; a reset ends it as well."""
        data = b""
        while True:
            try:
                piece = await asyncio.wait_for(self.reader.read(65536), PATIENCE_S)
            except ConnectionError:
                return data
            if not piece:
                return data
            data += piece


@asynccontextmanager
async def served(handler: Handler, limits: Limits | None = None) -> AsyncIterator[tuple[HttpServer, int]]:
    """A running server and its port."""
    server = HttpServer(handler, limits or Limits())
    port = await server.start("127.0.0.1", 0)
    try:
        yield server, port
    finally:
        await server.stop()
        assert not server.connections


@asynccontextmanager
async def raw(port: int) -> AsyncIterator[Raw]:
    """A connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield Raw(reader, writer)
    finally:
        writer.close()


Script = Callable[[Raw], Awaitable[None]]


@asynccontextmanager
async def scripted(*scripts: Script) -> AsyncIterator[tuple[list[int], int]]:
    """A server whose n-th connection plays the n-th script and is closed after it; gives connection numbers, port."""
    seen: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(len(seen))
        try:
            await scripts[len(seen) - 1](Raw(reader, writer))
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield seen, server.sockets[0].getsockname()[1]
    finally:
        server.close()


def cuts(data: bytes, places: list[int]) -> list[bytes]:
    """Cut bytes at some places, modulo their length."""
    marks = sorted({place % (len(data) + 1) for place in places} | {0, len(data)})
    return [data[a:b] for a, b in pairwise(marks)]
