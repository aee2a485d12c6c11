"""The words that server and client share: requests, responses, limits, and who listens to a stream."""

from __future__ import annotations

from typing import Protocol

import msgspec


class Limits(msgspec.Struct, frozen=True):
    """What a peer may ask of us. Times in seconds, sizes in bytes.

    ``head_s`` bounds the time from the first byte of a request to the end of its headers and ``body_s`` that to the end
    of its body; ``idle_s`` how long an idle keep-alive connection is kept; ``connections`` how many may be open.
    ``write_buffer`` is how much unsent output a slow reader may pile up before it is cut off.
    """

    head_bytes: int = 32 * 1024
    body_bytes: int = 32 * 1024 * 1024
    head_s: float = 10.0
    body_s: float = 60.0
    idle_s: float = 75.0
    connections: int = 65536
    write_buffer: int = 4 * 1024 * 1024


class HttpFault(Exception):
    """A peer could not be reached, went away or spoke no HTTP.

    ``sent`` says whether it may have seen the call, ``refused`` that nobody listens there, ``local`` that it is this
    machine that lacks something (files, ports), so that the peer is not to blame.
    """

    def __init__(self, reason: str, sent: bool = True, refused: bool = False, local: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.sent = sent
        self.refused = refused
        self.local = local


class Request:
    """One request as the server received it: ``headers`` by lower-case name (the last one wins), body whole."""

    __slots__ = ("body", "headers", "method", "path", "peer", "query")

    def __init__(self, method: str, path: str, query: str, headers: dict[str, str], body: bytes, peer: str) -> None:
        self.method = method
        self.path = path
        self.query = query
        self.headers = headers
        self.body = body
        self.peer = peer


class Head(msgspec.Struct, frozen=True):
    """Status and headers (lower-case names) of a response."""

    status: int
    headers: dict[str, str]


class Response(msgspec.Struct, frozen=True):
    """A response, whole."""

    status: int
    headers: dict[str, str]
    body: bytes


class Sink(Protocol):
    """Listens to one response, in this order: ``on_head``, any ``on_body``, then ``on_end`` or ``on_fault`` (once).

    ``on_fault`` may come at any time instead of the rest. After ``Call.abort`` nothing comes any more. All are called
    from the event loop, synchronously with the bytes' arrival: they must be quick and must not raise.
    """

    def on_head(self, head: Head) -> None: ...

    def on_body(self, data: bytes) -> None: ...

    def on_end(self) -> None: ...

    def on_fault(self, fault: HttpFault) -> None: ...


class Call(Protocol):
    """A call in progress at a client."""

    def abort(self) -> None:
        """Close its connection, so that the server notices at once; nothing reaches the sink after this."""
