"""One request's answer as it comes in: when, how many tokens, and how it ended. This is the client's hot path."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from math import inf
from time import perf_counter

import msgspec

from penstock.live.http.messages import Call, Head, HttpFault
from penstock.live.http.sse import SseReader
from penstock.live.load.chunks import complaint, decode_chunk

BY_IDS, BY_USAGE, BY_CHUNKS = "token_ids", "usage", "chunks"
"""How tokens were counted: by the ids in the chunks, by the usage at the end, or one for each chunk with output."""

ERROR_BYTES = 4096
ENDINGS = frozenset(("stop", "length", "tool_calls", "function_call", "content_filter"))
"""Finish reasons of an answer that is whole; vLLM's ``abort`` and ``error`` are not among them."""


class Gaps:
    """Inter-token gaps of all streams, seconds, as the client saw them; ``zeros`` came in one piece with another."""

    __slots__ = ("seconds", "zeros")

    def __init__(self) -> None:
        self.seconds = array("d")
        self.zeros = 0


class Stream:
    """Listens to one streamed answer (a :class:`~penstock.live.http.messages.Sink`).

    Attributes
    ----------
    sent_s, first_s, last_s : float
        When the request was sent, and when its first and last token came, ``perf_counter`` seconds; NaN if never.
    emitted : int
        Output tokens received; ``counted`` says how they were counted.
    prompt_tokens : int or None
        As the server reports it.
    status : int
        Of the response, 0 before its head.
    error : str or None
        Kind of failure ("HTTP 429", "timeout", ...); ``detail`` is what the server said. None while all is well.
    longest_s : float
        The longest gap between two tokens.
    tpot_s : float
        Seconds a token, by which ``latest_s`` counts; inf (nobody looks) unless it is set before the first token.
    latest_s : float
        The most of ``time of token i - i tpot_s`` over the tokens after the first (i from 0): -inf if none.
    ended : bool
        Nothing more will come.
    """

    __slots__ = (
        "_body",
        "_finish_reason",
        "_gaps",
        "_on_end",
        "_reader",
        "call",
        "counted",
        "detail",
        "emitted",
        "ended",
        "error",
        "first_s",
        "index",
        "last_s",
        "latest_s",
        "longest_s",
        "prompt_tokens",
        "sent_s",
        "status",
        "tpot_s",
    )

    def __init__(self, index: int, gaps: Gaps, on_end: Callable[[Stream], None]) -> None:
        self.index = index
        self.call: Call | None = None
        self.sent_s = self.first_s = self.last_s = float("nan")
        self.emitted = 0
        self.counted = BY_CHUNKS
        self.prompt_tokens: int | None = None
        self.status = 0
        self.error: str | None = None
        self.detail = ""
        self.longest_s = 0.0
        self.tpot_s = inf
        self.latest_s = -inf
        self.ended = False
        self._gaps = gaps
        self._on_end = on_end
        self._reader = SseReader()
        self._finish_reason = ""
        self._body = b""

    def on_head(self, head: Head) -> None:
        """See ``Sink``."""
        self.status = head.status
        if head.status == 200 and "json" in head.headers.get("content-type", ""):
            self.fail("not a stream", "the server answered whole, though a stream was asked for")

    def on_body(self, data: bytes) -> None:
        """See ``Sink``. All tokens of one piece of data came at one time."""
        if self.ended:
            return
        if self.status != 200:
            if len(self._body) < ERROR_BYTES:
                self._body += data
            return
        now = perf_counter()
        for payload in self._reader.feed(data):
            if payload == b"[DONE]":
                continue
            try:
                chunk = decode_chunk(payload)
            except msgspec.MsgspecError as problem:
                self.fail("malformed chunk", str(problem))
                return
            if chunk.error is not None:
                self.fail("error in the stream", complaint(payload))
                return
            for choice in chunk.choices:
                ids = choice.token_ids
                if ids is not None:
                    self.counted = BY_IDS
                    if ids:
                        self._tokens(len(ids), now)
                elif self.counted is not BY_IDS and choice.says():
                    self._tokens(1, now)
                if choice.finish_reason is not None:
                    self._finish_reason = choice.finish_reason
            if chunk.usage is not None:
                self._usage(chunk.usage.prompt_tokens, chunk.usage.completion_tokens)

    def on_end(self) -> None:
        """See ``Sink``."""
        if self.ended:
            return
        if self.status != 200:
            self.fail(f"HTTP {self.status}", complaint(self._body))
        elif not self._finish_reason:
            self.fail("cut off", "the stream ended without a finish reason")
        elif self._finish_reason not in ENDINGS:
            self.fail(f"finish reason {self._finish_reason}", "the server gave the request up")
        elif not self.emitted:
            self.fail("no token", "the stream ended properly, but carried no token")
        else:
            self._over()

    def on_fault(self, fault: HttpFault) -> None:
        """See ``Sink``."""
        self.fail("connection lost" if self.status else "no answer", fault.reason)

    def fail(self, kind: str, detail: str = "") -> None:
        """Give the request up as failed, closing its connection if it is still open."""
        if self.ended:
            return
        self.error, self.detail = kind, detail
        self.stop()
        self._over()

    def stop(self) -> None:
        """Close the connection; nothing comes any more."""
        if self.call is not None:
            self.call.abort()

    def _tokens(self, count: int, now: float) -> None:
        if self.emitted:
            gap = now - self.last_s
            self._gaps.seconds.append(gap)
            if gap > self.longest_s:
                self.longest_s = gap
            late = now - self.emitted * self.tpot_s
            if late > self.latest_s:  # of tokens that come together the first is the latest
                self.latest_s = late
        else:
            self.first_s = now
            if count > 1:
                self.latest_s = now - self.tpot_s
        self._gaps.zeros += count - 1
        self.emitted += count
        self.last_s = now

    def _usage(self, prompt: int | None, completion: int | None) -> None:
        if prompt:
            self.prompt_tokens = prompt
        if completion and self.counted is not BY_IDS:
            # A running total with every chunk (``continuous_usage_stats``) ends at the same number.
            self.counted = BY_USAGE
            self.emitted = completion

    def _over(self) -> None:
        self.ended = True
        self.call = None  # so that connection and buffers can go
        self._on_end(self)
