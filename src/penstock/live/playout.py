"""A few tokens in hand around a move, so that the client does not see it: the playout buffer of streaming media. Ours.

While a move is being prepared, tokens are shown a little slower than they come, until enough are in hand to bridge the
take-over. They are shown at the usual pace during it, and what is left afterwards is shown a little faster. The mean
time per token hardly changes; the pause is gone. Tokens in hand belong to the request's output: they are in what the
target continues from, and survive an engine.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

SLOWER = 1.25
FASTER = 0.8
Shown = Callable[[float], None]
"""Told the time between this chunk and the one before, when it reaches the client."""


class Playout:
    """Shows chunks of tokens in order, about ``pace_s`` seconds a token.

    ``show`` takes the token ids and text of a chunk; ``emptied`` is called once, when all is shown after ``drain``.
    ``want_s`` is how many seconds' worth of tokens to gather.
    """

    def __init__(
        self,
        pace_s: float,
        want_s: float,
        last_s: float,
        show: Callable[[list[int], str], None],
        emptied: Callable[[], None],
    ) -> None:
        self.pace_s = pace_s
        self.want_s = want_s
        self._show = show
        self._emptied = emptied
        self._loop = asyncio.get_running_loop()
        self._queue: deque[tuple[list[int], str, Shown | None]] = deque()
        self._tokens = 0
        self._draining = False
        self._timer: asyncio.TimerHandle | None = None
        self._last = last_s
        self._due = last_s

    @property
    def in_hand_s(self) -> float:
        """Seconds for which the tokens in hand last."""
        return self._tokens * self.pace_s

    @property
    def full(self) -> bool:
        """Are there as many as wanted?"""
        return self.in_hand_s >= self.want_s

    def push(self, ids: list[int], text: str, shown: Shown | None = None) -> None:
        """Take a chunk; it may be shown at once."""
        self._queue.append((ids, text, shown))
        self._tokens += len(ids)
        if self._timer is None:
            self._schedule()

    def drain(self) -> None:
        """The move is over: catch up."""
        self._draining = True
        if not self._queue and self._timer is None:
            self._end()

    def flush(self) -> None:
        """Show everything now."""
        self.cancel()
        while self._queue:
            self._one()

    def cancel(self) -> None:
        """Show nothing any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _schedule(self) -> None:
        now = self._loop.time()
        if self._due <= now:
            self._step()
        else:
            self._timer = self._loop.call_at(self._due, self._step)

    def _step(self) -> None:
        self._timer = None
        while self._queue and self._due <= self._loop.time():
            self._one()
        if self._queue:
            self._timer = self._loop.call_at(self._due, self._step)
        elif self._draining:
            self._end()

    def _one(self) -> None:
        ids, text, shown = self._queue.popleft()
        self._tokens -= len(ids)
        now = self._loop.time()
        gap_s, self._last = now - self._last, now
        speed = FASTER if self._draining else 1.0 if self.full else SLOWER
        # Not from ``now`` where the timer was late: lateness must not add up.
        self._due = max(self._due, now - self.pace_s) + len(ids) * self.pace_s * speed
        if shown is not None:
            shown(gap_s)
        self._show(ids, text)

    def _end(self) -> None:
        self._draining = False
        self._emptied()
