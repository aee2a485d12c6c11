"""Emptying an instance: it gets nothing new, what can move moves, what cannot is waited for."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from penstock.core.events import (
    DecodeStarted,
    Event,
    Finished,
    MigrationDone,
    MigrationFailed,
    MoveOrdered,
    PrefillDone,
)
from penstock.live.admin.views import remaining, why_not_movable
from penstock.live.admin.watch import EventWatch
from penstock.live.carried import CarriedSession
from penstock.live.instance import Instance
from penstock.live.session import Session
from penstock.live.world import LiveWorld

AT_ONCE = 32
"""Moves under way at a time: each costs the source one short prefill. Ours."""
ROUND_S = 0.25
"""Longest time between two looks."""
LEAST_ROUND_S = 0.05
"""Shortest time: each look goes through all requests."""
BACK_OFF_S = (0.25, 0.5, 1.0, 2.0)
"""Pause after the first, second, ... rolled-back move of one request."""
NOBODY = "no other instance can take it now"


class Drain:
    """Runs until ``instance`` is empty or :meth:`cancel`; then calls ``then``.

    ``moved`` counts the moves that ended well; ``refusals`` holds the latest reason why one did not, by request.
    """

    def __init__(
        self, world: LiveWorld, watch: EventWatch, instance: Instance, then: Callable[[], None] | None = None
    ) -> None:
        self.world = world
        self.watch = watch
        self.instance = instance
        self.then = then
        self.moved = 0
        self.refusals: dict[int, str] = {}
        self.drained = False
        self._tries: dict[int, int] = {}
        self._not_before_s: dict[int, float] = {}
        self._stirred = asyncio.Event()
        watch.listeners.append(self._hear)
        self.task = asyncio.create_task(self._run())
        self.task.add_done_callback(lambda task: watch.listeners.remove(self._hear))

    @property
    def running(self) -> bool:
        """Is it still at work?"""
        return not self.task.done()

    def cancel(self) -> None:
        """Stop ordering moves; those under way go on."""
        self.then = None
        self.task.cancel()

    async def wait(self, timeout_s: float) -> None:
        """Return when it is over, at the latest after ``timeout_s``."""
        await asyncio.wait([self.task], timeout=timeout_s)

    def _hear(self, event: Event) -> None:
        here = self.instance.index
        if isinstance(event, MigrationDone):
            self.moved += event.source == here
        elif isinstance(event, MigrationFailed):
            if event.source == here:
                self.refusals[event.request] = event.reason
        elif not (isinstance(event, Finished | PrefillDone | DecodeStarted) and event.instance == here):
            return
        self._stirred.set()

    async def _run(self) -> None:
        while left := remaining(self.world, self.instance.index):
            self._stirred.clear()
            self._order(left)
            await asyncio.sleep(LEAST_ROUND_S)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stirred.wait(), ROUND_S)
        self.drained = True
        self.world.log.info("drained", extra={"instance": self.instance.index})
        if self.then is not None:
            self.then()

    def _order(self, left: list[Session]) -> None:
        here, now = self.instance.index, self.world.now()
        room = AT_ONCE - sum(isinstance(s, CarriedSession) and s.move is not None for s in left)
        for session in left:
            if room <= 0:
                return
            number = session.request
            if session.where != here or why_not_movable(session) or self._not_before_s.get(number, 0.0) > now:
                continue
            tries = self._tries.get(number, 0)
            self._tries[number] = tries + 1
            self._not_before_s[number] = now + BACK_OFF_S[min(tries, len(BACK_OFF_S) - 1)]
            self.refusals[number] = NOBODY  # unless a move begins, whose own end says more
            self.world.tell(MoveOrdered(number, -1, "drain"))
            room -= isinstance(session, CarriedSession) and session.move is not None
