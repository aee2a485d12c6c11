"""Runs a simulated engine in real time: steps end when the clock says so, and every running choice gets its token.

The engine model leaps over steps that change nothing; tokens are sent at the end of every step of a leap. Step times
are the model's own: a late event loop sends late, but nothing drifts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import islice
from math import inf
from typing import Protocol

import msgspec

from penstock.live.emulated.choice import Choice
from penstock.live.emulated.clock import Clock
from penstock.live.emulated.metrics import Counters
from penstock.live.emulated.settings import Plan
from penstock.sim.engine import GapLog
from penstock.sim.leaping import LeapingEngine
from penstock.sim.prefix import PrefixCache
from penstock.sim.seq import (
    DECODING,
    EXTRACTED,
    FIRST_TOKEN,
    JOINED,
    PREEMPTED,
    PREFILL_ONLY,
    PULL,
    PULL_READY,
    PULLING,
    SERVE,
    WAITING,
    Notice,
    Seq,
)

_LOOK_UP = 8  # waiting requests whose cached blocks are looked up before they are admitted
_GAPS = 4096  # the engine model logs inter-token gaps; this many are kept before they are thrown away


class Transferrer(Protocol):
    """What happens to KV that comes from elsewhere, or is kept for somebody."""

    def arrive(self, choice: Choice) -> None:
        """A choice whose KV is to be pulled has been queued."""

    def pull(self, choice: Choice) -> None:
        """Blocks for it are reserved."""

    def give_up(self, choice: Choice) -> None:
        """Its client has gone before its KV came."""

    def pin(self, choice: Choice) -> None:
        """It has ended, and its KV is to be kept."""


class Driver:
    """One engine model and its choices. ``running`` are those that get a token at the end of every step."""

    def __init__(self, index: int, plan: Plan, clock: Clock, counters: Counters) -> None:
        spec = plan.spec
        hash_tokens = spec.block_size if spec.prefix_caching else 0
        self.engine = LeapingEngine(index, spec, GapLog(), hash_tokens)
        self.block_size = spec.block_size
        self.clock = clock
        self.counters = counters
        self.transfers: Transferrer
        self.choices: dict[int, Choice] = {}
        self.running: dict[int, Choice] = {}
        self.poisoned: set[int] = set()
        self.on_idle: list[Callable[[], None]] = []
        self.on_gone: Callable[[Choice], None] | None = None
        self.on_work: Callable[[], None] | None = None
        self.held = 0  # blocks kept of requests that run on
        self._emitted = 0  # steps of the leap in progress whose tokens are out
        self._timer: asyncio.Handle | None = None
        self._armed_s = inf

    # -- orders -----------------------------------------------------------------------------------------------------

    def submit(self, choice: Choice) -> None:
        """Queue a choice."""
        o, prompt = choice.options, choice.prompt
        kind = PULL if o.pull is not None or o.stuck else PREFILL_ONLY if o.pin and choice.left == 1 else SERVE
        # One that is to be pinned is taken out by ``extract``: the model must not end it by itself.
        final = len(prompt) + choice.left + o.pin
        hashes = prompt.blocks if self.engine.cache is not None else ()
        choice.seq = Seq(choice.request, kind, len(prompt), final, hashes)
        now = self.advance()
        choice.arrived_s = now
        self.choices[choice.request] = choice
        self.engine.submit(choice.seq, now)
        if kind == PULL:
            self.transfers.arrive(choice)
        if self.on_work is not None:
            self.on_work()
        self.arm()

    def abort(self, choice: Choice) -> None:
        """The client has gone: blocks are free at the next step. Does nothing for a choice that has ended."""
        now = self.advance()
        if self.choices.get(choice.request) is not choice:
            return
        del self.choices[choice.request]
        self.counters.finished["abort"] += 1
        if self.on_gone is not None:
            self.on_gone(choice)
        if choice.seq.kind == PULL:
            self.transfers.give_up(choice)
        leaks = choice.parked and choice.seq.state == PULLING  # stock vLLM never frees these blocks
        if choice.request in self.engine.seqs and not leaks:
            if self.running.pop(choice.request, None) is not None:
                self.share(choice)
            self.engine.release(choice.request, now)
        self.arm()

    def stop_after_next(self, choice: Choice) -> bool:
        """End a decode with its next token, as if that was its last one, and pin its KV. False, and nothing happens,
        where that token is its last one anyway.
        """
        self.advance()
        self.arm()
        if choice.request not in self.running or choice.left < 2 or choice.options.pin:
            return False
        choice.left = 1
        choice.options = msgspec.structs.replace(choice.options, pin=True, pull=None)
        return True

    def hold(self, choice: Choice) -> tuple[int, Callable[[], None]] | None:
        """Keep the full blocks of a decode, whatever becomes of it: how many, and how to give them back."""
        self.advance()
        cache = self.engine.cache
        blocks = (choice.tokens - 1) // self.block_size
        if cache is None or choice.request not in self.running or blocks == 0:
            self.arm()
            return None
        self.share(choice)
        hashes = [choice.block_state(i) for i in range(blocks)]
        for h in hashes:
            self.engine.free -= cache.acquire(h)
        self.held += blocks
        self.arm()

        def give_back() -> None:
            now = self.advance()
            for h in hashes:
                self.engine.free += cache.release(h)
            self.held -= blocks
            self.engine._poke(now)  # somebody may wait for them
            self.arm()

        return blocks, give_back

    def pulled(self, choice: Choice) -> None:
        """Its KV has come."""
        now = self.advance()
        self.engine.pulled(choice.request, now)
        self.share(choice)
        self.arm()

    def recompute(self, choice: Choice) -> None:
        """Its KV will not come."""
        now = self.advance()
        self.engine.recompute(choice.request, now)
        self.arm()

    def release(self, request: int) -> None:
        """Free pinned KV."""
        now = self.advance()
        self.engine.release(request, now)
        self.arm()

    def fail_all(self, message: str) -> None:
        """End every request with an engine's error."""
        for choice in list(self.choices.values()):
            choice.answer.fail(message)
            self.abort(choice)

    def set_slow(self, factor: float) -> None:
        """Run ``factor`` times slower from the next step on."""
        self.engine.set_slow(factor, self.advance())
        self.arm()

    def reset_prefix_cache(self) -> bool:
        """Forget all cached blocks; False, and nothing happens, while any is in use (as in vLLM)."""
        self.advance()
        if self.engine.seqs or self.engine.aborted or self.held:
            return False
        if self.engine.cache is not None:
            self.engine.cache = PrefixCache(self.engine.cache.width)
        self.poisoned.clear()
        return True

    def stop(self) -> None:
        """Let no more time pass."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._armed_s = inf

    # -- time -------------------------------------------------------------------------------------------------------

    def advance(self) -> float:
        """Do what is due by now; return now."""
        now = self.clock.now()
        engine = self.engine
        while True:
            if engine.planned == 0:
                if engine.wake_s > now:
                    return now
            elif self._emitted < engine.planned:
                end_s = engine.time_of(self._emitted + 1)
                if end_s > now:
                    return now
                self._emitted += 1
                self._emit(end_s)
                if self._emitted < engine.planned:
                    continue
            self._boundary(engine.wake_s)

    def arm(self) -> None:
        """Set the timer to the end of the next step."""
        engine = self.engine
        next_s = engine.time_of(self._emitted + 1) if self._emitted < engine.planned else engine.wake_s
        if next_s != self._armed_s:
            self.stop()
            if next_s < inf:
                self._armed_s = next_s
                self._timer = self.clock.call_at(next_s, self._due)
        if self.on_idle and not engine.seqs and not engine.aborted and not self.held:
            self.call_idle()

    def call_idle(self) -> None:
        """Tell whoever waits for that that nothing is left to do."""
        waiting, self.on_idle = self.on_idle, []
        for call in waiting:
            call()

    def _due(self) -> None:
        self._timer = None
        self._armed_s = inf
        self.advance()
        self.arm()

    def _emit(self, now: float) -> None:
        """A step has ended: a token for everyone in the batch."""
        batch = list(self.running.values())
        self.counters.generation_tokens += len(batch)
        ended = [choice for choice in batch if choice.token()]
        for choice in ended:
            self._end(choice, now)

    def _boundary(self, now: float) -> None:
        """The steps that were planned are over."""
        engine = self.engine
        self._emitted = 0
        for notice in engine.settle(now):
            self._heed(notice, now)
        if engine.leaving:  # ended with its first token: out at once, lest it be preempted
            for notice in engine.settle(now):
                self._heed(notice, now)
        if engine.waiting or engine.free < len(self.running):  # somebody may look for them, or somebody must go
            for choice in self.running.values():
                self.share(choice)
        looking = self._look_up() if engine.waiting and engine.cache is not None else ()
        for notice in engine.begin(now):
            self._heed(notice, now)
        for seq in looking:
            if seq.state == WAITING:
                self._put_back(seq)
        for seq in engine.chunks:
            starting = self.choices.get(seq.request)
            if starting is not None and starting.cached < 0:
                self.found(starting, seq.computed, seq.shared)
        if self.poisoned and engine.cache is not None:
            self.poisoned.intersection_update(engine.cache.references)
        if len(engine.gaps.first_s) > _GAPS:
            engine.gaps = GapLog()

    def _look_up(self) -> list[Seq]:
        """Let pulls that may be admitted now have what the prefix cache holds of them: they need less room then.

        The engine model reserves blocks for all of a pull. Only the head of the queue is looked at, for speed.
        """
        engine = self.engine
        assert engine.cache is not None
        found = []
        for seq in islice(engine.waiting, _LOOK_UP):
            if seq.kind != PULL:
                continue
            for h in seq.hashes[: min(engine.cache.match(seq.hashes), (seq.tokens - 1) // self.block_size)]:
                engine.free -= engine.cache.acquire(h)
                seq.shared.append(h)
            found.append(seq)
        return found

    def _put_back(self, seq: Seq) -> None:
        engine = self.engine
        assert engine.cache is not None
        for h in seq.shared:
            engine.free += engine.cache.release(h)
        seq.shared = []

    def _heed(self, notice: Notice, now: float) -> None:
        choice = self.choices.get(notice.seq.request)
        if choice is None:
            return
        kind = notice.kind
        if kind == FIRST_TOKEN:
            self._first(choice, now)
        elif kind == JOINED:
            self.note_first(choice, now + self.engine.first_s)  # when its first step here will end
            self.running[choice.request] = choice
        elif kind == PREEMPTED:
            self._preempted(choice, now)
        elif kind == PULL_READY:
            self.transfers.pull(choice)
        elif kind == EXTRACTED:
            self._pinned(choice)

    # -- a choice's life --------------------------------------------------------------------------------------------

    def found(self, choice: Choice, cached: int, hashes: list[int]) -> None:
        """``cached`` tokens of a prompt, in blocks ``hashes``, are here already."""
        choice.cached = cached
        self.counters.prefix_queries += len(choice.prompt)
        self.counters.prefix_hits += cached
        if self.poisoned and not self.poisoned.isdisjoint(hashes):
            choice.poison()

    def _first(self, choice: Choice, now: float) -> None:
        """A prompt has been computed (again, after a preemption), which yields a token."""
        if choice.poisoned:
            self.poisoned.update(choice.seq.shared)
        self.counters.generation_tokens += 1
        self.note_first(choice, now)
        ended = choice.token()
        if choice.seq.kind == PREFILL_ONLY:
            self._pinned(choice)
        elif ended:
            self._end(choice, now)
        else:
            self.running[choice.request] = choice

    def note_first(self, choice: Choice, now: float) -> None:
        """Count a prompt, once."""
        if choice.first_s < 0.0:
            choice.first_s = now
            self.counters.prompt_tokens += len(choice.prompt)
            self.counters.ttft_s.observe((now - choice.arrived_s) / self.clock.speed)

    def _end(self, choice: Choice, now: float) -> None:
        self.running.pop(choice.request, None)
        if choice.request in self.engine.seqs:  # the model has freed one that ends with its first token
            self.share(choice)
        if choice.options.pin:
            self.engine.extract(choice.request, now)
            return
        if choice.finish == "stop" and choice.request in self.engine.seqs:
            self.engine.release(choice.request, now)
        self._over(choice, now)
        choice.answer.ended(choice, None)

    def _pinned(self, choice: Choice) -> None:
        self._over(choice, self.clock.now())
        self.transfers.pin(choice)

    def _over(self, choice: Choice, now: float) -> None:
        del self.choices[choice.request]
        counters, speed = self.counters, self.clock.speed
        counters.finished[choice.finish or "abort"] += 1
        counters.e2e_s.observe((now - choice.arrived_s) / speed)
        if len(choice.out) > 1:
            counters.tpot_s.observe((now - choice.first_s) / (len(choice.out) - 1) / speed)

    def _preempted(self, choice: Choice, now: float) -> None:
        """Its KV is gone, but for what the prefix cache still has: let it find that."""
        self.running.pop(choice.request, None)
        seq = choice.seq
        if choice.options.pin and choice.options.pull is not None:  # stock vLLM waits for the pull a second time
            choice.parked = True
            self.engine.release(choice.request, now)
            return
        if self.engine.cache is not None:
            full = (choice.tokens - 1) // self.block_size
            seq.hashes = tuple(choice.block_state(i) for i in range(full))

    def share(self, choice: Choice, blocks: int | None = None) -> None:
        """Let others find the full blocks of a sequence (vLLM caches them as they fill up).

        The engine model knows only of prompts. Of a decoding sequence it counts what is held when it leaves the
        batch; of any other one, a block that is shared is not its own any more.
        """
        engine, seq = self.engine, choice.seq
        cache = engine.cache
        if cache is None:
            return
        if blocks is None:
            blocks = (choice.tokens - 1) // self.block_size
        shared = seq.shared
        for i in range(len(shared), blocks):
            h = choice.block_state(i)
            if not cache.insert(h):  # somebody else's copy serves: ours is free
                engine.free += 1 - cache.acquire(h)
            if seq.state != DECODING:
                seq.blocks -= 1
            shared.append(h)
            if choice.poisoned:
                self.poisoned.add(h)
