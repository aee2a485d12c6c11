"""Open loop: every request is sent when the trace says, whatever became of those before it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from time import perf_counter

from penstock.live.http.client import HttpClient
from penstock.live.load.bodies import Bodies
from penstock.live.load.endpoint import Endpoint
from penstock.live.load.stream import Gaps, Stream
from penstock.workload.trace import Trace

LEAD_S = 0.1
"""Between the call of ``run`` and the first arrival: time to make the first bodies."""
AHEAD = 256
"""Bodies made ahead of time, at most."""
IDLE_S = 0.002
"""With less than this before the next arrival no body is made ahead."""
TICK_S = 0.1


class OpenLoop:
    """One replay of a trace.

    Parameters
    ----------
    concurrency : int
        Requests in flight at most, 0 for no limit. With a limit the loop is closed while it is reached: requests
        wait here, in order, and ``due_s`` becomes the time when they got a place.
    timeout_s : float
        A request that takes longer, from its sending to its end, fails with ``timeout``.
    progress : callable, optional
        Called with the number of requests that ended, about ten times a second.
    tpot_s : sequence of float, optional
        Seconds a token that each request's deadlines allow; nobody looks at deadlines without.

    Attributes
    ----------
    start_s : float
        ``perf_counter`` time of the trace's zero.
    streams : list of Stream
        Of the requests sent so far, in order.
    due_s : list of float
        When each should have been sent, seconds since ``start_s``.
    delayed : int
        Requests that waited for a place; ``delay_s`` is the longest such wait.
    gaps : Gaps
        Of all streams.
    wanted : list of int
        Output tokens asked for, of every request of the trace.
    """

    def __init__(
        self,
        client: HttpClient,
        at: Endpoint,
        trace: Trace,
        bodies: Bodies,
        concurrency: int = 0,
        timeout_s: float = float("inf"),
        progress: Callable[[int], None] | None = None,
        tpot_s: Sequence[float] = (),
    ) -> None:
        self._client = client
        self._at = at
        self._arrivals: list[float] = trace.arrival_s.tolist()
        self.wanted: list[int] = trace.output_tokens.tolist()
        self._bodies = bodies
        self._concurrency = concurrency
        self._tpot_s = tpot_s
        self._timeout_s = timeout_s
        self._progress = progress
        self._ready: deque[bytes] = deque()
        self._made = 0
        self._flying = 0
        self._ended = 0
        self._oldest = 0
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._done = asyncio.Event()
        self._stopped = False
        self._held = False
        self.start_s = 0.0
        self.streams: list[Stream] = []
        self.due_s: list[float] = []
        self.delayed = 0
        self.delay_s = 0.0
        self.gaps = Gaps()

    async def run(self) -> None:
        """Send everything and wait for the last answer (or for :meth:`stop`)."""
        self.start_s = perf_counter() + LEAD_S
        self._make_ahead(self.start_s)
        self._pump()
        while not self._done.is_set():
            try:
                await asyncio.wait_for(self._done.wait(), TICK_S)
            except TimeoutError:
                self._tick()
        self._tick()

    def stop(self) -> None:
        """End now: nothing more is sent, what is in flight is broken off and stays unfinished."""
        if self._stopped:
            return
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
        for stream in self.streams[self._oldest :]:
            if not stream.ended:
                stream.stop()
        self._done.set()

    def _pump(self) -> None:
        """Send what is due, make bodies while there is time, and come back for the next."""
        self._timer = None
        held, self._held = self._held, False
        while len(self.streams) < len(self._arrivals) and not self._stopped:
            due = self.start_s + self._arrivals[len(self.streams)]
            if due > perf_counter():
                self._make_ahead(due)
                self._timer = self._loop.call_later(max(due - perf_counter(), 0.0), self._pump)
                return
            if self._concurrency and self._flying >= self._concurrency:
                self._held = True  # the next end comes back here
                return
            self._send(held)

    def _send(self, held: bool) -> None:
        """Send the next request; ``held`` if it, or one before it, waited for a place."""
        i = len(self.streams)
        if not self._ready:
            self._make()
        stream = Stream(i, self.gaps, self._on_end)
        due, now = self._arrivals[i], perf_counter()
        if held:
            self.delayed += 1
            self.delay_s = max(self.delay_s, now - self.start_s - due)
            due = now - self.start_s
        if self._tpot_s:
            stream.tpot_s = self._tpot_s[i]
        self.streams.append(stream)
        self.due_s.append(due)
        self._flying += 1
        stream.sent_s = now
        at = self._at
        stream.call = self._client.open(at.origin, "POST", at.path, stream, at.headers, self._ready.popleft())

    def _on_end(self, stream: Stream) -> None:
        self._flying -= 1
        self._ended += 1
        if self._ended == len(self._arrivals):
            self._done.set()
        elif self._held and not self._stopped:
            self._pump()

    def _make_ahead(self, until_s: float) -> None:
        n = len(self._arrivals)
        while self._made < n and len(self._ready) < AHEAD and until_s - perf_counter() > IDLE_S:
            self._make()

    def _make(self) -> None:
        self._ready.append(self._bodies.body(self._made))
        self._made += 1

    def _tick(self) -> None:
        streams, limit = self.streams, perf_counter() - self._timeout_s
        while self._oldest < len(streams) and (streams[self._oldest].ended or streams[self._oldest].sent_s < limit):
            # A timed-out stream ends here, so the oldest that is left is the only one to look at.
            if not streams[self._oldest].ended:
                streams[self._oldest].fail("timeout", f"no end within {self._timeout_s:g} s")
            self._oldest += 1
        if self._progress is not None:
            self._progress(self._ended)
