"""What all moves share: the target's stream, the take-over, the way back, and what the controller is told."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, ClassVar

from penstock.core.events import MigrationDone, MigrationFailed
from penstock.core.types import MigrationLevel
from penstock.live.claims import Claim, ClaimRefused
from penstock.live.instance import Instance
from penstock.live.intake import COMPLETION_PATH
from penstock.live.segment import EngineError, Segment, ask
from penstock.live.wire import Choice, Json

if TYPE_CHECKING:
    from penstock.live.carried import CarriedSession

LAST_TOKENS = 4
"""A request with fewer tokens to go is not worth a move."""
FIRST_GUESS_STEPS = 4.0
"""How long the first take-over by an engine may take, in inter-token times; measured from then on."""
MOST_TO_GATHER = 96
"""Tokens of the source to wait for while some are gathered."""
LONGEST_CHARACTER = 64
"""Tokens to wait for the end of a character: a long run of bytes that are no UTF-8 has none."""


class Move:
    """One migration. ``kept`` are the source's tokens that the client has not been shown.

    Subclasses say what happens (``_stages``, ``_challenger_lost``) and may listen to the source's tokens.
    """

    level: ClassVar[MigrationLevel]

    def __init__(self, session: CarriedSession, source: Instance, target: Instance, reason: str) -> None:
        self.session = session
        self.source = source
        self.target = target
        self.reason = reason
        self.world = session.world
        self.start_s = self.world.now()
        self.kept: list[tuple[list[int], Choice]] = []
        self.challenger: Segment | None = None
        self._token: asyncio.Event = asyncio.Event()
        self._cut_s = 0.0
        self.task = asyncio.create_task(self._run())

    # -- the subclass's part ----------------------------------------------------------------------------------------

    async def _stages(self) -> None:
        """All up to the target's first token; may raise EngineError and ClaimRefused."""
        raise NotImplementedError

    def _challenger_lost(self, reason: str, error: EngineError) -> None:
        """The target's stream broke before its first token."""
        raise NotImplementedError

    @property
    def can_go_back(self) -> bool:
        """Can the source go on with the request, should the target be lost now?"""
        return self.session.segment is not None

    def keeps(self, ids: list[int], choice: Choice) -> bool:
        """The source brought tokens: True if they are kept back for now."""
        return False

    def source_stopped(self) -> bool:
        """The source's stream ended although the request is not over: True if this move wanted that."""
        return False

    def _settled(self) -> None:
        """The target has taken over."""

    # -- called by the session --------------------------------------------------------------------------------------

    def source_token(self) -> None:
        """The source brought a token that has been shown."""
        self._token.set()

    def source_finished(self) -> None:
        """The request is complete on the source."""
        self._abandon()
        self.task.cancel()
        self._report("the request ended first")

    def challenger_tokens(self, segment: Segment, ids: list[int], choice: Choice) -> None:
        """The target brought its first tokens: it takes over."""
        if segment is not self.challenger:
            segment.close()
            return
        session, world = self.session, self.world
        self.challenger = None
        session.move = None
        self.task.cancel()
        twice = sum(len(kept) for kept, _ in self.kept)
        expected = [token for kept, _ in self.kept for token in kept][: len(ids)]
        if session.intake.greedy and expected and expected != ids[: len(expected)]:
            world.metrics.divergences += 1
            world.log.warning("greedy outputs differ across a move", extra={"request": session.name})
        self.kept = []
        self._settled()
        self.target.took_over(self.level, world.now() - self._cut_s)
        session.moves += 1
        session.take_over(segment)
        world.metrics.moved(self.level, self.reason, twice)
        benefit = world.metrics.benefits.open(session, self.source, self.target, self.level, self.reason)
        level, itl_s, metrics = self.level, self.source.itl_s, world.metrics

        def shown(gap_s: float) -> None:
            metrics.paused(level, gap_s, itl_s)
            benefit.pause_s = gap_s

        session.mark = shown
        # Before the tokens are shown: they may be the last.
        world.tell(MigrationDone(session.request, *self._ends, self.source.load(), self.target.load()))
        session.show_held([(ids, choice)])
        if session.playout is not None:
            session.playout.drain()

    def challenger_failed(self, segment: Segment, error: EngineError) -> None:
        """The target's stream broke before its first token."""
        if segment is self.challenger:
            self.challenger = None
            self.world.log_fault(self.session, segment.instance, error)
            self._challenger_lost("the target failed", error)

    def cancel(self) -> None:
        """The session stops or starts again elsewhere: leave no trace."""
        self._abandon()
        self.kept = []
        self.task.cancel()

    def fail(self, reason: str) -> None:
        """Roll back: the source goes on as if nothing had been."""
        self._abandon()
        self.task.cancel()
        self._rolled_back(reason)

    # -- for subclasses ---------------------------------------------------------------------------------------------

    @property
    def _ends(self) -> tuple[int, int]:
        return self.source.index, self.target.index

    async def _run(self) -> None:
        try:
            await self._stages()
        except EngineError as error:
            self.world.log_fault(self.session, self.target, error)
            self._rolled_back("an engine failed a stage of it")
        except ClaimRefused as refused:
            self._rolled_back(f"claim: {refused}")

    def _gather(self) -> None:
        """Begin to have as many tokens in hand as the take-over will probably need."""
        step_s = self.source.itl_s
        usual_s = self.target.takeover_s.get(self.level)
        # Half as much again as usual, and a token: a take-over that takes longer than what is in hand shows.
        want_s = 1.5 * usual_s if usual_s else FIRST_GUESS_STEPS * step_s
        self.session.start_playout(step_s, want_s + step_s)

    async def _gathered(self) -> None:
        """Wait until enough tokens are in hand, but not for ever: the source may be bursty."""
        playout = self.session.playout
        for _ in range(MOST_TO_GATHER):
            if playout is None or playout.full:
                return
            self._token.clear()
            await self._token.wait()

    async def _whole_character(self) -> bool:
        """Wait for a token of the source that ends a character: a cut within one would lose it."""
        for _ in range(LONGEST_CHARACTER):
            self._token.clear()
            await self._token.wait()
            if not self.session.unshown:
                return True
        return False

    def _one_token(self, sequence: list[int], done: int) -> Json:
        """A body that has the KV of ``sequence`` computed or pulled, and one token thrown away."""
        body = self.session.intake.ids_body(sequence, done, 1, stream=False)
        body.pop("min_tokens", None)
        return body

    async def _copy(self, claim: Claim, sequence: list[int], done: int) -> None:
        """Have the target pull the KV of ``sequence``, so that its prefix cache has it."""
        world, session = self.world, self.session
        body = self._one_token(sequence, done)
        body["kv_transfer_params"] = claim.redeem(len(sequence), world.now())
        await ask(world.client, self.target, COMPLETION_PATH, body, session.headers(), world.call_timeout_s)
        world.claims.settle(claim)

    def _challenge(self, params: Json | None = None) -> None:
        """Ask the target to go on from all that the client has."""
        self.challenger = self.session.new_segment(self.target, params)

    def _abandon(self) -> None:
        if self.challenger is not None:
            self.challenger.close()
            self.challenger = None

    def _rolled_back(self, reason: str) -> None:
        self._abandon()
        kept, self.kept = self.kept, []
        session = self.session
        if session.move is not self:
            return
        self._report(reason)
        session.show_held(kept)
        if session.playout is not None:
            session.playout.drain()

    def _report(self, reason: str) -> None:
        self.session.move = None
        self.world.metrics.move_failed(self.level, self.reason, reason)
        self.world.tell(MigrationFailed(self.session.request, *self._ends, reason))
