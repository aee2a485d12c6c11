"""Hand-off: the source's plugin stops the request after its next token and pins its KV; the target pulls that.

Break before make, but nothing is computed twice: the client waits for the rest of a step, the pull of the KV and a
step. The source's last token is part of the output although its stream ends there. Until the source has stopped, the
move can be rolled back by doing nothing; afterwards by asking the source to go on, whose prefix cache has it all.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from penstock.core.types import MigrationLevel
from penstock.live.claims import Claim, ClaimRefused, is_claim
from penstock.live.instance import Instance
from penstock.live.link import Link, LinkError
from penstock.live.moves.base import LAST_TOKENS, Move
from penstock.live.plugin.penstock_engine.messages import Answer, Command
from penstock.live.segment import EngineError

if TYPE_CHECKING:
    from penstock.live.carried import CarriedSession

PATIENCE_STEPS = 40.0
LEAST_PATIENCE_S = 1.0
"""How long a plugin may take to do as it was told, in the source's inter-token times and at least. Ours."""


class Handoff(Move):
    """See the module. ``claim`` is the pinned KV until the target has pulled it."""

    level = MigrationLevel.HANDOFF
    claim: Claim | None = None
    _refused = ""

    def __init__(self, session: CarriedSession, source: Instance, target: Instance, reason: str) -> None:
        super().__init__(session, source, target, reason)
        self._answered = asyncio.Event()
        self._stopped = asyncio.Event()
        self._asked: list[int] | None = None  # all tokens known when the source was told to stop

    @property
    def can_go_back(self) -> bool:
        """See :class:`Move`."""
        return self._stopped.is_set() or super().can_go_back

    def source_stopped(self) -> bool:
        """See :class:`Move`."""
        if self._asked is None or self._stopped.is_set():
            return False
        self._cut_s = self.world.now()
        self._stopped.set()
        return True

    def source_finished(self) -> None:
        """See :class:`Move`."""
        super().source_finished()
        self._let_go()

    def cancel(self) -> None:
        """See :class:`Move`."""
        super().cancel()
        self._let_go()

    async def _stages(self) -> None:
        session = self.session
        self._gather()
        await self._gathered()
        await self._prepare()  # last: what is decoded after it is left for the final pull
        link, segment = self.source.link, session.segment
        if link is None or segment is None:
            self._rolled_back("the source's plugin has gone")
            return
        if session.limit() - session.generated < LAST_TOKENS:
            self._rolled_back("almost complete")
            return
        self._asked = session.sequence()
        self.world.spawn(self._stop_source(link, segment.id))
        await self._answered.wait()
        if not self._stopped.is_set():
            if self.claim is None:
                self._rolled_back(self._refused)
                return
            try:
                await asyncio.wait_for(self._stopped.wait(), self._patience_s)
            except TimeoutError:
                self._rolled_back("the source did not stop")
                return
        self._go_on()

    async def _prepare(self) -> None:
        """What comes before the source is told to stop."""

    async def _stop_source(self, link: Link, name: str) -> None:
        """Runs to its end whoever loses interest, so that what is pinned is pulled or released."""
        try:
            answer = await link.ask(Command("handoff", name), self._patience_s, self._unwanted)
        except LinkError as error:
            self._refused = f"plugin: {error}"
        else:
            if self.session.move is self:
                self.claim = self._claim_of(answer)
            else:
                self._unwanted(answer)
        self._answered.set()

    def _go_on(self) -> None:
        """The source has stopped: the target goes on from there, and pulls what it can."""
        sequence = self.session.sequence()
        params = None
        claim = self.claim
        try:
            if claim is None:
                raise ClaimRefused(self._refused or "the source pinned nothing")
            if claim.custody.tokens < len(sequence):
                raise ClaimRefused("it holds fewer tokens than there are")
            params = claim.redeem(len(sequence), self.world.now())
        except ClaimRefused as refused:
            self._let_go()
            extra = {"request": self.session.name, "reason": str(refused)}
            self.world.log.info("handed off without KV", extra=extra)
        self._challenge(params)

    def _challenger_lost(self, reason: str, error: EngineError) -> None:
        if error.refused and self.claim is not None:
            self.claim.unspent()
        self._rolled_back(reason)

    def _rolled_back(self, reason: str) -> None:
        """The source goes on: by itself if it has not stopped, else it is asked to."""
        session = self.session
        resume = self._stopped.is_set() and session.move is self
        self._let_go()
        super()._rolled_back(reason)
        if resume and not session.over:
            session.open_segment(self.source, None)

    def _settled(self) -> None:
        self.world.claims.settle(self.claim)
        self.claim = None

    # -- pinned KV --------------------------------------------------------------------------------------------------

    @property
    def _patience_s(self) -> float:
        return max(LEAST_PATIENCE_S, PATIENCE_STEPS * self.source.itl_s)

    def _claim_of(self, answer: Answer) -> Claim | None:
        """Custody of what a command has pinned."""
        world = self.world
        if not is_claim(answer.params):
            return None
        assert answer.params is not None
        block = self.source.abilities.block_size
        claim = Claim(
            self.session.request, self.source.index, answer.tokens, answer.params, block, world.now(), world.lease_s
        )
        world.claims.put(claim)
        return claim

    def _unwanted(self, answer: Answer) -> None:
        """It stopped when nobody was waiting any more: the request goes on by itself, and its KV is not needed."""
        self._release(self._claim_of(answer))

    def _let_go(self) -> None:
        claim, self.claim = self.claim, None
        self._release(claim)

    def _release(self, claim: Claim | None) -> None:
        if claim is not None and self._asked is not None:
            # What came later may have been sampled anew since: the pinned KV need not be that of these tokens.
            self.world.release(claim, self._asked[: claim.custody.tokens])
