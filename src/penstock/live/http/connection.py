"""One connection of the HTTP server: bytes to requests, requests to the handler one at a time, clocks and limits."""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections import deque
from collections.abc import Callable
from typing import Protocol, cast

from penstock.live.http.messages import Limits
from penstock.live.http.reply import Reply
from penstock.live.http.requests import Fault, Incoming, RequestReader
from penstock.live.http.wire import error_body, header_lines, status_head

Handler = Callable[[Reply], None]
_log = logging.getLogger(__name__)
_LINGER_S = 2.0  # how long a peer may take to read our last words
_BACKLOG = 64 * 1024  # pipelined bytes kept while an answer runs, before reading stops
_RESET = struct.pack("ii", 1, 0)


class Owner(Protocol):
    """What a connection needs of its server."""

    handler: Handler
    limits: Limits
    stopping: bool

    def join(self, connection: Connection) -> bool: ...

    def leave(self, connection: Connection) -> None: ...


class Connection(asyncio.Protocol):
    """Requests of one client, answered in order.

    While an answer runs, further bytes are kept unread (up to 64 KiB, then the socket is no longer read and a client
    that goes away is noticed by the next write). One timer serves all clocks: it is set anew only for an earlier
    deadline, and looks at ``_deadline`` when it fires.
    """

    def __init__(self, owner: Owner, loop: asyncio.AbstractEventLoop) -> None:
        self.admitted = False  # counts against the limit
        self._owner = owner
        self._limits = owner.limits
        self._loop = loop
        self._transport: asyncio.Transport
        self._reader: RequestReader
        self._queue: deque[Incoming] = deque()
        self._backlog: list[bytes] = []
        self._backlog_size = 0
        self._reply: Reply | None = None
        self._paused = False
        self._pumping = False
        self._closing = False  # last words are said; what comes in is thrown away
        self._congested = False
        self._stuck_at = 0  # unsent bytes when the reader was last looked at
        self._deadline = 0.0  # 0: none
        self._timer: asyncio.TimerHandle | None = None

    # What the transport calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        peer = transport.get_extra_info("peername")
        self._reader = RequestReader(self._limits, str(peer[0]) if peer else "", self._queue)
        self.admitted = self._owner.join(self)
        if not self.admitted:
            self._refuse(Fault(503, "too many connections"))
        else:
            self._expire_in(self._limits.idle_s)

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        if self._reply is not None:
            self._backlog.append(data)
            self._backlog_size += len(data)
            if self._backlog_size > _BACKLOG and not self._paused:
                self._paused = True
                self._transport.pause_reading()
            return
        self._pump(data)

    def eof_received(self) -> bool:
        if self._reply is not None:
            self._transport.abort()
        elif not self._closing:
            self._close()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._closing = True
        self._queue.clear()
        self._backlog.clear()
        if self._timer is not None:
            self._timer.cancel()
        reply, self._reply = self._reply, None
        if reply is not None:
            reply.closed = True
            _call(reply.on_disconnect)
            reply.forget()
        self._reader.forget()
        self._owner.leave(self)

    def pause_writing(self) -> None:
        self._congested = True
        if self._reply is not None:
            self._reply.congested = True
        self._stuck_at = self._transport.get_write_buffer_size()
        if not self._closing:
            self._expire_in(self._limits.body_s)

    def resume_writing(self) -> None:
        self._congested = False
        reply = self._reply
        if reply is None:
            return
        self._deadline = 0.0
        reply.congested = False
        if not reply.closed:
            _call(reply.on_drain)

    # What an answer calls.

    def put(self, data: bytes) -> None:
        """Send bytes."""
        self._transport.write(data)

    def overrun(self) -> bool:
        """Cut off a reader that lets too much pile up; say whether that happened."""
        if self._transport.get_write_buffer_size() <= self._limits.write_buffer:
            return False
        self._transport.abort()
        return True

    def answered(self) -> None:
        """The answer has ended: next request, or good-bye."""
        reply, self._reply = self._reply, None
        if self._closing:
            return
        if reply is None or not reply.keep_alive or self._owner.stopping:
            self._close()
        elif not self._pumping:
            self._pump(b"")

    def cut(self, hard: bool) -> None:
        """Close the connection now; ``hard`` with a reset, where a plain close would look like a proper end."""
        self._reply = None
        if not hard:
            self._close()
            return
        sock = self._transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._closing = True
        self._transport.abort()

    # What the server calls.

    def retire(self) -> None:
        """Close, after the running answer if there is one."""
        if self._reply is not None:
            self._reply.close_after()
        elif not self._closing:
            self._close()

    def kill(self) -> None:
        """Close at once."""
        self._transport.abort()

    # Inside.

    def _pump(self, data: bytes) -> None:
        """Read ``data`` and what was kept, and answer in order, until an answer is under way or nothing is left."""
        self._pumping = True
        reader = self._reader
        while True:
            if data:
                reader.feed(data)
            if self._queue:
                self._handle(self._queue.popleft())
                if self._reply is not None or self._closing:
                    break
                data = b""
            elif reader.fault is not None:
                self._refuse(reader.fault)
                break
            elif self._backlog:
                data = b"".join(self._backlog)
                self._backlog.clear()
                self._backlog_size = 0
            else:
                break
        self._pumping = False
        if self._closing:
            return
        if self._reply is not None:
            if not self._congested:
                self._deadline = 0.0
            return
        if self._paused:
            self._paused = False
            self._transport.resume_reading()
        if reader.continue_due:
            reader.continue_due = False
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._await_request(reader)

    def _await_request(self, reader: RequestReader) -> None:
        """Set the clock for what is awaited; bytes alone do not push it back, or a trickle would hold us for ever."""
        limits = self._limits
        if reader.stage_new:
            reader.stage_new = False
            self._expire_in(limits.idle_s if reader.idle else limits.head_s if reader.in_head else limits.body_s)

    def _handle(self, incoming: Incoming) -> None:
        reply = self._reply = Reply(incoming.request, self, incoming.modern, incoming.keep_alive)
        reply.congested = self._congested
        try:
            self._owner.handler(reply)
        except Exception:
            _log.exception("the handler failed on %s %s", incoming.request.method, incoming.request.path)
            if reply.started:
                reply.drop()
            else:
                reply.send(500, error_body(500, "internal error"))

    def _refuse(self, fault: Fault) -> None:
        body = error_body(fault.status, fault.message)
        lines = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
        if fault.status == 503:
            lines["Retry-After"] = "1"
        self._transport.write(status_head(fault.status, header_lines(lines)) + body)
        # Unread bytes at a close make the kernel send a reset, which may overtake our answer: close our side only.
        if self._transport.can_write_eof():
            self._transport.write_eof()
            self._closing = True
            self._expire_in(_LINGER_S)
        else:
            self._close()

    def _close(self) -> None:
        """Send what is written and close; a peer that does not take it is cut off."""
        self._closing = True
        self._stuck_at = self._transport.get_write_buffer_size()
        self._transport.close()
        self._expire_in(_LINGER_S if not self._congested else self._limits.body_s)

    def _expire_in(self, seconds: float) -> None:
        deadline = self._deadline = self._loop.time() + seconds
        timer = self._timer
        if timer is None or timer.when() > deadline:
            if timer is not None:
                timer.cancel()
            self._timer = self._loop.call_at(deadline, self._expired)

    def _expired(self) -> None:
        self._timer = None
        if self._deadline == 0.0:
            return
        if self._loop.time() < self._deadline:
            self._timer = self._loop.call_at(self._deadline, self._expired)
            return
        unsent = self._transport.get_write_buffer_size()
        if self._congested and unsent < self._stuck_at:
            self._stuck_at = unsent  # slow, but it reads
            self._expire_in(self._limits.body_s)
        elif self._closing or self._reply is not None or unsent:
            self._transport.abort()
        elif self._reader.idle:
            self._close()
        else:
            self._refuse(Fault(408, "the request did not arrive in time"))


def _call(listener: Callable[[], None] | None) -> None:
    if listener is None:
        return
    try:
        listener()
    except Exception:
        _log.exception("a listener on an answer failed")
