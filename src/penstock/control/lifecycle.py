"""The life of a request as a table: which stage may follow which. Anything else is a bug, and says so."""

from __future__ import annotations

from penstock.core.errors import IllegalTransition
from penstock.policy.view import RequestRecord, Stage

_ENDS = frozenset({Stage.REJECTED, Stage.ABORTED})

NEXT: dict[Stage, frozenset[Stage]] = {
    Stage.ARRIVED: frozenset({Stage.PREFILLING}) | _ENDS,
    # A prefill may start again (its instance died), finish at once (one token asked), or go on in place.
    Stage.PREFILLING: frozenset({Stage.ARRIVED, Stage.PREFILLED, Stage.DECODING, Stage.FINISHED}) | _ENDS,
    Stage.PREFILLED: frozenset({Stage.TRANSFERRING, Stage.ARRIVED}) | _ENDS,
    # A claim on pinned KV is good for one pull: if its target dies, the prompt is computed again.
    Stage.TRANSFERRING: frozenset({Stage.DECODING, Stage.ARRIVED}) | _ENDS,
    Stage.DECODING: frozenset({Stage.MIGRATING, Stage.RECOMPUTING, Stage.FINISHED, Stage.ARRIVED}) | _ENDS,
    Stage.MIGRATING: frozenset({Stage.DECODING, Stage.ARRIVED}) | _ENDS,
    Stage.RECOMPUTING: frozenset({Stage.DECODING, Stage.ARRIVED}) | _ENDS,
    Stage.FINISHED: frozenset(),
    Stage.REJECTED: frozenset(),
    Stage.ABORTED: frozenset(),
}


def advance(record: RequestRecord, stage: Stage) -> None:
    """Move a request to ``stage``; raise :class:`IllegalTransition` if the table does not allow it."""
    if stage not in NEXT[record.stage]:
        raise IllegalTransition(f"request {record.request}: {record.stage.name} cannot become {stage.name}")
    record.stage = stage
