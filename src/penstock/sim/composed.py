"""The engine whose batches a policy composes: decodes may sit out a step, prompts enter by the policy's leave.

Everything else is ``leaping.LeapingEngine``'s. A decode that sits out is *paused*: it keeps its KV, its slot and its
place, and its next token comes later. A composition stands until something changes or for as many steps as the part
said, so a part that looks at every step makes the engine take every step. There is no stepping oracle for this mode;
with everybody chosen it equals the leaping engine (``tests/sim/test_composed.py``).
"""

from __future__ import annotations

from math import inf
from typing import Final

from penstock.core.events import Load
from penstock.policy.engine import Batching, Composition, EngineParts
from penstock.sim.cluster import InstanceSpec
from penstock.sim.engine import UNLIMITED, GapLog
from penstock.sim.leaping import LeapingEngine
from penstock.sim.seq import DECODING, EXTRACTED, GONE, PAUSED, PINNED, SERVE, Notice, Seq

SHORTEST_REST_S: Final = 1e-6
"""A part that says to look again at once, and then chooses nobody again, must not stop the clock."""


class ComposedEngine(LeapingEngine):
    """``paused`` are in order of admission; they count as running to the world."""

    def __init__(
        self,
        index: int,
        spec: InstanceSpec,
        gaps: GapLog,
        hash_tokens: int = 0,
        noise: list[float] | None = None,
    ) -> None:
        super().__init__(index, spec, gaps, hash_tokens, noise)
        self.batching: Batching | None = None
        self.paused: dict[int, Seq] = {}
        self.hold_steps = UNLIMITED
        self.rest_s = inf
        self.unseen = False  # somebody waits whom the part has not been shown yet
        self.let_in = False  # the part wants somebody in

    def equip(self, parts: EngineParts) -> None:
        """See :class:`Engine`."""
        super().equip(parts)
        self.batching = parts.batching

    # -- the step ---------------------------------------------------------------------------------------------------

    def begin(self, now: float) -> list[Notice]:
        """See :class:`Engine`: as the leaping engine, with the policy's composition first."""
        notices: list[Notice] = []
        self.begin_s = now
        if self.aborted:
            self._purge(now)
        self._give_way(now, notices)
        resumed = self._compose(now)
        self._evict_paused(notices)
        calm = self._grow_decodes(now, notices)
        budget = self._budget(now)
        if self.partial is not None:
            budget, calm = self._continue_prefill(self.partial, budget, calm, now, notices)
        self.joined.clear()
        for seq in resumed:
            if seq.state == DECODING:
                self.joined.append(seq)  # its first gap spans the pause
        if calm:
            self._admit_all(budget, notices, now)
        if self.let_in and not self.running and self.paused:
            calm = self._resume_all(now, notices)
        self._note_low(self.free)
        self._plan(now)
        if self.planned > self.hold_steps:
            self.planned = self.hold_steps
            self.wake_s = self.time_of(self.planned)
        if self.planned == 0:
            self._rest(now)
        self._look_again(now, calm)
        return notices

    def _rest(self, now: float) -> None:
        """Nothing runs: look again at once for who was too new, or when the part said."""
        if self.unseen:
            self.wake_s = now
        elif self.rest_s < inf:
            self.wake_s = now + max(self.rest_s, SHORTEST_REST_S)

    def _compose(self, now: float) -> list[Seq]:
        """Ask the part; pause and resume accordingly. Returns those that run again."""
        part = self.batching
        self.entries = UNLIMITED
        self.hold_steps = UNLIMITED
        self.rest_s = inf
        self.unseen = False
        self.let_in = False
        if part is None:
            return []
        decodes = self._decodes()
        jobs = [self._brief(seq, now) for seq in decodes]
        newest = self.step - 1 if self.async_scheduling and self.running else self.step
        if self.order_part is not None and self.waiting:
            self._arrange(self.order_part, now, newest)
        waiting = [
            self._brief(s, now) for s in self.waiting if s.seen <= newest and s.job is not None and s.kind <= SERVE
        ]
        for seq in self.waiting:
            if seq.seen > newest:
                self.unseen = True
                break
        if not jobs and not waiting:
            return []
        chosen = part.compose(jobs, waiting, self._look(now))
        self.hold_steps = max(1, chosen.steps)
        self.rest_s = chosen.rest_s
        self._let_in(chosen)
        run = {job.request for job in chosen.run}
        resumed: list[Seq] = []
        for seq in decodes:
            if seq.request in run and seq.state == PAUSED:
                del self.paused[seq.request]
                self.running[seq.request] = seq
                self._join_batch(seq)
                resumed.append(seq)
            elif seq.request not in run and seq.state == DECODING:
                self._catch_up_now(seq)
                self._leave_batch(seq)
                seq.state = PAUSED
                self.paused[seq.request] = seq
        return resumed

    def _let_in(self, chosen: Composition) -> None:
        """Put the prompts that may enter in front of the queue, and let no more of them in."""
        enter = chosen.enter
        if enter is None:
            return
        wanted: dict[int, int] = {}
        for job in enter:
            wanted[job.request] = len(wanted)
        front: list[Seq] = []
        rest: list[Seq] = []
        for seq in self.waiting:
            if seq.request in wanted:
                front.append(seq)
            else:
                rest.append(seq)
        front.sort(key=lambda seq: wanted[seq.request])
        self.waiting.clear()
        for seq in front:
            self.waiting.append(seq)
        for seq in rest:
            self.waiting.append(seq)
        self.entries = len(front)
        self.let_in = self.entries > 0

    def _resume_all(self, now: float, notices: list[Notice]) -> bool:
        """Whom the part wants in does not fit, because of those it left out: they go on, or nobody ever would."""
        for seq in list(self.paused.values()):
            del self.paused[seq.request]
            self.running[seq.request] = seq
            self._join_batch(seq)
            self.joined.append(seq)
        calm = self._grow_decodes(now, notices)
        self.joined = [seq for seq in self.joined if seq.state == DECODING]
        return calm

    def _decodes(self) -> list[Seq]:
        """All that could decode, in order of admission."""
        found = [seq for seq in self.running.values() if seq.state == DECODING]
        if self.paused:
            found.extend(self.paused.values())
            found.sort(key=lambda seq: seq.order)
        return found

    def _catch_up_now(self, seq: Seq) -> None:
        """``tokens`` exact as of this boundary; ``last_token_s`` stays that of the latest token, which came now."""
        self._catch_up(seq, self.begin_s)

    def _evict_paused(self, notices: list[Notice]) -> None:
        """Blocks for the batch's next tokens come from paused ones first, the one admitted last first."""
        wanted = self.growth[self.step % self.block_size]
        while wanted > self.free and self.paused:
            self._start_over(self.paused.pop(next(reversed(self.paused))), notices)

    def _slots(self) -> int:
        return super()._slots() - len(self.paused)

    # -- orders from the world --------------------------------------------------------------------------------------

    def submit(self, seq: Seq, now: float) -> None:
        """See :class:`Engine`. Behind a head that may not enter a newcomer matters: a part may wait for the third."""
        super().submit(seq, now)
        if self.batching is not None:
            self._poke(now, self.async_scheduling)

    def extract(self, request: int, now: float) -> bool:
        """See :class:`Engine`. A paused one goes at the next boundary too."""
        seq = self.paused.get(request)
        if seq is None:
            return super().extract(request, now)
        self.leaving.append(seq)
        self._poke(now)
        return True

    def release(self, request: int, now: float) -> None:
        """See :class:`Engine`."""
        self.paused.pop(request, None)
        super().release(request, now)

    def die(self, now: float) -> None:
        """See :class:`Engine`."""
        super().die(now)
        self.paused.clear()

    def _let_go(self, now: float, notices: list[Notice]) -> None:
        for seq in self.leaving:
            if seq.state == PAUSED:
                del self.paused[seq.request]
                seq.computed = seq.tokens - 1
                seq.state = PINNED
                notices.append(Notice(EXTRACTED, seq))
        self.leaving = [seq for seq in self.leaving if seq.state != PINNED and seq.state != GONE]
        super()._let_go(now, notices)

    # -- what the world asks ----------------------------------------------------------------------------------------

    def decoding(self, now: float) -> list[tuple[Seq, int]]:
        """See :class:`Engine`; paused ones are decodes too."""
        ahead = self.step + self.steps_done(now)
        found = [(s, s.tokens + ahead - s.at_step) for s in self.running.values() if s.state == DECODING]
        found.extend([(s, s.tokens) for s in self.paused.values()])
        return found

    def load(self, now: float) -> Load:
        """See :class:`Engine`."""
        load = super().load(now)
        if not self.paused:
            return load
        paused = len(self.paused)
        held = sum([seq.tokens for seq in self.paused.values()])
        return Load(
            load.running + paused,
            load.waiting - paused,
            load.decode_tokens + held,
            load.free_blocks,
            load.step_s,
            load.clock,
        )
