"""HTTP/1.1 server: starts, stops, counts connections. What one connection does is in ``connection``."""

from __future__ import annotations

import asyncio
import contextlib

from penstock.core.errors import PenstockError
from penstock.live.http.connection import Connection, Handler
from penstock.live.http.messages import Limits
from penstock.live.http.reply import Reply

__all__ = ["Handler", "HttpServer", "Reply"]


class HttpServer:
    """Serves ``handler``, which is called with a ``Reply`` for every whole request, on the event loop."""

    def __init__(self, handler: Handler, limits: Limits = Limits()) -> None:  # noqa: B008 (frozen)
        self.handler = handler
        self.limits = limits
        self.connections: set[Connection] = set()
        self.stopping = False
        self._server: asyncio.AbstractServer | None = None
        self._admitted = 0
        self._empty = asyncio.Event()

    async def start(self, host: str, port: int) -> int:
        """Listen; give the port (that of the first address, if ``host`` has several), 0 asking for any free one.

        Raises
        ------
        PenstockError
            The address cannot be bound.
        """
        loop = asyncio.get_running_loop()
        try:
            # A thousand clients may connect in one breath (the kernel caps this at net.core.somaxconn).
            server = await loop.create_server(lambda: Connection(self, loop), host, port, backlog=16384)
        except OSError as error:
            problem = f"cannot listen on {host}:{port} ({error.strerror or error})"
            raise PenstockError(problem, "choose another --host or --port, or end what uses this one") from error
        self._server = server
        self.stopping = False
        return int(server.sockets[0].getsockname()[1])

    async def stop(self, grace_s: float = 0.0) -> None:
        """Accept nothing more, let running answers end for ``grace_s`` seconds, then close what is left."""
        self.stopping = True
        if self._server is not None:
            self._server.close()
        self._empty.clear()
        for connection in list(self.connections):
            connection.retire()
        if self.connections and grace_s > 0.0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._empty.wait(), grace_s)
        for connection in list(self.connections):
            connection.kill()
        while self.connections:
            self._empty.clear()
            await self._empty.wait()
        if self._server is not None:
            await self._server.wait_closed()
            self._server = None

    def join(self, connection: Connection) -> bool:
        """Count a new connection; say whether it is within the limit."""
        self.connections.add(connection)
        if self.stopping or self._admitted >= self.limits.connections:
            return False
        self._admitted += 1
        return True

    def leave(self, connection: Connection) -> None:
        """A connection is gone."""
        self.connections.discard(connection)
        self._admitted -= connection.admitted
        if not self.connections:
            self._empty.set()
