"""One call (``Exchange``) and one connection (``Channel``) of the HTTP client."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol, cast

import httptools

from penstock.live.http.messages import Head, HttpFault, Sink

_log = logging.getLogger(__name__)
_HEAD_BYTES = 256 * 1024


class Place(Protocol):
    """What calls and connections need of their origin."""

    def dispatch(self, exchange: Exchange) -> None: ...

    def withdraw(self, exchange: Exchange) -> None: ...

    def release(self, channel: Channel) -> None: ...

    def lost(self, channel: Channel) -> None: ...


class Exchange:
    """A call in progress."""

    __slots__ = ("_place", "bodiless", "channel", "message", "over", "retried", "sink")

    def __init__(self, place: Place, message: bytes, bodiless: bool, sink: Sink) -> None:
        self._place = place
        self.message = message
        self.bodiless = bodiless  # answer to HEAD
        self.sink = sink
        self.channel: Channel | None = None
        self.over = False
        self.retried = False

    def abort(self) -> None:
        """Close its connection, so that the server notices at once; nothing reaches the sink after this."""
        if self.over:
            return
        self.over = True
        if self.channel is not None:
            self.channel.abort()
        else:
            self._place.withdraw(self)

    def retry(self) -> None:
        """Repeat on a fresh connection what a kept one, closed by the server, swallowed."""
        self.retried = True
        self.channel = None
        self._place.dispatch(self)

    def fail(self, reason: str, refused: bool = False, local: bool = False) -> None:
        """End without an answer."""
        if not self.over:
            self.over = True
            self.sink.on_fault(HttpFault(reason, self.retried or self.channel is not None, refused, local))


class Channel(asyncio.Protocol):
    """A connection: one call at a time.

    Every chunk goes through the parser (0.3 µs a read of one chunk): cutting such a read by hand took longer.
    """

    __slots__ = (
        "_complete",
        "_connected",
        "_exchange",
        "_feed",
        "_head_size",
        "_headed",
        "_headers",
        "_keep",
        "_parser",
        "_place",
        "_reused",
        "_silent",
        "_skip",
        "_transport",
        "_until_close",
        "adopted",
        "dead",
        "idle_since",
    )

    def __init__(self, place: Place) -> None:
        self.adopted = False  # counted by the origin
        self.dead = False
        self.idle_since = 0.0
        self._place = place
        self._transport: asyncio.Transport
        self._connected = False
        self._exchange: Exchange | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._feed: Callable[[bytes], None] = self._parser.feed_data
        self._reused = False
        self._silent = True  # no byte of an answer yet
        self._head_size = 0
        self._headers: dict[str, str] = {}
        self._headed = False  # the sink has the head
        self._skip = False  # inside an interim (1xx) answer
        self._complete = False
        self._keep = False
        self._until_close = False

    # What the origin calls.

    def usable(self) -> bool:
        """Whether a call may go out here, as far as is known."""
        return not self._transport.is_closing()

    def begin(self, exchange: Exchange) -> None:
        """Send a call."""
        self._exchange = exchange
        exchange.channel = self
        self._parser = httptools.HttpResponseParser(self)
        self._feed = self._parser.feed_data
        self._silent = True
        self._head_size = 0
        self._headers = {}
        self._headed = self._skip = self._complete = self._until_close = False
        self._transport.write(exchange.message)

    def close(self, reason: str) -> None:
        """Close; a call in progress fails."""
        self._transport.abort()
        self._fail(reason)

    def discard(self) -> None:
        """Close a connection that nobody got to use."""
        if self._connected:
            self._transport.abort()

    def abort(self) -> None:
        """Close on behalf of the call."""
        self._exchange = None
        self._transport.abort()

    # What the transport calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self._connected = True

    def data_received(self, data: bytes) -> None:
        if self._exchange is None:
            self._transport.abort()  # nobody asked
            return
        self._silent = False
        try:
            self._feed(data)
        except httptools.HttpParserCallbackError:
            _log.exception("a listener to an answer failed")
            self.close("the answer could not be taken")
            return
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if self._complete:
                self._keep = False
            else:
                self.close(f"malformed answer ({error})")
                return
        if self._complete:
            self._finish()
        elif not self._headed:
            self._head_size += len(data)
            if self._head_size > _HEAD_BYTES:
                self.close("the answer's headers are too large")

    def eof_received(self) -> bool:
        if self._exchange is not None and self._until_close:
            self._keep = False
            self._finish()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.dead = True
        del self._parser, self._feed  # a cycle
        exchange = self._exchange
        if exchange is not None:
            if self._until_close and exc is None:
                self._keep = False
                self._finish()
            elif self._silent and self._reused and not exchange.retried:
                self._exchange = None
                self._place.lost(self)
                exchange.retry()
                return
            else:
                self._fail("closed without an answer" if self._silent else "closed in the middle of the answer")
        self._place.lost(self)

    # What the parser calls.

    def on_message_begin(self) -> None:
        if self._complete:
            self._keep = False  # a second answer to one request

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._headed:
            self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        exchange = self._exchange
        if exchange is None or self._complete:
            return
        status = self._parser.get_status_code()
        if status < 200:
            self._skip = True
            return
        headers = self._headers
        self._headed = True
        chunked = headers.get("transfer-encoding", "").lower().endswith("chunked")
        bodiless = exchange.bodiless or status in (204, 304)
        self._until_close = not bodiless and not chunked and "content-length" not in headers
        exchange.sink.on_head(Head(status, headers))
        if exchange.bodiless:
            # The parser does not know that no body follows, so only an answer without one leaves it in order.
            self._complete = True
            self._keep = self._parser.should_keep_alive()

    def on_body(self, data: bytes) -> None:
        exchange = self._exchange
        if exchange is not None:
            if self._complete:
                self._keep = False
            else:
                exchange.sink.on_body(data)

    def on_message_complete(self) -> None:
        if self._skip:
            self._skip = False
            self._headers = {}
        elif not self._complete:
            self._complete = True
            self._keep = self._parser.should_keep_alive()

    # Inside.

    def _finish(self) -> None:
        exchange = self._exchange
        self._exchange = None
        self._reused = True
        if self._keep and exchange is not None and not self._transport.is_closing():
            self._place.release(self)
        else:
            self._transport.abort()
        if exchange is not None:
            exchange.over = True
            exchange.sink.on_end()

    def _fail(self, reason: str) -> None:
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.fail(reason)
