"""Moving a running decode between stock engines, make before break.

Re-prompt, in three stages, while the source goes on decoding:

1. *pin*: the source gets prompt and output so far again, with one token asked for and its KV kept. It finds almost all
   of it in its prefix cache and answers with a claim on the blocks.
2. *stage*: the target pulls that KV with a request of one token, whose answer is thrown away. What it pulled is in its
   prefix cache now.
3. *take over*: right after a token of the source, the target gets everything so far and goes on from there; it computes
   only what is not in its prefix cache. The source's tokens are kept back meanwhile. The target's first token ends the
   move; if it does not come in time, the kept tokens are shown, nothing is lost, and the stage is tried again.

Kept tokens are never mixed with the target's, so that the output is one sample whatever the temperature. The client
waits for one round trip and one engine step, and never longer than the patience of a try.

Replay, always possible: the source stops, the target computes everything.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from penstock.core.events import MigrationDone, MigrationFailed
from penstock.core.types import MigrationLevel
from penstock.live.claims import Claim, ClaimRefused, is_claim
from penstock.live.instance import Health, Instance
from penstock.live.intake import COMPLETION_PATH
from penstock.live.segment import EngineError, Segment, ask
from penstock.live.wire import HANDOVER, Choice

if TYPE_CHECKING:
    from penstock.live.carried import CarriedSession

TRIES = 4
PATIENCE_STEPS = (2.5, 2.5, 3.0, 3.0)
"""How long tokens may be kept back when those in hand are shown, in the source's inter-token times, by try. Ours."""
LEAST_PATIENCE_S = 0.02
FIRST_GUESS_STEPS = 4.0
"""How long the first take-over by an engine may take, in inter-token times; measured from then on."""
MOST_TO_GATHER = 96
"""Tokens of the source to wait for while some are gathered."""
ORDERED_PATIENCE_S = 2.0
"""The last try of a move that an operator ordered waits this long: the order counts more than a pause."""
LONGEST_CHARACTER = 64
"""Tokens to wait for the end of a character: a long run of bytes that are no UTF-8 has none."""
LAST_TOKENS = 4
"""A request with fewer tokens to go is not worth a move."""


class Move:
    """One migration. ``kept`` are the source's tokens that the client has not been shown."""

    def __init__(
        self, session: CarriedSession, source: Instance, target: Instance, level: MigrationLevel, reason: str
    ) -> None:
        self.session = session
        self.source = source
        self.target = target
        self.level = level
        self.reason = reason
        self.world = session.world
        self.start_s = self.world.now()
        self.kept: list[tuple[list[int], Choice]] = []
        self.challenger: Segment | None = None
        self._token: asyncio.Event = asyncio.Event()
        self._answer: asyncio.Future[str] | None = None
        self._keeping = False
        self._cut_s = 0.0
        self.task = asyncio.create_task(self._run())

    # -- called by the session --------------------------------------------------------------------------------------

    def source_token(self) -> None:
        """The source brought a token that has been shown."""
        self._token.set()

    def keeps(self, ids: list[int], choice: Choice) -> bool:
        """The source brought tokens: True if they are kept back for now."""
        if not self._keeping:
            return False
        self.kept.append((ids, choice))
        if choice.finish_reason is not None:
            self._settle("the request ended first")
        return True

    def source_finished(self) -> None:
        """The request is complete on the source."""
        self._abandon()
        self.task.cancel()
        self._report("finished", MigrationFailed(self.session.request, *self._ends, "the request ended first"))

    def challenger_tokens(self, segment: Segment, ids: list[int], choice: Choice) -> None:
        """The target brought its first tokens: it takes over."""
        if segment is not self.challenger:
            segment.close()
            return
        session, world = self.session, self.world
        self.challenger = None
        self._keeping = False
        session.move = None
        self.task.cancel()
        twice = sum(len(kept) for kept, _ in self.kept)
        expected = [token for kept, _ in self.kept for token in kept][: len(ids)]
        if session.intake.greedy and expected and expected != ids[: len(expected)]:
            world.metrics.divergences += 1
            world.log.warning("greedy outputs differ across a move", extra={"request": session.name})
        self.kept = []
        now = world.now()
        self.target.took_over(now - self._cut_s)
        session.moves += 1
        session.take_over(segment)
        world.metrics.moved(self.level, self.reason, twice)
        level, itl_s, metrics = self.level, self.source.itl_s, world.metrics
        session.mark = lambda gap_s: metrics.paused(level, gap_s, itl_s)
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
            self._settle("the target failed")

    def cancel(self) -> None:
        """The session stops or starts again elsewhere: leave no trace."""
        self._abandon()
        self.kept = []
        self._keeping = False
        self.task.cancel()

    def fail(self, reason: str) -> None:
        """Roll back: the source goes on as if nothing had been."""
        self._abandon()
        self.task.cancel()
        self._rolled_back(reason)

    # -- the stages -------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            if self.level == MigrationLevel.REPLAY:
                await self._replay()
            else:
                await self._reprompt()
        except EngineError as error:
            self.world.log_fault(self.session, self.target, error)
            self._rolled_back("an engine failed a stage of it")
        except ClaimRefused as refusal:
            self._rolled_back(f"claim: {refusal}")

    async def _replay(self) -> None:
        """Break before make. Should the target fail, the request starts again like any that lost its engine."""
        session = self.session
        if session.unshown and not await self._whole_character():
            self._rolled_back("no whole character to cut at")
            return
        if session.segment is not None:
            session.segment.close()
            session.segment = None
        self._cut_s = session.last_s
        self._challenge()

    async def _reprompt(self) -> None:
        # Shielded: a pull that has begun is ended even if the move is not, so that nothing stays pinned.
        session = self.session
        step_s = self.source.itl_s
        # Half as much again as usual, and a token: a take-over that takes longer than what is in hand shows.
        want_s = 1.5 * self.target.takeover_s if self.target.takeover_s else FIRST_GUESS_STEPS * step_s
        session.start_playout(step_s, want_s + step_s)
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

    async def _stage(self) -> None:
        """Stages 1 and 2: pin on the source, pull to the target."""
        session, world = self.session, self.world
        sequence = session.sequence()
        done = session.generated
        headers = session.headers()
        body = session.intake.ids_body(sequence, done, 1, stream=False)
        body.pop("min_tokens", None)
        timeout_s = world.call_timeout_s
        answer = await ask(
            world.client, self.source, COMPLETION_PATH, {**body, "kv_transfer_params": HANDOVER}, headers, timeout_s
        )
        params = answer.kv_transfer_params
        if params is None or not is_claim(params):
            # The token asked for was an end: nothing is pinned, and the source is about to end, too.
            raise ClaimRefused("the source pinned nothing")
        block = self.source.abilities.block_size
        claim = Claim(session.request, self.source.index, len(sequence), params, block, world.now(), world.lease_s)
        world.claims.put(claim)
        body["kv_transfer_params"] = claim.redeem(len(sequence), world.now())
        await ask(world.client, self.target, COMPLETION_PATH, body, headers, timeout_s)
        world.claims.settle(claim)

    def _challenge(self) -> None:
        """Ask the target to go on from all that the client has."""
        session, world = self.session, self.world
        sequence = session.sequence()
        body = session.intake.ids_body(sequence, session.generated, session.limit() - session.generated)
        segment = Segment(session, self.target, len(sequence), session.generated, world.now())
        self.challenger = segment
        segment.open(world.client, COMPLETION_PATH, body, session.headers())

    def _patience_s(self, attempt: int) -> float:
        if attempt == TRIES - 1 and self.reason in ("ordered", "drain"):
            return ORDERED_PATIENCE_S
        playout = self.session.playout
        in_hand_s = playout.in_hand_s if playout is not None else 0.0
        return max(in_hand_s + PATIENCE_STEPS[attempt] * self.source.itl_s, LEAST_PATIENCE_S)

    # -- the ends ---------------------------------------------------------------------------------------------------

    @property
    def _ends(self) -> tuple[int, int]:
        return self.source.index, self.target.index

    def _settle(self, outcome: str) -> None:
        """Wake the waiting stage, or roll a replay back: its source is gone, so the request starts again."""
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(outcome)
        elif self.level == MigrationLevel.REPLAY:
            self._abandon()
            session = self.session
            session.move = None
            self._report("failed", MigrationFailed(session.request, *self._ends, outcome))
            session.engine_failed(self.target, EngineError(outcome, 502))

    def _abandon(self) -> None:
        if self.challenger is not None:
            self.challenger.close()
            self.challenger = None

    def _rolled_back(self, reason: str) -> None:
        self._abandon()
        kept, self.kept = self.kept, []
        self._keeping = False
        session = self.session
        if session.move is not self:
            return
        session.move = None
        self._report("failed", MigrationFailed(session.request, *self._ends, reason))
        session.show_held(kept)
        if session.playout is not None:
            session.playout.drain()

    def _report(self, outcome: str, event: MigrationFailed) -> None:
        self.session.move = None
        self.world.metrics.move_failed(self.level, self.reason, event.reason)
        self.world.tell(event)


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
