"""The engine that leaps: it wakes only where something changes.

Between two changes of a decode batch its step times form an arithmetic progression (every request adds one token a
step, and a step's time is affine in the tokens it reads), so a run of k steps has a closed form. A leap ends where a
request joins or ends, blocks run out, the step model bends, noise is redrawn, or someone asks. ``stepping`` does the
same one step at a time with a real block table; tests hold the two equal.
"""

from __future__ import annotations

from heapq import heappop, heappush
from math import inf

from penstock.core.events import Load
from penstock.sim.cluster import InstanceSpec
from penstock.sim.engine import NOISE_EPOCH_STEPS, Engine, GapLog
from penstock.sim.seq import DECODING, FINISHED, Notice, Seq


class LeapingEngine(Engine):
    """Books of the decode batch are kept as sums; a sequence's own figures are brought up to date when it leaves."""

    def __init__(
        self,
        index: int,
        spec: InstanceSpec,
        gaps: GapLog,
        hash_tokens: int = 0,
        noise: list[float] | None = None,
    ) -> None:
        super().__init__(index, spec, gaps, hash_tokens, noise)
        # growth[p]: decodes that need a new block in steps whose number is p modulo the block size.
        self.growth = [0] * self.block_size
        self.finishing: list[tuple[int, int, Seq]] = []

    # -- what the world asks ----------------------------------------------------------------------------------------

    def tokens_of(self, seq: Seq, now: float) -> int:
        """Length of a sequence at ``now``."""
        if seq.state != DECODING:
            return seq.tokens
        return seq.tokens + self.step - seq.at_step + self.steps_done(now)

    def load(self, now: float) -> Load:
        """The engine as it sees itself."""
        context = self.context
        free = self.free
        step_s = self.last_step_s
        if self.planned > 1:
            k = self.steps_done(now)
            if k > 0:
                context += k * self.batch
                k = min(k, self.planned - 1)
                free += self.lingering_blocks - self._growth_of(k)
                step_s = self.first_s + self.rise_s * k
        return Load(self.batch, len(self.seqs) - len(self.running), context, free, step_s, self.clock_level())

    def decoding(self, now: float) -> list[tuple[Seq, int]]:
        """Sequences in the decode batch with their lengths at ``now``, in order of admission."""
        ahead = self.step + self.steps_done(now)
        return [(s, s.tokens + ahead - s.at_step) for s in self.running.values() if s.state == DECODING]

    # -- the clock --------------------------------------------------------------------------------------------------

    def settle(self, now: float) -> list[Notice]:
        """End the step or leap that runs until ``now``; report what ended with it."""
        notices: list[Notice] = []
        k = self.planned
        if k > 0:
            self._account(k)
            if self.aborted:
                self._purge(now)
            if self.chunks:
                self._end_chunks(now, notices)
            self._end_finished(now, notices)
        if self.leaving:
            self._let_go(now, notices)
        return notices

    def _end_finished(self, now: float, notices: list[Notice]) -> None:
        finishing = self.finishing
        while finishing and finishing[0][0] <= self.step:
            _, ticket, seq = heappop(finishing)
            if seq.state == DECODING and seq.ticket == ticket:
                self._catch_up(seq, now)
                self._leave_batch(seq)
                self._retire(seq)
                notices.append(Notice(FINISHED, seq))

    def begin(self, now: float) -> list[Notice]:
        """Start the next step (or leap) at ``now``; report what began with it. Sets ``wake_s``."""
        notices: list[Notice] = []
        self.begin_s = now
        if self.aborted:
            self._purge(now)
        self._give_way(now, notices)
        calm = self._grow_decodes(now, notices)
        budget = self._budget(now)
        if self.partial is not None:
            budget, calm = self._continue_prefill(self.partial, budget, calm, now, notices)
        self.joined.clear()
        if calm:
            self._admit_all(budget, notices, now)
        self._note_low(self.free)
        self._plan(now)
        self._look_again(now, calm)
        return notices

    # -- the decode batch -------------------------------------------------------------------------------------------

    def _join_batch(self, seq: Seq) -> None:
        """Into the decode batch. Its ``tokens`` and ``blocks`` are exact as of this boundary."""
        seq.state = DECODING
        seq.at_step = self.step
        seq.phase = (1 - seq.tokens + self.step) % self.block_size
        self.order += 1
        seq.ticket = self.order
        self.batch += 1
        self.context += seq.tokens
        self.growth[seq.phase] += 1
        heappush(self.finishing, (self.step + seq.final_tokens - seq.tokens, seq.ticket, seq))

    def _leave_batch(self, seq: Seq) -> None:
        """Out of the decode batch. ``tokens`` must be exact as of this boundary; brings ``blocks`` up to date."""
        tokens = seq.tokens
        self.batch -= 1
        self.context -= tokens
        self.growth[seq.phase] -= 1
        # KV exists for all tokens but the newest, whose step has not begun.
        seq.blocks += self._blocks(tokens - 1) - self._held(seq)
        del self.running[seq.request]

    def _catch_up(self, seq: Seq, now: float) -> None:
        seq.tokens += self.step - seq.at_step
        seq.at_step = self.step
        seq.last_token_s = now

    def note_pace(self, seq: Seq, now: float) -> None:
        """See :class:`Engine`."""
        if seq.pace is not None and seq.state == DECODING:
            self._emit(seq, self.steps_done(now))
        seq.pace = None

    def _keep_pace(self, k: int) -> None:
        """Note when the tokens of ``k`` steps of the plan came."""
        for seq in self.running.values():
            if seq.pace is not None and seq.state == DECODING:
                self._emit(seq, k)

    def _emit(self, seq: Seq, k: int) -> None:
        pace = seq.pace
        if pace is not None and k > 0:
            before = seq.tokens + self.step - seq.at_step - pace.prompt_tokens
            pace.emit(before, k, self.begin_s, self.first_s, self.rise_s)

    def _account(self, k: int) -> None:
        """Take ``k`` steps of the plan into the books."""
        first, rise, batch = self.first_s, self.rise_s, self.batch
        if self.paced:
            self._keep_pace(k)
        self._spend(k * first + rise * (0.5 * k * (k - 1)))
        self.last_step_s = first + rise * (k - 1)
        self._end_lingering()
        if k > 1:
            grown = self._growth_of(k - 1)
            self.free -= grown
            self.taken += grown
            self._note_low(self.free)
        self.step += k
        if batch > 0:
            self.context += k * batch
            self.decode_tokens += k * batch
            self._log_gaps(k)
        self.planned = 0

    def _log_gaps(self, k: int) -> None:
        """Record the gaps before the tokens of ``k`` steps."""
        first, rise, batch = self.first_s, self.rise_s, self.batch
        joining = len(self.joined)
        if joining == 0:
            self.gaps.add(first, rise, k, batch)
            return
        for seq in self.joined:  # the first gap of those who joined at the start of this leap spans their transfer
            self.gaps.add(self.begin_s + first - seq.last_token_s, 0.0, 1, 1)
        if batch > joining:
            self.gaps.add(first, 0.0, 1, batch - joining)
        if k > 1:
            self.gaps.add(first + rise, rise, k - 1, batch)
        self.joined.clear()

    def _grow_decodes(self, now: float, notices: list[Notice]) -> bool:
        """Give every decode the block its next token needs; preempt from the back if there is none. True if calm."""
        phase = self.step % self.block_size
        wanted = self.growth[phase]
        if wanted <= self.free:
            self.free -= wanted
            self.taken += wanted
            return True
        for seq in list(self.running.values()):
            if seq.state != DECODING or seq.phase != phase:
                continue
            while self.free == 0:
                victim = self.running[next(reversed(self.running))]
                self._preempt(victim, now, notices)
                if victim is seq:
                    break
            if seq.state != DECODING:
                break  # it was the last one itself
            self.free -= 1
            self.taken += 1
            seq.phase = -1 - phase  # has its block for this step
        for seq in self.running.values():
            if seq.phase < 0:
                seq.phase = -1 - seq.phase
        return False

    # -- planning a leap --------------------------------------------------------------------------------------------

    def _plan(self, now: float) -> None:
        """Fix how long the next step or leap takes, and when to wake."""
        self.version += 1
        self._set_clock(now)
        batch = self.batch
        chunks = self.chunks
        if chunks:
            new: list[int] = []
            past: list[int] = []
            for seq in chunks:
                new.append(seq.chunk)
                past.append(seq.computed)
            self.first_s = self.model.step_s(batch, self.context, new, past) * self._factor()
            self.rise_s = 0.0
            self.planned = 1
        elif batch > 0:
            intercept, slope, limit = self.model.decode_affine(batch, self.context)
            factor = self._factor()
            self.first_s = (intercept + slope * self.context) * factor
            self.rise_s = slope * batch * factor
            self.planned = self._longest_leap(limit)
        else:
            self.planned = 0
            self.wake_s = inf
            return
        self.last_step_s = self.first_s
        self.wake_s = self.time_of(self.planned)

    def _longest_leap(self, limit: float) -> int:
        """Steps until something must change: an end, a bend of the step model, blocks run out, noise is redrawn."""
        k = self._steps_to_an_end()
        if limit != inf:
            k = min(k, max(1, int((limit - self.context) / self.batch) + 1))
        if self.noise:
            k = min(k, NOISE_EPOCH_STEPS - self.step % NOISE_EPOCH_STEPS)
        if self.clock_part is not None:
            k = min(k, self.ask_clock_at - self.step)
        return self._affordable(k)

    def _steps_to_an_end(self) -> int:
        """Steps until the first decode has all its tokens."""
        finishing = self.finishing
        while True:
            finish_step, ticket, seq = finishing[0]
            if seq.state == DECODING and seq.ticket == ticket:
                return finish_step - self.step
            heappop(finishing)

    def _affordable(self, k: int) -> int:
        """Cut a leap of ``k`` steps at the first one whose new blocks are not there."""
        size = self.block_size
        free = self.free + self.lingering_blocks
        batch = self.batch
        if batch * ((k - 1) // size + 1) <= free:
            return k
        cycles = free // batch
        if cycles > 0:
            free -= cycles * batch
        j = cycles * size
        while j < k - 1:
            j += 1
            free -= self.growth[(self.step + j) % size]
            if free < 0:
                return j
        return k

    def _growth_of(self, k: int) -> int:
        """Blocks that the batch takes during the ``k`` steps after the one begun."""
        size = self.block_size
        total = (k // size) * self.batch
        growth = self.growth
        for j in range(1, k % size + 1):
            total += growth[(self.step + j) % size]
        return total

    # -- interruptions ----------------------------------------------------------------------------------------------

    def _note_dip(self, now: float) -> None:
        """Growth is booked when a leap ends: before blocks come free in its middle, note how low it went."""
        if self.planned > 1:
            k = min(self.steps_done(now), self.planned - 1)
            if k > 0:
                self._note_low(self.free + self.lingering_blocks - self._growth_of(k))

    def _cut_short(self, now: float) -> None:
        done = self.steps_done(now)
        self._note_dip(now)
        if done > 0 and not self.chunks:
            self._account(done)
        self.finishing.clear()
        self.growth = [0] * self.block_size
