"""One engine's part of a request's output: an HTTP stream turned into tokens."""

from __future__ import annotations

import logging
from typing import Protocol

import msgspec

from penstock.live.http.client import HttpClient
from penstock.live.http.messages import Call, Head, HttpFault
from penstock.live.http.sse import SseReader
from penstock.live.instance import Instance
from penstock.live.plugin.penstock_engine.messages import Prediction
from penstock.live.wire import Choice, Chunk, Json, encode, prompt_ids_of, read_chunk

log = logging.getLogger("penstock.live")


class EngineError(Exception):
    """An engine failed a call. ``status`` is 0 where no HTTP answer came; the text stays inside the gateway."""

    def __init__(self, reason: str, status: int = 0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.status = status

    @property
    def connection(self) -> bool:
        """Did the engine not answer at all, so that it may be dead?"""
        return self.status == 0

    @property
    def refused(self) -> bool:
        """Did the engine find fault with the request itself?"""
        return 400 <= self.status < 500 and self.status not in (404, 408, 425, 429)


class Listener(Protocol):
    """Who owns a segment."""

    def segment_tokens(self, segment: Segment, ids: list[int], choice: Choice) -> None: ...

    def segment_failed(self, segment: Segment, error: EngineError) -> None: ...

    def segment_predicted(self, segment: Segment, prediction: Prediction) -> None: ...


class Segment:
    """Streams from ``instance``; ``size`` is the length of the sequence there, ``began_at`` output tokens before it.

    ``id`` is the call's own, ``asked`` the tokens asked for (0 where the engine was left to decide). The listener hears
    of tokens, predictions and at most one failure, and of nothing after :meth:`close`.
    """

    def __init__(self, listener: Listener, instance: Instance, size: int, began_at: int, now_s: float) -> None:
        self.listener = listener
        self.instance = instance
        self.size = size
        self.began_at = began_at
        self.last_s = now_s
        self.produced = 0
        self.prompt_ids: list[int] | None = None
        self.finished = False
        self.closed = False
        self.id = ""
        self.asked = 0
        self._link = instance.link
        self._sse = SseReader()
        self._status = 0
        self._complaint = b""
        self._call: Call | None = None
        instance.joined(size, now_s)

    def open(self, client: HttpClient, path: str, body: Json, headers: dict[str, str]) -> None:
        """Send the request."""
        self.id = headers["x-request-id"]
        self.asked = body.get("max_tokens", 0)
        if self._link is not None:
            self._link.watch(self.id, self._predicted)
        self._call = client.open(self.instance.url, "POST", path, self, headers, encode(body))

    def close(self) -> None:
        """Stop listening; if the engine is still at it, it sees a disconnect and drops the request."""
        if self.closed:
            return
        self.closed = True
        self.instance.left(self.size, self.produced > 0)
        if self._link is not None:
            self._link.unwatch(self.id)
        if self._call is not None and not self.finished:
            self._call.abort()

    def account(self, count: int, now_s: float) -> float:
        """Book ``count`` new tokens; return the gap before them (s)."""
        gap_s = now_s - self.last_s
        self.last_s = now_s
        self.size += count
        if not count:
            return gap_s
        if self.produced:
            self.instance.heard(count, gap_s, now_s)
        else:
            self.instance.began(count, now_s)
        self.produced += count
        return gap_s

    def _predicted(self, prediction: Prediction) -> None:
        if not self.closed:
            self.listener.segment_predicted(self, prediction)

    # -- Sink -------------------------------------------------------------------------------------------------------

    def on_head(self, head: Head) -> None:
        """See ``Sink``."""
        self._status = head.status

    def on_body(self, data: bytes) -> None:
        """See ``Sink``."""
        if self._status != 200:
            self._complaint += data[: 4096 - len(self._complaint)]
            return
        for payload in self._sse.feed(data):
            if self.closed or self.finished:
                return
            if payload == b"[DONE]":
                return
            try:
                chunk = read_chunk(payload)
            except msgspec.MsgspecError:
                self._fail(EngineError("it sent a chunk that is no JSON", 502))
                return
            if chunk.error is not None:
                self._fail(EngineError("it reported an error in the stream", 500))
                return
            self._chunk(chunk)

    def _chunk(self, chunk: Chunk) -> None:
        if not chunk.choices:
            return
        choice = chunk.choices[0]
        if self.prompt_ids is None:
            self.prompt_ids = prompt_ids_of(chunk)
        ids = choice.token_ids
        if ids is None:
            ids = []
        if not ids and choice.finish_reason is None and not choice.words():
            return
        if choice.finish_reason is not None:
            self.finished = True
        self.listener.segment_tokens(self, ids, choice)

    def on_end(self) -> None:
        """See ``Sink``."""
        if self._status != 200:
            self._fail(EngineError(self._complaint.decode(errors="replace"), self._status))
        elif not self.finished:
            self._fail(EngineError("its stream ended without a finish reason"))

    def on_fault(self, fault: HttpFault) -> None:
        """See ``Sink``."""
        if not self.finished:
            self._fail(EngineError(fault.reason))

    def _fail(self, error: EngineError) -> None:
        if self.closed:
            return
        self.close()
        self.listener.segment_failed(self, error)


async def ask(
    client: HttpClient, instance: Instance, path: str, body: Json, headers: dict[str, str], timeout_s: float
) -> Chunk:
    """One whole answer of an engine.

    Raises
    ------
    EngineError
        It could not be reached, answered with an error, or not in time.
    """
    try:
        answer = await client.fetch(instance.url, "POST", path, encode(body), headers, timeout_s)
    except HttpFault as fault:
        raise EngineError(fault.reason) from None
    if answer.status != 200:
        raise EngineError(answer.body[:2000].decode(errors="replace"), answer.status)
    try:
        chunk = read_chunk(answer.body)
    except msgspec.MsgspecError:
        raise EngineError("it sent an answer that is no JSON", 502) from None
    if chunk.error is not None or not chunk.choices:
        raise EngineError("it sent an answer without choices", 502)
    return chunk
