"""Replay, always possible: the source stops, the target computes everything."""

from __future__ import annotations

from penstock.core.types import MigrationLevel
from penstock.live.moves.base import Move
from penstock.live.segment import EngineError


class Replay(Move):
    """Break before make. Should the target fail, the request starts again like any that lost its engine."""

    level = MigrationLevel.REPLAY

    async def _stages(self) -> None:
        session = self.session
        if session.unshown and not await self._whole_character():
            self._rolled_back("no whole character to cut at")
            return
        if session.segment is not None:
            session.segment.close()
            session.segment = None
        self._cut_s = session.last_s
        self._challenge()

    def _challenger_lost(self, reason: str, error: EngineError) -> None:
        self._report(reason)
        self.session.engine_failed(self.target, EngineError(reason, 502))
