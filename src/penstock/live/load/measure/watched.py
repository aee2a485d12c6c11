"""A stream whose every token's arrival is kept, and that can be waited for."""

from __future__ import annotations

import asyncio
from time import perf_counter

import msgspec

from penstock.core.errors import PenstockError
from penstock.live.http.messages import Call, Head, HttpFault
from penstock.live.http.sse import SseReader
from penstock.live.load.chunks import complaint, decode_chunk


class Lost(PenstockError):
    """A probe failed."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the engine failed a probe ({reason})", "see its log; try --max-batch or --seconds smaller")


class Watched:
    """A sink that notes when each token came.

    Attributes
    ----------
    sent_s : float
        ``perf_counter`` time at which the request was sent.
    times_s : list of float
        When each token came; tokens of one chunk share a time.
    """

    def __init__(self) -> None:
        self.sent_s = perf_counter()
        self.times_s: list[float] = []
        self.call: Call | None = None
        self._status = 0
        self._body = b""
        self._reader = SseReader()
        self._fault: str | None = None
        self._over = False
        self._wanted = 0
        self._waiter: asyncio.Future[None] | None = None

    async def tokens(self, n: int, timeout_s: float) -> None:
        """Wait until ``n`` tokens came; for n = 0 until the answer has ended.

        Raises
        ------
        Lost
            The answer failed or ended before, or the time is up.
        """
        if not self._reached(n):
            self._wanted, self._waiter = n, asyncio.get_running_loop().create_future()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._waiter
            except TimeoutError:
                raise Lost(f"{len(self.times_s)} of {n} tokens within {timeout_s:g} s") from None
            finally:
                self._waiter = None
        if self._fault is not None:
            raise Lost(self._fault)
        if n > len(self.times_s):
            raise Lost(f"the output ended after {len(self.times_s)} of {n} tokens")

    def stop(self) -> None:
        """Break it off."""
        if self.call is not None:
            self.call.abort()

    def on_head(self, head: Head) -> None:
        """See ``Sink``."""
        self._status = head.status

    def on_body(self, data: bytes) -> None:
        """See ``Sink``."""
        if self._status != 200:
            self._body += data
            return
        now = perf_counter()
        for payload in self._reader.feed(data):
            if payload == b"[DONE]":
                continue
            try:
                chunk = decode_chunk(payload)
            except msgspec.MsgspecError:
                self._fault = "malformed chunk"
                continue
            if chunk.error is not None:
                self._fault = complaint(payload)
            for choice in chunk.choices:
                count = int(choice.says()) if choice.token_ids is None else len(choice.token_ids)
                self.times_s.extend([now] * count)
        self._wake()

    def on_end(self) -> None:
        """See ``Sink``."""
        if self._status != 200:
            self._fault = f"HTTP {self._status}: {complaint(self._body)}"
        self._over = True
        self._wake()

    def on_fault(self, fault: HttpFault) -> None:
        """See ``Sink``."""
        self._fault = fault.reason
        self._over = True
        self._wake()

    def _reached(self, n: int) -> bool:
        return self._over or self._fault is not None or 0 < n <= len(self.times_s)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done() and self._reached(self._wanted):
            self._waiter.set_result(None)
