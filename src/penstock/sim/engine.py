"""One engine in virtual time, as vLLM's V1 scheduler behaves: queues, blocks, admission, preemption.

How time passes is the subclass's business: ``leaping.LeapingEngine`` jumps over steps that change nothing,
``stepping.SteppingEngine`` takes every one.

What is modelled after vLLM (V1 scheduler, 0.19 to 0.33):
running requests come first and each decode gets one token; at most one prompt is partly computed; waiting requests
join first-come-first-served while batch budget, ``max_num_seqs`` and blocks allow, none in a step that preempted; a
prompt is admitted only if all of it fits (``scheduler_reserve_full_isl``); without ``chunked_prefill`` it waits for a
step whose token budget has room for all of it; blocks for a pull are reserved when it starts; after a pull the last
token is computed again, which yields the next token; when blocks run out the request
admitted last loses its KV and is computed again from the front of the queue; a finished prefill stays pinned until
it is pulled.

Ours: sequences whose pull has ended join before the waiting queue is looked at, so that they cannot be stuck behind a
request that waits for the very blocks they hold. A policy may put parts into an engine (``policy.engine``): an order
of its queue, a budget for prompts; composing batches needs ``composed.ComposedEngine``.

With ``async_scheduling`` (vLLM's default on GPUs since 0.14) step N + 1 is made while step N runs, from what step N - 1
brought: what comes in during a step is first computed in the one after the next, unless there is nothing else to run,
and a request that ends keeps its slot and blocks for one more step.
"""

from __future__ import annotations

from array import array
from collections import deque
from math import inf, sqrt
from typing import Final

from penstock.core.events import Load
from penstock.core.types import Role
from penstock.perf.step import StepModel
from penstock.policy.engine import DECODING as JOB_DECODING
from penstock.policy.engine import PAUSED as JOB_PAUSED
from penstock.policy.engine import QUEUED as JOB_QUEUED
from penstock.policy.engine import Chunking, Clock, EngineParts, Job, QueueOrder, Situation
from penstock.sim.cluster import InstanceSpec
from penstock.sim.prefix import PrefixCache
from penstock.sim.seq import (
    DECODING,
    EXTRACTED,
    FINISHED,
    FIRST_TOKEN,
    GONE,
    JOINED,
    PAUSED,
    PINNED,
    PREEMPTED,
    PREFILL_ONLY,
    PREFILLING,
    PULL,
    PULL_READY,
    PULLING,
    READY,
    REPROMPT,
    REPROMPTED,
    SERVE,
    STAGE,
    WAITING,
    Notice,
    Seq,
)

NOISE_EPOCH_STEPS: Final = 64
"""Noise is constant over this many steps of an engine, so that leaping and stepping draw the same numbers."""


UNLIMITED: Final = 1 << 60


class GapLog:
    """Inter-token gaps, compressed as :class:`penstock.sim.result.TokenGaps` describes."""

    def __init__(self) -> None:
        self.first_s: array[float] = array("d")
        self.rise_s: array[float] = array("d")
        self.count: array[int] = array("q")
        self.batch: array[int] = array("q")

    def add(self, first_s: float, rise_s: float, count: int, batch: int) -> None:
        """Record ``count`` steps of ``batch`` requests."""
        self.first_s.append(first_s)
        self.rise_s.append(rise_s)
        self.count.append(count)
        self.batch.append(batch)


class Engine:
    """One instance's scheduler and blocks. The world owns time; see ``settle`` and ``begin``."""

    def __init__(
        self,
        index: int,
        spec: InstanceSpec,
        gaps: GapLog,
        hash_tokens: int = 0,
        noise: list[float] | None = None,
    ) -> None:
        self.index = index
        self.model: StepModel = spec.step_model
        self.capacity_blocks: int = spec.capacity_blocks
        self.block_size: int = spec.block_size
        self.max_num_seqs: int = spec.max_num_seqs
        self.max_num_batched_tokens: int = spec.max_num_batched_tokens
        self.restart_evicted: bool = spec.restart_evicted
        self.async_scheduling: bool = spec.async_scheduling
        self.prefix_caching: bool = spec.prefix_caching and not spec.restart_evicted
        self.chunked_prefill: bool = spec.chunked_prefill
        self.gaps = gaps
        self.hash_tokens = hash_tokens
        self.cache: PrefixCache | None = None
        if hash_tokens and spec.prefix_caching:
            self.cache = PrefixCache(hash_tokens // self.block_size)
        self.noise = noise if noise is not None else []
        self.slow = 1.0

        self.wake_s = inf  # when the world must call settle() and begin(); inf while idle
        self.version = 0  # tells the world's heap entries for this engine apart from outdated ones
        self.free = self.capacity_blocks
        self.waiting: deque[Seq] = deque()
        self.ready: list[Seq] = []
        self.running: dict[int, Seq] = {}  # in order of admission: the last one is preempted first
        self.seqs: dict[int, Seq] = {}
        self.leaving: list[Seq] = []  # asked to be extracted at the next boundary
        self.aborted: list[Seq] = []  # dropped while running: they go at the next boundary
        self.order = 0

        # The decode batch: steps done, its size, and the tokens it holds.
        self.step = 0
        self.batch = 0
        self.context = 0

        # The steps in progress: planned many from begin_s on, the first first_s long, each next one rise_s longer.
        self.begin_s = 0.0
        self.first_s = 0.0
        self.rise_s = 0.0
        self.planned = 0
        self.joined: list[Seq] = []  # pulled sequences whose first step here is the one begun last
        self.partial: Seq | None = None  # partly computed prompt; always the last in running
        self.chunks: list[Seq] = []
        self.blocked = False
        self.paced = False  # deadlines of tokens are watched
        self.wake_again = False
        # Asynchronous scheduling: who ended in the last step still holds a slot and blocks in this one.
        self.lingering_blocks = 0
        self.lingering_slots = 0
        self.taken = 0  # blocks handed out so far

        # Parts of the policy.
        self.order_part: QueueOrder | None = None
        self.chunking: Chunking | None = None
        self.clock_part: Clock | None = None
        self.sets_aside = False
        self.entries = UNLIMITED  # prompts that may still join in this step
        self.prompt_left = UNLIMITED  # prompt tokens that it may still compute
        self.evicts = False
        self.situation = Situation(index, spec.role, self.block_size, self.capacity_blocks)
        self.situation.max_running = self.max_num_seqs
        self.situation.max_batched_tokens = self.max_num_batched_tokens

        # The clock: a level of the instance's, and what the engine looked like when the part was last asked for one.
        self.models: list[StepModel] = [clock.step_model for clock in spec.clocks[:-1]]
        self.models.append(spec.step_model)
        self.level = len(self.models) - 1
        self.clock_steps = UNLIMITED
        self.ask_clock_at = UNLIMITED  # the step before which the part must be asked again
        self.asked_batch = -1
        self.asked_prompt = False
        self.asked_waiting = False

        # Totals; seconds of steps with and without prompts by clock level.
        self.prompt_busy_s: list[float] = [0.0] * len(self.models)
        self.decode_busy_s: list[float] = [0.0] * len(self.models)
        self.busy_s = 0.0
        self.prefill_tokens = 0
        self.decode_tokens = 0
        self.least_free = self.capacity_blocks
        self.preemptions = 0
        self.last_step_s = 0.0

    def equip(self, parts: EngineParts) -> None:
        """Put a policy's parts in. Once, before the first request."""
        self.order_part = parts.order
        self.chunking = parts.chunking if self.chunked_prefill else None
        if parts.clock is not None and len(self.models) > 1:
            self.clock_part = parts.clock
            self.clock_steps = max(1, parts.clock.max_steps())
            self.ask_clock_at = 0
        if parts.order is not None:
            self.sets_aside = parts.order.sets_aside()
            self.evicts = parts.order.evicts()

    def play(self, role: Role) -> None:
        """Tell the parts which role the instance has now."""
        self.situation.role = role

    # -- how time passes: the subclass's part -----------------------------------------------------------------------

    def settle(self, now: float) -> list[Notice]:
        """End what runs until ``now``; report what ended with it."""
        raise NotImplementedError

    def begin(self, now: float) -> list[Notice]:
        """Start what runs from ``now`` on; report what began with it. Sets ``wake_s``."""
        raise NotImplementedError

    def load(self, now: float) -> Load:
        """The engine as it sees itself."""
        raise NotImplementedError

    def tokens_of(self, seq: Seq, now: float) -> int:
        """Length of a sequence at ``now``."""
        raise NotImplementedError

    def decoding(self, now: float) -> list[tuple[Seq, int]]:
        """Sequences in the decode batch with their lengths at ``now``, in order of admission."""
        raise NotImplementedError

    def _join_batch(self, seq: Seq) -> None:
        """Into the decode batch. Its ``tokens`` and ``blocks`` are exact as of this boundary."""
        raise NotImplementedError

    def _leave_batch(self, seq: Seq) -> None:
        """Out of the decode batch. ``tokens`` must be exact as of this boundary; brings ``blocks`` up to date."""
        raise NotImplementedError

    def _catch_up(self, seq: Seq, now: float) -> None:
        """Make a decoding sequence's ``tokens`` and ``last_token_s`` exact as of this boundary."""

    def note_pace(self, seq: Seq, now: float) -> None:
        """Bring the pace of a decoding sequence up to date in the middle of a leap; it is then watched no more."""
        seq.pace = None

    def _note_dip(self, now: float) -> None:
        """Blocks are about to come free in the middle of a leap."""

    def _cut_short(self, now: float) -> None:
        """The engine is about to die: count the steps that ended."""

    # -- orders from the world --------------------------------------------------------------------------------------

    def submit(self, seq: Seq, now: float) -> None:
        """Queue a sequence."""
        self.order += 1
        seq.order = self.order
        self.seqs[seq.request] = seq
        self._queue(seq, now)
        if self.order_part is not None or not (self.blocked and len(self.waiting) > 1):
            self._poke(now, self.async_scheduling)  # behind a blocked head nothing can change

    def pulled(self, request: int, now: float) -> None:
        """The KV of a sequence has arrived; it joins (or stays staged) from the next boundary on."""
        seq = self.seqs[request]
        seq.computed = seq.tokens - 1
        if seq.kind == STAGE:
            seq.state = PINNED
            return
        self._make_ready(seq, now)

    def adopt(self, request: int, final_tokens: int, now: float) -> None:
        """Decode a sequence whose KV is pinned right here: no transfer."""
        seq = self.seqs[request]
        seq.kind = SERVE
        seq.final_tokens = final_tokens
        self._make_ready(seq, now)

    def _make_ready(self, seq: Seq, now: float) -> None:
        seq.state = READY
        seq.seen = self._seen(now)
        self.ready.append(seq)
        if len(self.running) < self.max_num_seqs or self.clock_part is not None:
            self._poke(now, self.async_scheduling)

    def extend(self, request: int, tokens: int, now: float) -> None:
        """Turn a staged sequence into a pull of the rest: it needs blocks for ``tokens`` now."""
        seq = self.seqs[request]
        seq.kind = PULL
        seq.tokens = tokens
        self._queue(seq, now)
        self._poke(now, self.async_scheduling)

    def serve_from(self, request: int, tokens: int, now: float) -> None:
        """Turn a staged sequence into one that computes the tokens it lacks and decodes on."""
        seq = self.seqs[request]
        seq.kind = SERVE
        seq.resumed = True
        # vLLM finds pulled KV again through its prefix cache, which knows full blocks only.
        seq.computed = seq.tokens // self.block_size * self.block_size
        seq.tokens = tokens
        self._queue(seq, now)
        self._poke(now, self.async_scheduling)

    def recompute(self, request: int, now: float) -> None:
        """The pull failed: compute the KV here (vLLM's ``kv_load_failure_policy: recompute``)."""
        seq = self.seqs[request]
        self._note_dip(now)
        self._free(seq)
        seq.kind = SERVE
        seq.resumed = True
        if seq.state != WAITING:
            self._queue(seq, now)
        self._poke(now)  # not only a newcomer: its blocks are free for the others

    def extract(self, request: int, now: float) -> bool:
        """Ask for a decoding sequence to be taken out at the next boundary; False if it is not decoding."""
        seq = self.seqs.get(request)
        if seq is None or seq.state != DECODING:
            return False
        self.leaving.append(seq)
        self._poke(now)
        return True

    def stay(self, request: int) -> None:
        """Take ``extract`` back, if the boundary has not come yet."""
        self.leaving = [s for s in self.leaving if s.request != request]

    def release(self, request: int, now: float) -> None:
        """Drop a sequence and free its blocks: at once, or at the next boundary if it is running."""
        seq = self.seqs.pop(request)
        if seq.state == DECODING or seq.state == PREFILLING:
            self.aborted.append(seq)
            self._poke(now)
            return
        if seq.state == WAITING:
            self.waiting.remove(seq)
        elif seq.state == READY:
            self.ready.remove(seq)
        self._note_dip(now)
        self._free(seq)
        seq.state = GONE
        if self.waiting or self.ready or self.clock_part is not None:
            self._poke(now)

    def die(self, now: float) -> None:
        """Count the steps that ended, then forget everything but the totals."""
        self._cut_short(now)
        self.version += 1
        self.wake_s = inf
        self.free = self.capacity_blocks
        self.waiting.clear()
        self.ready.clear()
        self.running.clear()
        self.seqs.clear()
        self.leaving.clear()
        self.aborted.clear()
        self.lingering_blocks = 0
        self.lingering_slots = 0
        self.joined.clear()
        self.chunks.clear()
        self.partial = None
        self.batch = 0
        self.context = 0
        self.planned = 0
        self.blocked = False
        self.slow = 1.0
        self.asked_batch = -1
        if self.cache is not None:
            self.cache = PrefixCache(self.cache.width)

    def set_slow(self, factor: float, now: float) -> None:
        """Run ``factor`` times slower from the next step on."""
        self.slow = factor
        if self.planned > 0:
            self._poke(now)

    # -- the steps in progress --------------------------------------------------------------------------------------

    def time_of(self, k: int) -> float:
        """When step ``k`` of the leap ends."""
        return self.begin_s + k * self.first_s + self.rise_s * (0.5 * k * (k - 1))

    def boundary(self, t: float) -> int:
        """The first step end at or after ``t``."""
        span = t - self.begin_s
        if span <= 0.0:
            return 0
        first, rise = self.first_s, self.rise_s
        if rise <= 0.0:
            k = int(span / first)
        else:
            half = first - 0.5 * rise
            k = int((sqrt(half * half + 2.0 * rise * span) - half) / rise)
        while k > 0 and self.time_of(k - 1) >= t:
            k -= 1
        while self.time_of(k) < t:
            k += 1
        return k

    def steps_done(self, now: float) -> int:
        """Steps of the leap in progress that have ended by ``now``."""
        if self.planned == 0:
            return 0
        k = min(self.boundary(now), self.planned)
        if k > 0 and self.time_of(k) > now:
            k -= 1
        return k

    def _poke(self, now: float, newcomer: bool = False) -> None:
        """Something may change: wake at the next boundary (one later for a newcomer to a step), or at once if idle."""
        if self.planned == 0:
            if self.wake_s > now:
                self.wake_s = now
                self.version += 1
            return
        if self.planned == 1:
            return
        k = max(self.boundary(now), 1)  # the first step has just begun: vLLM does not take it back
        if newcomer:
            k += 1
        if k < self.planned:
            self.planned = k
            self.wake_s = self.time_of(k)
            self.version += 1

    def _look_again(self, now: float, calm: bool) -> None:
        """No leap where the very next boundary matters: after a preemption, or when someone leaves or may join."""
        if self.planned > 1:
            if self.chunking is not None and (self.waiting or self.partial is not None):
                calm = False  # its budget may be larger at the next boundary
            elif (self.sets_aside or self.evicts) and self.waiting:
                calm = False  # what pushing others out would yield changes from step to step
        if calm and not self.leaving and not self.aborted and not self.wake_again:
            return
        self.wake_again = False
        if self.planned > 1:
            self.planned = 1
            self.wake_s = self.time_of(1)
        elif self.planned == 0:
            self.wake_s = now

    def _seen(self, now: float) -> int:
        """The step boundary (steps done by then) at which the engine's loop notices what comes in at ``now``."""
        return self.step + max(self.boundary(now), 1) if self.planned > 0 else self.step

    def _factor(self) -> float:
        if not self.noise:
            return self.slow
        return self.slow * self.noise[(self.step // NOISE_EPOCH_STEPS) % len(self.noise)]

    # -- at the end of a step ---------------------------------------------------------------------------------------

    def _end_chunks(self, now: float, notices: list[Notice]) -> None:
        for seq in self.chunks:
            if seq.state != PREFILLING:
                continue
            seq.computed += seq.chunk
            self.prefill_tokens += seq.chunk
            if seq.computed < seq.tokens:
                self.partial = seq
                continue
            self.partial = None
            if seq.kind == REPROMPT:
                self._forget(seq)
                notices.append(Notice(REPROMPTED, seq))
                continue
            self._share(seq)
            if seq.last_token_s >= 0.0:  # recomputed: the client has waited since its last token
                self.gaps.add(now - seq.last_token_s, 0.0, 1, 1)
            elif seq.job is not None and seq.job.first_token_s < 0.0:
                seq.job.first_token_s = now
            if seq.pace is not None and (seq.last_token_s >= 0.0 or not seq.resumed):
                # Else the first token of a re-sent prompt, which the world counts when it hands over.
                seq.pace.emit(seq.tokens - seq.pace.prompt_tokens, 1, now, 0.0, 0.0)
            seq.tokens += 1
            seq.last_token_s = now
            if seq.tokens >= seq.final_tokens and seq.kind == SERVE:
                self._forget(seq)
                notices.append(Notice(FIRST_TOKEN, seq))
                notices.append(Notice(FINISHED, seq))
                continue
            if seq.kind == PREFILL_ONLY:
                del self.running[seq.request]
                seq.state = PINNED
                if seq.tokens >= seq.final_tokens:
                    self._forget(seq)
                    notices.append(Notice(FINISHED, seq))
                    continue
            else:
                self._join_batch(seq)
            notices.append(Notice(FIRST_TOKEN, seq))
        self.chunks.clear()

    def _forget(self, seq: Seq) -> None:
        self.running.pop(seq.request, None)
        del self.seqs[seq.request]
        self._free(seq)
        seq.state = GONE

    def _retire(self, seq: Seq) -> None:
        """A sequence has all its tokens. With asynchronous scheduling the next step was made before that was known."""
        if self.async_scheduling and self.running:
            self.lingering_blocks += seq.blocks
            self.lingering_slots += 1
            seq.blocks = 0
        self._free(seq)
        seq.state = GONE
        del self.seqs[seq.request]

    def _end_lingering(self) -> None:
        self.free += self.lingering_blocks
        self.lingering_blocks = 0
        self.lingering_slots = 0

    def _let_go(self, now: float, notices: list[Notice]) -> None:
        """Take out who was asked to leave, unless it has finished or been preempted meanwhile."""
        for seq in self.leaving:
            if seq.state == DECODING:
                self._catch_up(seq, now)
                self._leave_batch(seq)
                seq.computed = seq.tokens - 1
                seq.state = PINNED
                notices.append(Notice(EXTRACTED, seq))
        self.leaving.clear()

    def _purge(self, now: float) -> None:
        """Take out what was dropped while running."""
        for seq in self.aborted:
            if seq.state == DECODING:
                self._catch_up(seq, now)
                self._leave_batch(seq)
            elif seq.state == PREFILLING:
                del self.running[seq.request]
                if self.partial is seq:
                    self.partial = None
            self._free(seq)
            seq.state = GONE
        self.aborted.clear()

    # -- at the beginning of a step ---------------------------------------------------------------------------------

    def _preempt(self, victim: Seq, now: float, notices: list[Notice]) -> None:
        if victim.state == DECODING:
            self._catch_up(victim, now)
            self._leave_batch(victim)
        else:
            del self.running[victim.request]
            if self.partial is victim:
                self.partial = None
        self._start_over(victim, notices)

    def _start_over(self, victim: Seq, notices: list[Notice]) -> None:
        """To the front of the queue without its KV. It is out of the books of what runs already."""
        if victim.state == DECODING or victim.state == PAUSED:
            victim.resumed = True
            if self.restart_evicted:
                victim.tokens = victim.prompt_tokens
        self._leave_behind(victim)
        self._free(victim)
        if victim.kind == PULL:
            victim.kind = SERVE
        victim.state = WAITING
        victim.seen = -1
        self.waiting.appendleft(victim)
        self.preemptions += 1
        notices.append(Notice(PREEMPTED, victim))

    def _leave_behind(self, victim: Seq) -> None:
        """A preempted sequence's blocks stay findable until they are handed out again (vLLM's prefix caching)."""
        if self.prefix_caching and not victim.shared and not victim.hashes and victim.kind != REPROMPT:
            victim.left_blocks = victim.blocks
            victim.left_at = self.taken + self.free

    def _still_there(self, seq: Seq) -> int:
        """Tokens of a preempted sequence whose KV nobody has overwritten.

        Its blocks went behind those that were free then, the last one first, and blocks are handed out from the front.
        """
        overwritten = max(0, self.taken - seq.left_at)
        blocks = min(seq.left_blocks - overwritten, (seq.tokens - 1) // self.block_size)
        seq.left_blocks = 0
        return max(0, blocks) * self.block_size

    def _continue_prefill(
        self, seq: Seq, budget: int, calm: bool, now: float, notices: list[Notice]
    ) -> tuple[int, bool]:
        chunk = min(seq.tokens - seq.computed, budget, self.prompt_left)
        if chunk <= 0:
            return budget, calm
        need = self._blocks(seq.computed + chunk) - self._held(seq)
        if need > self.free:
            self._preempt(seq, now, notices)
            return budget, False
        self._take_chunk(seq, chunk, need)
        return budget - chunk, calm

    def _take_chunk(self, seq: Seq, chunk: int, need: int) -> None:
        self.free -= need
        self.taken += need
        seq.blocks += need
        seq.chunk = chunk
        self.prompt_left -= chunk
        seq.state = PREFILLING
        self.chunks.append(seq)

    def _admit_all(self, budget: int, notices: list[Notice], now: float) -> None:
        """Admit who may join this step; without anything else to run, also who has only just been seen."""
        if self.lingering_slots and not self.running:
            self._end_lingering()
        newest = self.step - 1 if self.async_scheduling else self.step
        self._admit(budget, notices, now, newest)
        if self.async_scheduling:
            if not self.running:
                self._admit(budget, notices, now, self.step)
            else:  # somebody may join one step from now: too new for this one, or waiting for what lingers
                latest = -1
                if self.ready:
                    latest = self.ready[len(self.ready) - 1].seen
                if self.order_part is not None:
                    for seq in self.waiting:
                        latest = max(latest, seq.seen)
                elif self.waiting:
                    latest = max(latest, self.waiting[len(self.waiting) - 1].seen)
                if latest >= self.step or (self.lingering_slots and (self.ready or self.waiting)):
                    self.wake_again = True

    def _admit(self, budget: int, notices: list[Notice], now: float, newest: int) -> None:
        self.blocked = False
        if self.ready:
            budget = self._admit_ready(budget, notices, newest)
        if self.order_part is not None and len(self.waiting) > 0:
            self._arrange(self.order_part, now, newest)
        waiting = self.waiting
        while waiting and budget > 0 and self.entries > 0:
            if self._slots() <= 0:
                break
            seq = waiting[0]
            if seq.seen > newest:
                self.blocked = True
                return
            if seq.kind == PULL or seq.kind == STAGE:
                need = self._blocks(seq.tokens) - self._held(seq)
                if need > self.free:
                    self.blocked = True
                    return
                waiting.popleft()
                self.free -= need
                self.taken += need
                seq.blocks += need
                seq.state = PULLING
                notices.append(Notice(PULL_READY, seq))
                continue
            if not self.chunked_prefill and self._must_wait_whole(seq, budget):
                self.blocked = True
                return
            if self.prompt_left <= 0 or not self._start_prefill(seq, budget, now):
                self.blocked = True
                return
            waiting.popleft()
            budget -= seq.chunk
            self.entries -= 1
        if waiting:
            self.blocked = True

    def _slots(self) -> int:
        return self.max_num_seqs - len(self.running) - self.lingering_slots

    # -- parts of the policy ----------------------------------------------------------------------------------------

    def _look(self, now: float) -> Situation:
        """The engine as its parts see it."""
        situation = self.situation
        situation.now_s = now
        situation.free_blocks = self.free
        situation.decodes = self.batch
        situation.context = self.context
        situation.waiting = len(self.waiting)
        situation.last_step_s = self.last_step_s
        return situation

    def _brief(self, seq: Seq, now: float) -> Job:
        """A request as the parts see it."""
        job = seq.job
        assert job is not None, "an engine with parts got a request without a job"
        job.tokens = self.tokens_of(seq, now)
        job.left = max(0, seq.tokens - seq.computed)
        job.blocks = self._held(seq)
        job.pull = False
        if seq.state == DECODING or seq.state == PAUSED:
            job.state = JOB_DECODING if seq.state == DECODING else JOB_PAUSED
            job.left = 0
            job.blocks = self._blocks(job.tokens - 1)
        else:
            job.state = JOB_QUEUED
            if seq.kind == PULL or seq.kind == STAGE:
                job.pull = True
                job.left = 0
        return job

    def _arrange(self, order: QueueOrder, now: float, newest: int) -> None:
        """Sort the queue by urgency; what the engine has not noticed yet stays behind."""
        situation = self._look(now)
        keyed: list[tuple[bool, float, int, Seq]] = []
        for seq in self.waiting:
            late = seq.seen > newest
            urgency = -inf  # the one short chunk of a re-sent prompt, for which a move waits
            if late:
                urgency = 0.0
            elif seq.kind != REPROMPT:
                urgency = order.urgency(self._brief(seq, now), situation)
            keyed.append((late, urgency, len(keyed), seq))
        keyed.sort(key=_by_key)
        self.waiting.clear()
        for entry in keyed:
            self.waiting.append(entry[3])

    def _give_way(self, now: float, notices: list[Notice]) -> None:
        """Before the step is made: let the most urgent one that waits push others aside, as far as the order allows."""
        order = self.order_part
        if order is None or not self.waiting or not (self.sets_aside or self.evicts):
            return
        newest = self.step - 1 if self.async_scheduling else self.step
        self._arrange(order, now, newest)
        head = self.waiting[0]
        if head.seen > newest or head.kind == REPROMPT:
            return
        situation = self._look(now)
        urgency = order.urgency(self._brief(head, now), situation)
        partial = self.partial
        computes = head.kind != PULL and head.kind != STAGE
        if (
            self.sets_aside
            and computes
            and partial is not None
            and order.urgency(self._brief(partial, now), situation) > urgency
        ):
            del self.running[partial.request]
            partial.state = WAITING
            partial.seen = -1
            self.waiting.append(partial)
            self.partial = None
        need = self._blocks(head.tokens) - self._held(head)
        if need <= self.free and self._slots() > 0:
            return
        if self.sets_aside:
            for seq in reversed(list(self.waiting)):  # KV of prompts set aside is computed again
                if need <= self.free:
                    break
                if seq is not head and seq.blocks > 0 and seq.started_s >= 0.0 and seq.kind != PULL:
                    self._free(seq)
        if self.evicts:
            self._evict_for(order, head, urgency, need, now, notices)

    def _set_clock(self, now: float) -> None:
        """Before a step is planned: ask for its clock level if anything has changed.

        The rule looks at the engine alone, so that leaping and stepping ask at the same steps.
        """
        part = self.clock_part
        if part is None or (self.batch == 0 and not self.chunks):
            return
        newest = self.step - 1 if self.async_scheduling else self.step
        waiting = 0
        for seq in self.waiting:
            waiting += seq.seen <= newest
        for seq in self.ready:
            waiting += seq.seen <= newest
        if waiting < len(self.waiting) + len(self.ready):
            self.wake_again = True  # one step from now they wait
        prompts = len(self.chunks) > 0
        same = self.batch == self.asked_batch and (waiting > 0) == self.asked_waiting
        if same and not prompts and not self.asked_prompt and self.step < self.ask_clock_at:
            return
        self.asked_batch = self.batch
        self.asked_prompt = prompts
        self.asked_waiting = waiting > 0
        self.ask_clock_at = self.step + self.clock_steps
        situation = self._look(now)
        situation.waiting = waiting
        situation.clock = self.level
        jobs: list[Job] = []
        tokens = 0
        for seq in self.chunks:
            tokens += seq.chunk
            if seq.kind != REPROMPT:  # part of a move: its request runs elsewhere
                jobs.append(self._brief(seq, now))
        self.level = max(0, min(part.choose(situation, jobs, tokens), len(self.models) - 1))
        self.model = self.models[self.level]

    def _spend(self, seconds: float) -> None:
        """Book the time of steps that ended."""
        self.busy_s += seconds
        if self.chunks:
            self.prompt_busy_s[self.level] += seconds
        else:
            self.decode_busy_s[self.level] += seconds

    def clock_level(self) -> int:
        """The level the engine runs at; -1 if it has only one."""
        return self.level if len(self.models) > 1 else -1

    def _evict_for(
        self, order: QueueOrder, head: Seq, urgency: float, need: int, now: float, notices: list[Notice]
    ) -> None:
        """Throw out the least urgent decodes until ``head`` has room; nobody if all that may go would not do."""
        situation = self.situation
        found: list[tuple[bool, float, int, Seq]] = []
        for seq in self.running.values():
            if seq.state == DECODING and seq not in self.leaving:
                job = self._brief(seq, now)
                rank = order.urgency(job, situation)
                if rank > urgency and order.may_evict(job, self._brief(head, now), situation):
                    found.append((False, -rank, -len(found), seq))
        found.sort(key=_by_key)
        blocks = self.free
        slots = self._slots()
        for n in range(len(found)):
            seq = found[n][3]
            blocks += self._blocks(self.tokens_of(seq, now) - 1)
            slots += 1
            if blocks >= need and slots > 0:
                for entry in found[: n + 1]:
                    self._preempt(entry[3], now, notices)
                return

    def _budget(self, now: float) -> int:
        """Tokens that the step about to be made may compute beside its decodes. Sets ``prompt_left``."""
        chunking = self.chunking
        if chunking is not None:
            partial = self.partial
            wanted = chunking.budget(self._look(now), None if partial is None else self._brief(partial, now))
            self.prompt_left = max(wanted, 1 if self.batch == 0 else 0)
        return self.max_num_batched_tokens - self.batch

    def _must_wait_whole(self, seq: Seq, budget: int) -> bool:
        """Without chunked prefill: is there too little budget left for all that this prompt must compute?

        One that no step has room for is cut all the same; vLLM refuses to start where that could happen.
        """
        if budget >= self.max_num_batched_tokens:
            return False
        known = seq.computed
        cache = self.cache
        if cache is not None and seq.hashes and known == 0:
            known = min(cache.match(seq.hashes), (seq.tokens - 1) // self.hash_tokens) * self.hash_tokens
        return seq.tokens - known > budget

    def _admit_ready(self, budget: int, notices: list[Notice], newest: int) -> int:
        if len(self.ready) > 1:
            self.ready.sort(key=_by_order)
        left: list[Seq] = []
        for seq in self.ready:
            need = self._blocks(seq.tokens) - self._held(seq)
            full = budget <= 0 or len(self.running) + self.lingering_slots >= self.max_num_seqs
            if full or need > self.free or seq.seen > newest:
                left.append(seq)
                continue
            self.free -= need
            self.taken += need
            seq.blocks += need
            self.running[seq.request] = seq
            self._join_batch(seq)
            self.joined.append(seq)
            budget -= 1
            notices.append(Notice(JOINED, seq))
        self.ready = left
        if left and not self.running and left[len(left) - 1].seen <= newest:
            self._unjam()
        return budget

    def _unjam(self) -> None:
        """Nothing runs because the KV that waits to run fills all blocks: the last one's is computed again.

        In vLLM such KV sits in evictable blocks, so the allocator would overwrite it.
        """
        seq = self.ready.pop()
        self._free(seq)
        seq.kind = SERVE
        seq.resumed = True
        seq.state = WAITING
        seq.seen = -1
        self.waiting.appendleft(seq)
        self.wake_again = True

    def _start_prefill(self, seq: Seq, budget: int, now: float) -> bool:
        """Admit a prompt if all of it fits; take its first chunk."""
        if seq.kind == REPROMPT:  # its KV is its own running sequence's: only the last, partial block is copied
            if self.free < 1:
                return False
            seq.computed = (seq.tokens - 1) // self.block_size * self.block_size
            self.running[seq.request] = seq
            seq.blocks = 0
            self._take_chunk(seq, seq.tokens - seq.computed, 1)
            return True
        cache = self.cache
        if cache is not None and seq.hashes and seq.computed == 0:
            # At least the last token is computed, and hits are whole blocks (vLLM).
            hits = min(cache.match(seq.hashes), (seq.tokens - 1) // self.hash_tokens)
            idle = 0
            for i in range(hits):
                if cache.references[seq.hashes[i]] == 0:
                    idle += cache.width
            if self._blocks(seq.tokens) - hits * cache.width + idle > self.free:
                return False
            for i in range(hits):
                self.free -= cache.acquire(seq.hashes[i])
                seq.shared.append(seq.hashes[i])
            seq.computed = hits * self.hash_tokens
        elif self._blocks(seq.tokens) - self._held(seq) > self.free:
            return False
        if seq.left_blocks > 0:
            seq.computed = max(seq.computed, self._still_there(seq))
        if seq.started_s < 0.0:
            seq.started_s = now
        self.running[seq.request] = seq
        chunk = min(seq.tokens - seq.computed, budget, self.prompt_left)
        self._take_chunk(seq, chunk, self._blocks(seq.computed + chunk) - self._held(seq))
        return True

    def _queue(self, seq: Seq, now: float) -> None:
        seq.state = WAITING
        seq.seen = self._seen(now)
        self.waiting.append(seq)

    # -- blocks -----------------------------------------------------------------------------------------------------

    def _blocks(self, tokens: int) -> int:
        return (tokens + self.block_size - 1) // self.block_size

    def _held(self, seq: Seq) -> int:
        if seq.shared:
            assert self.cache is not None
            return seq.blocks + len(seq.shared) * self.cache.width
        return seq.blocks

    def _free(self, seq: Seq) -> None:
        self.free += seq.blocks
        seq.blocks = 0
        seq.computed = 0
        if seq.shared:
            cache = self.cache
            assert cache is not None
            for h in seq.shared:
                self.free += cache.release(h)
            seq.shared = []

    def _share(self, seq: Seq) -> None:
        """Let others find the full prompt blocks that this sequence has just computed."""
        cache = self.cache
        if cache is None or not seq.hashes:
            return
        full = min(len(seq.hashes), seq.computed // self.hash_tokens)
        for i in range(len(seq.shared), full):
            if not cache.insert(seq.hashes[i]):
                break
            seq.shared.append(seq.hashes[i])
            seq.blocks -= cache.width

    def _note_low(self, free: int) -> None:
        """Free blocks came down to ``free``: what the prefix cache kept beyond that is overwritten."""
        if free < self.least_free:
            self.least_free = free
        if self.cache is not None:
            self.cache.shrink(free)


def _by_order(seq: Seq) -> int:
    return seq.order


def _by_key(entry: tuple[bool, float, int, Seq]) -> tuple[bool, float, int]:
    return entry[0], entry[1], entry[2]
