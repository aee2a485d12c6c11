"""One request at the gateway, from arrival to end: what carried and relayed requests have in common."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from penstock.core.events import NO_PREDICTION, Aborted, Finished
from penstock.core.types import Slo
from penstock.live.claims import Claim, is_claim
from penstock.live.instance import Instance
from penstock.live.intake import Intake
from penstock.live.output import ClientOutput
from penstock.live.segment import EngineError
from penstock.live.wire import Json

if TYPE_CHECKING:
    from penstock.live.world import LiveWorld

NOWHERE = -1
MAX_ATTEMPTS = 6
"""Engines that may fail a request before the client is told. Ours: each attempt needs a fault of its own."""
PROGRESS_TOKENS = 16
"""So many tokens between two faults, and counting starts anew: a long answer may outlive many engines. Ours."""


class Session:
    """A request in flight.

    ``request`` is its number for the controller (a new one if it had to be announced again), ``name`` its id in headers
    and logs, ``where`` the instance that works on it. Times are the gateway clock's (s); -1 where not yet.
    Subclasses start work (``prefill``, ``decode``, ``serve``) and stop it (``drop_work``).
    """

    def __init__(self, world: LiveWorld, intake: Intake, out: ClientOutput, name: str, slo: Slo) -> None:
        self.world = world
        self.intake = intake
        self.out = out
        self.name = name
        self.slo = slo
        self.request = -1
        self.where = NOWHERE
        self.stage = "queued"
        self.prompt_tokens = 0
        self.arrived_s = world.now()
        self.first_s = -1.0
        self.last_s = -1.0
        self.attempts = 0
        self._at_fault = 0  # output tokens at the latest fault
        self.moves = 0
        self.claim: Claim | None = None
        self.over = False
        self.task: asyncio.Task[None] | None = None
        self._prefilling: Instance | None = None

    # -- the subclass's part ----------------------------------------------------------------------------------------

    @property
    def generated(self) -> int:
        """Output tokens that the client has."""
        raise NotImplementedError

    async def _prefill(self, instance: Instance) -> None:
        """See :meth:`prefill`."""
        raise NotImplementedError

    def decode(self, instance: Instance) -> None:
        """Go on decoding on ``instance``, from the KV that the prefill left."""
        raise NotImplementedError

    def serve(self, instance: Instance) -> None:
        """Do both phases on ``instance``."""
        raise NotImplementedError

    def drop_work(self) -> None:
        """Stop whatever engines do for this request. May be called at any time, and twice."""
        if self.task is not None:
            self.task.cancel()
            self.task = None
        self._prefill_over()

    @property
    def can_restart(self) -> bool:
        """May the request be computed anew after an engine failed?"""
        return True

    def predicted_remaining(self) -> float:
        """Output tokens that are predicted to come; NO_PREDICTION where nobody can say."""
        return NO_PREDICTION

    def note_end(self, outcome: str) -> None:
        """The request is over: what is known of it only now goes to the metrics."""

    def release_claim(self) -> None:
        """Have KV freed that is pinned for this request and will not be used."""
        self.claim = None

    # -- common -----------------------------------------------------------------------------------------------------

    def prefill(self, instance: Instance) -> None:
        """Compute the KV of prompt and output so far on ``instance``, and one token."""
        self._work_at(instance, "prefilling")
        self.release_claim()  # of an earlier attempt
        self._prefill_began(instance)
        self.task = asyncio.create_task(self._prefill(instance))

    def keep_claim(self, params: Json | None, instance: Instance, tokens: int) -> bool:
        """Take custody of the KV of ``tokens`` tokens that ``instance`` has pinned; False if it pinned nothing."""
        if params is None or not is_claim(params):
            return False
        block = instance.abilities.block_size
        now = self.world.now()
        self.claim = Claim(self.request, instance.index, tokens, params, block, now, self.world.lease_s)
        self.world.claims.put(self.claim)
        return True

    def call_id(self) -> str:
        """An id for a call to an engine. It begins with the request's name, so that logs can be joined."""
        return self.name

    def headers(self, call_id: str | None = None) -> dict[str, str]:
        """Headers of a call to an engine."""
        return {"x-request-id": call_id or self.call_id(), **self.world.engine_headers}

    def _work_at(self, instance: Instance, stage: str) -> None:
        self.where = instance.index
        self.stage = stage

    def _prefill_began(self, instance: Instance) -> None:
        self._prefill_over()
        self._prefilling = instance
        instance.prefills += 1

    def _prefill_over(self) -> None:
        if self._prefilling is not None:
            self._prefilling.prefills -= 1
            self._prefilling = None

    def claim_used(self) -> None:
        """The pull is over: whoever held the KV has been told."""
        self.world.claims.settle(self.claim)
        self.claim = None

    def first_byte(self, now_s: float) -> None:
        """The client's first token is on its way."""
        if self.first_s < 0.0:
            self.first_s = now_s
            self.world.metrics.first_token(self, now_s - self.arrived_s)

    def finish(self, instance: Instance) -> None:
        """The request is complete."""
        if self.over:
            return
        self.over = True
        self.drop_work()
        self.release_claim()
        self.world.ended(self, Finished(self.request, instance.index, self.generated, instance.load()), "finished")

    def abort(self, outcome: str = "disconnected") -> None:
        """The client went away, or was told that it is over."""
        if self.over:
            return
        self.over = True
        self.drop_work()
        self.release_claim()
        self.world.ended(self, Aborted(self.request), outcome)

    def fail(self, status: int, message: str, kind: str, retry_after_s: int | None = None) -> None:
        """Tell the client that it is over, and end."""
        self.out.fail(status, message, kind, retry_after_s)
        self.abort("failed")

    def count_attempt(self) -> None:
        """An engine has failed the request."""
        if self.generated - self._at_fault >= PROGRESS_TOKENS:
            self.attempts = 0
        self.attempts += 1
        self._at_fault = self.generated

    def engine_failed(self, instance: Instance, error: EngineError) -> None:
        """An engine failed while it worked on this request."""
        if self.over:
            return
        self.drop_work()
        self.count_attempt()
        self.world.log_fault(self, instance, error)
        if error.refused:
            if self.claim is not None:
                self.claim.unspent()
            self.fail(400, "the model server refused the request as invalid", "BadRequestError")
        elif self.attempts >= MAX_ATTEMPTS or not self.can_restart:
            self.fail(502, "the model servers failed this request", "InternalServerError")
        else:
            self.stage = "interrupted"
            self.world.interrupted(self, instance, error)
