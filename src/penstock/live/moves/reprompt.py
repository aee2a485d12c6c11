"""Re-prompt: moving a running decode between stock engines, make before break.

Three stages, while the source goes on decoding:

1. *pin*: the source gets prompt and output so far again, with one token asked for and its KV kept. It finds almost all
   of it in its prefix cache and answers with a claim on the blocks.
2. *stage*: the target pulls that KV with a request of one token, whose answer is thrown away. What it pulled is in its
   prefix cache now.
3. *take over*: right after a token of the source, the target gets everything so far and goes on from there; it computes
   only what is not in its prefix cache. The source's tokens are kept back meanwhile. The target's first token ends the
   move; if it does not come in time, the kept tokens are shown, nothing is lost, and the stage is tried again.

Kept tokens are never mixed with the target's, so that the output is one sample whatever the temperature. The client
waits for one round trip and one engine step, and never longer than the patience of a try.
"""

from __future__ import annotations

import asyncio

from penstock.core.types import MigrationLevel
from penstock.live.claims import Claim, ClaimRefused, is_claim
from penstock.live.intake import COMPLETION_PATH
from penstock.live.moves.base import LAST_TOKENS, Move
from penstock.live.segment import EngineError, Segment, ask
from penstock.live.wire import HANDOVER, Choice

TRIES = 4
PATIENCE_STEPS = (2.5, 2.5, 3.0, 3.0)
"""How long tokens may be kept back when those in hand are shown, in the source's inter-token times, by try. Ours."""
LEAST_PATIENCE_S = 0.02
ORDERED_PATIENCE_S = 2.0
"""The last try of a move that an operator ordered waits this long: the order counts more than a pause."""


class Reprompt(Move):
    """See the module."""

    level = MigrationLevel.REPROMPT
    _keeping = False
    _answer: asyncio.Future[str] | None = None

    def keeps(self, ids: list[int], choice: Choice) -> bool:
        """See :class:`Move`."""
        if not self._keeping:
            return False
        self.kept.append((ids, choice))
        if choice.finish_reason is not None:
            self._settle("the request ended first")
        return True

    def challenger_tokens(self, segment: Segment, ids: list[int], choice: Choice) -> None:
        """See :class:`Move`."""
        if segment is self.challenger:
            self._keeping = False
        super().challenger_tokens(segment, ids, choice)

    def cancel(self) -> None:
        """See :class:`Move`."""
        self._keeping = False
        super().cancel()

    async def _stages(self) -> None:
        # Shielded: a pull that has begun is ended even if the move is not, so that nothing stays pinned.
        session = self.session
        self._gather()
        await asyncio.shield(self.world.spawn(self._stage()))
        await self._gathered()
        last = ""
        for attempt in range(TRIES):
            if not await self._whole_character():
                last = "no whole character to cut at"
                break
            if session.limit() - session.generated < LAST_TOKENS:
                last = "almost complete"
                break
            self._keeping = True
            self._cut_s = self.world.now()
            self._answer = asyncio.get_running_loop().create_future()
            self._challenge()
            try:
                last = await asyncio.wait_for(self._answer, self._patience_s(attempt))
            except TimeoutError:
                last = "the target was not in time"
            if session.move is not self:  # the answer came in the same instant as what ended the move
                return
            self._abandon()
            self._keeping = False
            kept, self.kept = self.kept, []
            if kept and kept[-1][1].finish_reason is not None:
                session.show_held(kept)  # ends the request, and this move with it
                return
            session.show_held(kept)
            if session.over or last == "the target failed":
                break
        self._rolled_back(last)

    async def _stage(self) -> None:
        """Stages 1 and 2: pin on the source, pull to the target."""
        session, world = self.session, self.world
        sequence = session.sequence()
        done = session.generated
        body = {**self._one_token(sequence, done), "kv_transfer_params": HANDOVER}
        answer = await ask(world.client, self.source, COMPLETION_PATH, body, session.headers(), world.call_timeout_s)
        params = answer.kv_transfer_params
        if params is None or not is_claim(params):
            # The token asked for was an end: nothing is pinned, and the source is about to end, too.
            raise ClaimRefused("the source pinned nothing")
        block = self.source.abilities.block_size
        claim = Claim(session.request, self.source.index, len(sequence), params, block, world.now(), world.lease_s)
        world.claims.put(claim)
        await self._copy(claim, sequence, done)

    def _patience_s(self, attempt: int) -> float:
        if attempt == TRIES - 1 and self.reason in ("ordered", "drain"):
            return ORDERED_PATIENCE_S
        playout = self.session.playout
        in_hand_s = playout.in_hand_s if playout is not None else 0.0
        return max(in_hand_s + PATIENCE_STEPS[attempt] * self.source.itl_s, LEAST_PATIENCE_S)

    def _challenger_lost(self, reason: str, error: EngineError) -> None:
        self._settle(reason)

    def _settle(self, outcome: str) -> None:
        """Wake the waiting stage."""
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(outcome)

    def _rolled_back(self, reason: str) -> None:
        self._keeping = False
        super()._rolled_back(reason)
