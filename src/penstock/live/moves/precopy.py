"""Pre-copy (Llumnix, section 4.2): the target pulls the full blocks while the source decodes on; hand-off for the rest.

The source's plugin holds the blocks that are full now, which nothing will change any more. The target pulls them with
a request of one token, whose answer is thrown away, and so has them in its prefix cache: what the hand-off leaves to
pull are the blocks filled meanwhile.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from penstock.core.types import MigrationLevel
from penstock.live.claims import ClaimRefused
from penstock.live.link import Link, LinkError
from penstock.live.moves.handoff import Handoff
from penstock.live.plugin.penstock_engine.messages import Answer, Command

if TYPE_CHECKING:
    from penstock.live.segment import Segment


class Precopy(Handoff):
    """See the module."""

    level = MigrationLevel.PRECOPY
    _copied = 0
    _meanwhile = 0

    async def _prepare(self) -> None:
        link, segment = self.source.link, self.session.segment
        if link is not None and segment is not None:
            # Shielded: a pull that has begun is ended even if the move is not, so that nothing stays pinned.
            await asyncio.shield(self.world.spawn(self._stage(link, segment)))

    async def _stage(self, link: Link, segment: Segment) -> None:
        """Hold on the source, pull to the target."""

        def unwanted(answer: Answer) -> None:
            self.world.spawn(end_hold(link, answer.hold))

        try:
            answer = await link.ask(Command("hold", segment.id), self._patience_s, unwanted)
        except LinkError as error:  # too short for a full block, say: then there is just more to hand off
            self.world.log.info("not copied ahead", extra={"request": self.session.name, "reason": str(error)})
            return
        session = self.session
        size = self.source.abilities.block_size
        # The engine may be a token ahead of what has come here.
        tokens = min(answer.tokens, len(session.sequence())) // size * size
        claim = self._claim_of(answer) if tokens and session.move is self else None
        if claim is None:
            unwanted(answer)
            return
        before = session.generated
        try:
            await self._copy(claim, session.sequence()[:tokens], before)
        except ClaimRefused:
            unwanted(answer)
            raise
        self._copied, self._meanwhile = tokens, session.generated - before

    def _settled(self) -> None:
        if self.claim is not None and self._copied:
            self.world.metrics.copied_ahead(self.claim.custody.tokens - self._copied, self._meanwhile)
        super()._settled()


async def end_hold(link: Link, hold: str) -> None:
    """Have a hold end that nobody will pull."""
    try:
        await link.ask(Command("release", hold), 1.0)
    except LinkError:
        return  # it has ended by itself, or will with its lease
