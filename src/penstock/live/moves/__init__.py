"""Moving a running decode from engine to engine: one module for each level, and what they share in ``base``.

What the gateway does at each level, in the order of ``core.types.MigrationLevel``:

* *replay* (``replay``): the source stops, the target computes everything. Always possible.
* *re-prompt* (``reprompt``): stock engines, make before break.
* *hand-off* (``handoff``): the source's plugin stops the request and pins its KV, the target pulls that.
* *pre-copy* (``precopy``): the target pulls the full blocks while the source decodes on, then hand-off for the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from penstock.core.types import MigrationLevel
from penstock.live.instance import Health, Instance
from penstock.live.moves.base import LAST_TOKENS, Move
from penstock.live.moves.handoff import Handoff
from penstock.live.moves.precopy import Precopy
from penstock.live.moves.replay import Replay
from penstock.live.moves.reprompt import Reprompt

if TYPE_CHECKING:
    from penstock.live.carried import CarriedSession

__all__ = ["LAST_TOKENS", "Move", "begin", "refusal"]

_LEVELS: dict[MigrationLevel, type[Move]] = {
    MigrationLevel.REPLAY: Replay,
    MigrationLevel.REPROMPT: Reprompt,
    MigrationLevel.HANDOFF: Handoff,
    MigrationLevel.PRECOPY: Precopy,
}


def begin(session: CarriedSession, source: Instance, target: Instance, level: MigrationLevel, reason: str) -> Move:
    """Start a move; it reports its end to the controller."""
    return _LEVELS[level](session, source, target, reason)


def refusal(session: CarriedSession, source: Instance, target: Instance) -> str | None:
    """Why a decode cannot move now, or None."""
    if session.move is not None:
        return "it is moving already"
    if session.segment is None or session.segment.instance is not source:
        return "it does not decode there"
    if target.health is not Health.UP:
        return "the target is not up"
    if session.limit() - session.generated < LAST_TOKENS:
        return "almost complete"
    return None
