"""One server as the client sees it: its address, its idle connections, the calls that wait for one."""

from __future__ import annotations

import asyncio
import errno
import os
import ssl
from collections import deque
from urllib.parse import urlsplit

from penstock.live.http.exchange import Channel, Exchange
from penstock.live.http.messages import Sink

_LACKING = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL)


class Origin:
    """Connections to one origin. ``count`` of them are open or being opened."""

    def __init__(self, url: str, connect_s: float, idle_s: float, limit: int, tls: ssl.SSLContext | None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/") or parts.query:
            raise ValueError(f"not an origin: {url!r}")
        secure = parts.scheme == "https"
        default = 443 if secure else 80
        self.host = parts.hostname
        self.port = default if parts.port is None else parts.port
        name = f"[{self.host}]" if ":" in self.host else self.host
        self.host_header = name if self.port == default else f"{name}:{self.port}"
        self.count = 0
        self._tls = (tls or ssl.create_default_context()) if secure else None
        self._connect_s = connect_s
        self._idle_s = idle_s
        self._limit = limit
        self._idle: deque[Channel] = deque()  # the one used last at the right
        self._waiting: deque[Exchange] = deque()
        self._busy: set[Channel] = set()
        self._opening: dict[Exchange, asyncio.Task[None]] = {}
        self._sweep: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()

    def open(self, message: bytes, bodiless: bool, sink: Sink, refused: bool) -> Exchange:
        """Begin a call; ``refused`` lets it fail, from the event loop as any other fault."""
        exchange = Exchange(self, message, bodiless, sink)
        if refused:
            self._loop.call_soon(exchange.fail, "the client is closed")
        else:
            self.dispatch(exchange)
        return exchange

    def dispatch(self, exchange: Exchange) -> None:
        """Give the call a connection: an idle one, else a new one if the limit allows, else let it wait."""
        while self._idle and not exchange.retried:
            channel = self._idle.pop()
            if channel.usable():
                self._busy.add(channel)
                channel.begin(exchange)
                return
        if self._limit and self.count >= self._limit:
            if exchange.retried:
                self._waiting.appendleft(exchange)
            else:
                self._waiting.append(exchange)
            return
        self._connect_for(exchange)

    def withdraw(self, exchange: Exchange) -> None:
        """The call was aborted before it had a connection."""
        task = self._opening.get(exchange)
        if task is not None:
            task.cancel()
        elif exchange in self._waiting:
            self._waiting.remove(exchange)

    def release(self, channel: Channel) -> None:
        """The connection has answered a call and may take another."""
        if self._waiting:
            channel.begin(self._waiting.popleft())
            return
        self._busy.discard(channel)
        channel.idle_since = self._loop.time()
        self._idle.append(channel)
        if self._sweep is None:
            self._sweep = self._loop.call_later(self._idle_s, self._drop_old)

    def lost(self, channel: Channel) -> None:
        """The connection is closed."""
        if not channel.adopted:
            return
        if channel in self._busy:
            self._busy.discard(channel)
        elif channel in self._idle:
            self._idle.remove(channel)
        self._gone()

    def close(self) -> None:
        """Close all connections and fail all calls."""
        if self._sweep is not None:
            self._sweep.cancel()
            self._sweep = None
        waiting = [*self._waiting, *self._opening]
        self._waiting.clear()
        for task in self._opening.values():
            task.cancel()
        for exchange in waiting:
            exchange.fail("the client is closed")
        for channel in [*self._idle, *self._busy]:
            channel.close("the client is closed")

    def _connect_for(self, exchange: Exchange) -> None:
        self.count += 1
        channel = Channel(self)
        task = self._opening[exchange] = self._loop.create_task(self._connect(exchange, channel))
        # Not in a ``finally``: a task cancelled before its first step never gets there.
        task.add_done_callback(lambda _: self._settled(exchange, channel))

    def _settled(self, exchange: Exchange, channel: Channel) -> None:
        del self._opening[exchange]
        if not channel.adopted:
            channel.discard()
            self._gone()

    async def _connect(self, exchange: Exchange, channel: Channel) -> None:
        refused = local = False
        try:
            async with asyncio.timeout(self._connect_s):
                await self._loop.create_connection(lambda: channel, self.host, self.port, ssl=self._tls)
            channel.adopted = not channel.dead
            reason = "closed as soon as it was open"
        except TimeoutError:
            reason = f"no connection within {self._connect_s:g} s"
        except OSError as error:
            refused = isinstance(error, ConnectionRefusedError)
            local = error.errno in _LACKING
            reason = f"cannot connect ({os.strerror(error.errno) if error.errno else error})"
        except Exception as error:  # whatever it is, the caller must hear of it
            reason = f"cannot connect ({error!r})"
        if channel.adopted:
            self._busy.add(channel)
            channel.begin(exchange)
        else:
            exchange.fail(reason, refused, local)

    def _gone(self) -> None:
        self.count -= 1
        if self._waiting and (not self._limit or self.count < self._limit):
            self._connect_for(self._waiting.popleft())

    def _drop_old(self) -> None:
        """Close what has been idle for long; the oldest are at the left."""
        self._sweep = None
        now = self._loop.time()
        while self._idle and self._idle[0].idle_since + self._idle_s <= now:
            self._idle.popleft().close("idle")
        if self._idle:
            self._sweep = self._loop.call_at(self._idle[0].idle_since + self._idle_s, self._drop_old)
