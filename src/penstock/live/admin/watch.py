"""Hears every event that the controller accepts, so that whoever ordered a move learns how it ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from penstock.core.actions import Action
from penstock.core.events import (
    Aborted,
    Event,
    Finished,
    InstanceDown,
    Interrupted,
    MigrationDone,
    MigrationFailed,
)

Outcome = tuple[str, str]
"""``done``, ``rolled back`` or ``over``; and the reason of the latter two."""


class EventWatch:
    """Stands where the world's event log stands, writes to that log (if there is one), and tells who listens."""

    def __init__(self, log: Any = None) -> None:
        self.log = log
        self.listeners: list[Callable[[Event], None]] = []
        self._moves: dict[int, list[asyncio.Future[Outcome]]] = {}

    def write(self, now: float, event: Event, actions: Sequence[Action]) -> None:
        """As :class:`penstock.core.eventlog.EventLog` has it."""
        if self.log is not None:
            self.log.write(now, event, actions)
        for request, outcome in _outcomes(event):
            for future in self._moves.pop(request, ()):
                if not future.done():
                    future.set_result(outcome)
        for listener in list(self.listeners):
            listener(event)

    def close(self) -> None:
        """Finish the log."""
        if self.log is not None:
            self.log.close()

    def outcome_of(self, request: int) -> asyncio.Future[Outcome]:
        """How the move that is about to be ordered for ``request`` ends."""
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._moves.setdefault(request, []).append(future)
        return future

    def forget(self, request: int, future: asyncio.Future[Outcome]) -> None:
        """Nobody waits for ``future`` any more."""
        waiting = self._moves.get(request)
        if waiting is not None and future in waiting:
            waiting.remove(future)
            if not waiting:
                del self._moves[request]


def _outcomes(event: Event) -> list[tuple[int, Outcome]]:
    if isinstance(event, MigrationDone):
        return [(event.request, ("done", ""))]
    if isinstance(event, MigrationFailed):
        return [(event.request, ("rolled back", event.reason))]
    if isinstance(event, Finished):
        return [(event.request, ("over", "the request finished first"))]
    if isinstance(event, Aborted):
        return [(event.request, ("over", "the request was cancelled"))]
    if isinstance(event, Interrupted):
        return [(event.request, ("over", "its instance failed it; it starts again"))]
    if isinstance(event, InstanceDown):
        return [(request, ("over", "its instance went down; it starts again elsewhere")) for request in event.lost]
    return []
