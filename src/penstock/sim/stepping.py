"""The oracle: the same engine, one step per wake, every token counted and every block a number in a table.

Slow on purpose and simple on purpose. It shares the queues and the orders with ``LeapingEngine`` and nothing of its
arithmetic: no closed forms, no phases, no lazily kept sums. ``--stepping`` uses it too, to check a result.
"""

from __future__ import annotations

from math import inf

from penstock.core.events import Load
from penstock.sim.engine import NOISE_EPOCH_STEPS, Engine
from penstock.sim.seq import (
    DECODING,
    FINISHED,
    GONE,
    Notice,
    Seq,
)


class SteppingEngine(Engine):
    """An engine that takes every step. ``table`` maps a request to the numbers of the blocks it holds."""

    stock: list[int]
    table: dict[int, list[int]]
    running_step: bool

    def open_table(self) -> None:
        """Number the blocks. Called once, after construction."""
        self.stock = list(range(self.capacity_blocks))
        self.table = {}
        self.running_step = False

    def die(self, now: float) -> None:
        """See :class:`Engine`."""
        super().die(now)
        self.open_table()

    # -- blocks by number -------------------------------------------------------------------------------------------

    def _sync_blocks(self, seq: Seq) -> None:
        """Make the table agree with ``seq.blocks`` (own blocks) and check that no number is held twice."""
        held = self.table.setdefault(seq.request, [])
        while len(held) < seq.blocks:
            held.append(self.stock.pop())
        while len(held) > seq.blocks:
            self.stock.append(held.pop())

    def check(self) -> None:
        """Integrity: every block is free or held exactly once; idle means nothing is held.

        Raises
        ------
        AssertionError
            With what is wrong.
        """
        numbers = list(self.stock)
        for request, held in self.table.items():
            known = request in self.seqs or any(s.request == request for s in self.aborted)
            assert known or not held, f"request {request} is gone and holds {held}"
            numbers.extend(held)
        shared = 0
        if self.cache is not None:
            shared = sum(1 for n in self.cache.references.values() if n > 0) * self.cache.width
            idle = len(self.cache.idle) * self.cache.width
            assert idle <= self.free, f"idle cached blocks {idle} exceed the free {self.free}"
        assert len(set(numbers)) == len(numbers), "a block is held twice"
        in_use = sum(s.blocks for s in [*self.seqs.values(), *self.aborted])
        assert self.free + in_use + shared + self.lingering_blocks == self.capacity_blocks, "blocks leaked"
        if not self.seqs and not self.aborted:
            assert self.free == self.capacity_blocks - shared and self.batch == 0 and self.context == 0

    # -- the clock --------------------------------------------------------------------------------------------------

    def settle(self, now: float) -> list[Notice]:
        """End the one step that ran until ``now``."""
        notices: list[Notice] = []
        if self.running_step:
            self.running_step = False
            self.planned = 0
            self._end_lingering()
            self._spend(self.first_s)
            self.last_step_s = self.first_s
            self.step += 1
            finished: list[Seq] = []
            for seq in list(self.running.values()):
                if seq.state != DECODING:
                    continue
                if seq.pace is not None:
                    seq.pace.emit(seq.tokens - seq.pace.prompt_tokens, 1, now, 0.0, 0.0)
                seq.tokens += 1
                self.decode_tokens += 1
                self.gaps.add(now - seq.last_token_s, 0.0, 1, 1)
                seq.last_token_s = now
                if seq.tokens == seq.final_tokens:
                    finished.append(seq)
            self._purge(now)
            if self.chunks:
                self._end_chunks(now, notices)
            for seq in sorted(finished, key=_by_ticket):
                if seq.state == GONE:
                    continue
                self._leave_batch(seq)
                self._retire(seq)
                notices.append(Notice(FINISHED, seq))
            self._recount()
        self._let_go(now, notices)
        self._recount()
        return notices

    def begin(self, now: float) -> list[Notice]:
        """Start one step."""
        notices: list[Notice] = []
        self.begin_s = now
        self._purge(now)
        self._recount()
        self._give_way(now, notices)
        self.joined.clear()
        calm = True
        for seq in list(self.running.values()):
            if seq.state != DECODING:
                continue
            need = self._blocks(seq.tokens) - self._held(seq)
            while need > self.free:
                calm = False
                victim = list(self.running.values())[-1]
                self._preempt(victim, now, notices)
                if victim is seq:
                    break
            if seq.state != DECODING:
                break
            self.free -= need
            self.taken += need
            seq.blocks += need
        self._recount()
        budget = self._budget(now)
        if self.partial is not None:
            budget, calm = self._continue_prefill(self.partial, budget, calm, now, notices)
        if calm:
            self._admit_all(budget, notices, now)
        self.least_free = min(self.least_free, self.free)
        if self.cache is not None:
            self.cache.shrink(self.free)
        self._recount()
        for seq in self.seqs.values():
            self._sync_blocks(seq)
        self._plan(now)
        self._look_again(now, calm)
        return notices

    def _plan(self, now: float) -> None:
        self.version += 1
        self._set_clock(now)
        chunks = self.chunks
        if not chunks and self.batch == 0:
            self.planned = 0
            self.wake_s = inf
            return
        duration = self.model.step_s(self.batch, self.context, [s.chunk for s in chunks], [s.computed for s in chunks])
        factor = self.slow
        if self.noise:
            factor *= self.noise[(self.step // NOISE_EPOCH_STEPS) % len(self.noise)]
        self.first_s = duration * factor
        self.rise_s = 0.0
        self.planned = 1
        self.running_step = True
        self.last_step_s = self.first_s
        self.wake_s = now + self.first_s

    def _recount(self) -> None:
        """The batch and its context, by counting."""
        self.batch = 0
        self.context = 0
        for seq in self.running.values():
            if seq.state == DECODING:
                self.batch += 1
                self.context += seq.tokens

    # -- what the world asks ----------------------------------------------------------------------------------------

    def tokens_of(self, seq: Seq, now: float) -> int:
        """Length of a sequence: always exact here."""
        return seq.tokens

    def decoding(self, now: float) -> list[tuple[Seq, int]]:
        """Sequences in the decode batch with their lengths, in order of admission."""
        return [(s, s.tokens) for s in self.running.values() if s.state == DECODING]

    def load(self, now: float) -> Load:
        """The engine as it sees itself."""
        waiting = len(self.seqs) - len(self.running)
        return Load(self.batch, waiting, self.context, self.free, self.last_step_s, self.clock_level())

    # -- no closed forms --------------------------------------------------------------------------------------------

    def _join_batch(self, seq: Seq) -> None:
        self.order += 1
        seq.ticket = self.order
        seq.state = DECODING

    def _leave_batch(self, seq: Seq) -> None:
        del self.running[seq.request]

    def _free(self, seq: Seq) -> None:
        super()._free(seq)
        held = self.table.get(seq.request)
        if held is not None:
            self.stock.extend(held)
            held.clear()


def _by_ticket(seq: Seq) -> int:
    return seq.ticket
