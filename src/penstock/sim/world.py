"""The virtual-time world: turns what engines and links do into events, and the controller's actions into orders.

Read ``run`` first, then one ``_on_*`` method per thing that can happen and one ``_do_*`` method per action.
Migrations have a file of their own (``moves.py``), faults too (``faults.py``).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from heapq import heappop, heappush
from math import inf, nan
from typing import Any, Final

from penstock.control.controller import Controller
from penstock.core.actions import Action, Decode, Flip, Migrate, Prefill, Reject, Serve
from penstock.core.events import (
    NO_PREDICTION,
    DecodeStarted,
    Event,
    Finished,
    InstanceUp,
    Load,
    Preempted,
    PrefillDone,
    RequestArrived,
    Tick,
)
from penstock.core.types import MigrationLevel, Slo
from penstock.policy.engine import Job
from penstock.sim import moves
from penstock.sim.engine import Engine
from penstock.sim.moves import Move
from penstock.sim.network import DECODE, LAST_COPY, STAGE_COPY, Flow, Network
from penstock.sim.seq import (
    EXTRACTED,
    FINISHED,
    FIRST_TOKEN,
    JOINED,
    PREEMPTED,
    PREFILL_ONLY,
    PULL,
    PULL_READY,
    REPROMPT,
    SERVE,
    STAGE,
    Notice,
    Pace,
    Seq,
)

# Kinds of entries in the event heap. Engine wakes come last among equal times, so that what arrives at the very
# moment of a step boundary is seen at that boundary.
FLOW_DONE: Final = 0
TICK: Final = 1
SAMPLE: Final = 2
INJECTED: Final = 3
SWEEP: Final = 4
WAKE: Final = 5

TOO_LONG: Final = "prompt and output do not fit in the KV cache of one instance"


class Flight:
    """Where a request is. ``source`` pins its KV for a pull (-1: nobody); ``engine`` is where it is queued or runs."""

    def __init__(self, request: int, prompt: int, output: int) -> None:
        self.request = request
        self.prompt = prompt
        self.final_tokens = prompt + output
        self.generated = 0
        self.last_token_s = -1.0
        self.engine = -1
        self.source = -1
        self.pinned_s = 0.0
        self.move: Move | None = None
        self.pace: Pace | None = None
        self.flow: Flow | None = None
        self.job: Job | None = None  # where engines have parts of the policy
        self.silent = False  # its next join is the end of a rolled-back migration: no event


class World:
    """Virtual time. Columns are indexed by request."""

    def __init__(
        self,
        controller: Controller,
        engines: list[Engine],
        network: Network,
        kv_bytes_per_token: float,
        arrival_s: list[float],
        prompt_tokens: list[int],
        output_tokens: list[int],
        slos: list[Slo],
        slo_class: list[int],
        hashes: list[tuple[int, ...]],
        longest: int,
    ) -> None:
        self.controller = controller
        self.engines = engines
        self.network = network
        self.flow_version = 0
        self.kv_bytes_per_token = kv_bytes_per_token
        self.arrival_s = arrival_s
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.slos = slos
        self.slo_class = slo_class
        self.hashes = hashes
        self.longest = longest

        self.now = 0.0
        self.events = 0
        self.heap: list[tuple[float, int, int, int, int, Any]] = []
        self.sequence = 0
        self.armed = [-1 for _ in engines]
        self.waking = -1
        self.up = [True for _ in engines]
        self.flights: dict[int, Flight] = {}
        self.equipped = False
        self.lengths: Any = None
        self.log: Any = None
        self.on_injected: Callable[[Any], None] | None = None
        self.on_sample: Callable[[float], None] | None = None
        self.sample_s = 0.0
        self.tick_s = 0.0
        self.pending_injected = 0
        self.paced = False  # watch the deadlines of tokens

        n = len(arrival_s)
        blank = array("d", [nan]) * n
        zeros = array("i", [0]) * n
        nowhere = array("i", [-1]) * n
        self.outcome = array("b", [0]) * n
        self.prefill_start_s = array("d", blank)
        self.first_token_s = array("d", blank)
        self.decode_start_s = array("d", blank)
        self.finish_s = array("d", blank)
        self.lateness_s = array("d", blank)
        self.emitted = array("q", [0]) * n
        self.prefill_instance = array("i", nowhere)
        self.decode_instance = array("i", nowhere)
        self.preempted = array("i", zeros)
        self.migrated = array("i", zeros)
        self.reject_reasons: dict[str, int] = {}
        self.failed_moves: dict[str, int] = {}
        self.expired_leases = 0
        self.moves: list[tuple[float, float, int, int, int, int, int, float, str]] = []
        self.flips: list[tuple[float, int, int]] = []

    # -- the loop ---------------------------------------------------------------------------------------------------

    def run(self, until_s: float, progress: Callable[[int], None] | None = None) -> None:
        """Run until nothing is left to happen, or until ``until_s``. ``progress`` gets the number of arrivals."""
        heap = self.heap
        arrival_s = self.arrival_s
        n = len(arrival_s)
        arrived = 0
        next_arrival = arrival_s[0] if n else inf
        if self.tick_s > 0.0:
            self._push(self.tick_s, TICK, 0, None)
        if self.sample_s > 0.0:
            self._push(0.0, SAMPLE, 0, None)
        sweep_s = 0.25 * self.controller.lease_s
        self._push(sweep_s, SWEEP, 0, None)
        while True:
            if arrived < n and (not heap or next_arrival <= heap[0][0]):
                if next_arrival > until_s:
                    break
                self.now = next_arrival
                self.events += 1
                self._on_arrival(arrived)
                arrived += 1
                next_arrival = arrival_s[arrived] if arrived < n else inf
                if progress is not None and arrived % 1024 == 0:
                    progress(arrived)
                continue
            if not heap:
                break
            now, kind, _, a, version, thing = heappop(heap)
            if now > until_s:
                break
            if kind == WAKE:
                engine = self.engines[a]
                if version != engine.version or not self.up[a]:
                    continue
                self.now = now
                self.events += 1
                self._on_wake(engine)
            elif kind == FLOW_DONE:
                if version != self.flow_version:
                    continue
                self.now = now
                self.events += 1
                self._on_flow_done(thing)
            else:
                if kind == INJECTED:
                    self.pending_injected -= 1
                elif arrived == n and self._over():
                    continue  # nothing left to tick for
                self.now = now
                self.events += kind != SWEEP
                if kind == TICK:
                    self._on_tick()
                    self._push(now + self.tick_s, TICK, 0, None)
                elif kind == SAMPLE:
                    if self.on_sample is not None:
                        self.on_sample(now)
                    self._push(now + self.sample_s, SAMPLE, 0, None)
                elif kind == SWEEP:
                    self._on_sweep()
                    self._push(now + sweep_s, SWEEP, 0, None)
                elif self.on_injected is not None:
                    self.on_injected(thing)

    def announce(self, instance: int, role: Any, levels: tuple[MigrationLevel, ...]) -> None:
        """Tell the controller that an instance is ready."""
        e = self.engines[instance]
        self.tell(InstanceUp(instance, role, e.capacity_blocks, e.block_size, e.max_num_seqs, levels))

    def _over(self) -> bool:
        """Nothing in flight, or nothing that could ever move again."""
        if not self.flights:
            return True
        if self.pending_injected > 0 or not self.network.quiet():
            return False
        if any(e.wake_s != inf for e in self.engines):
            return False
        return all(f.source < 0 for f in self.flights.values())

    def inject(self, time_s: float, thing: Any) -> None:
        """Have ``on_injected`` called with ``thing`` at ``time_s``."""
        self.pending_injected += 1
        self._push(time_s, INJECTED, 0, thing)

    def tell(self, event: Event) -> None:
        """Hand an event to the controller and do what it says."""
        actions = self.controller.handle(event, self.now)
        if self.log is not None:
            self.log.write(self.now, event, actions)
        for action in actions:
            self.act(action)

    def _push(self, time_s: float, kind: int, a: int, thing: Any, version: int = 0) -> None:
        self.sequence += 1
        heappush(self.heap, (time_s, kind, self.sequence, a, version, thing))

    def arm(self, engine: Engine) -> None:
        """Put an engine's next wake into the heap, if it has changed."""
        i = engine.index
        if i == self.waking or engine.version == self.armed[i]:
            return
        self.armed[i] = engine.version
        if engine.wake_s != inf:
            self._push(engine.wake_s, WAKE, i, None, engine.version)

    # -- what happens -----------------------------------------------------------------------------------------------

    def _on_arrival(self, i: int) -> None:
        prompt, output = self.prompt_tokens[i], self.output_tokens[i]
        if prompt + output > self.longest:
            self.outcome[i] = 2
            self.reject_reasons[TOO_LONG] = self.reject_reasons.get(TOO_LONG, 0) + 1
            return
        flight = Flight(i, prompt, output)
        self.flights[i] = flight
        if self.paced:
            slo = self.slos[self.slo_class[i]]
            flight.pace = Pace(self.now + slo.ttft_s, slo.tpot_s, prompt)
        if self.equipped:
            kind = self.slo_class[i]
            flight.job = Job(i, prompt, self.slos[kind], kind, self.now)
            flight.job.predicted_output = self._predict(flight, 0)
        prefix = self.hashes[i] if self.hashes else ()
        self.tell(RequestArrived(i, prompt, self.slos[self.slo_class[i]], self.slo_class[i], prefix))

    def _on_wake(self, engine: Engine) -> None:
        now = self.now
        self.waking = engine.index
        for notice in engine.settle(now):
            self._on_notice(engine, notice)
        for notice in engine.begin(now):
            self._on_notice(engine, notice)
        self.waking = -1
        self.arm(engine)

    def _on_notice(self, engine: Engine, notice: Notice) -> None:
        seq = notice.seq
        kind = notice.kind
        if seq.kind == REPROMPT:
            moves.on_reprompt(self, engine, notice)
            return
        if kind == FIRST_TOKEN:
            self._on_first_token(engine, seq)
        elif kind == FINISHED:
            self._on_finished(engine, seq)
        elif kind == PULL_READY:
            self._on_pull_ready(engine, seq)
        elif kind == JOINED:
            self._on_joined(engine, seq)
        elif kind == PREEMPTED:
            self._on_preempted(engine, seq)
        elif kind == EXTRACTED:
            moves.on_extracted(self, engine, seq)

    def _on_first_token(self, engine: Engine, seq: Seq) -> None:
        now = self.now
        i = seq.request
        flight = self.flights[i]
        move = flight.move
        if move is not None and move.target == engine.index:
            moves.cut_over(self, flight, move, engine, seq)
            return
        flight.generated = seq.tokens - flight.prompt
        flight.last_token_s = now
        if self.prefill_instance[i] < 0 or flight.generated == 1:
            self.prefill_instance[i] = engine.index
            self.first_token_s[i] = now
            self.prefill_start_s[i] = seq.started_s
        self.emitted[i] = flight.generated
        if seq.kind == PREFILL_ONLY:
            flight.source = engine.index
            flight.pinned_s = now
            self.tell(PrefillDone(i, engine.index, engine.load(now), self._predict(flight, flight.generated)))
            return
        if seq.tokens < flight.final_tokens:
            self.decode_instance[i] = engine.index
            if self.decode_start_s[i] != self.decode_start_s[i]:
                self.decode_start_s[i] = now
        if seq.resumed:
            if flight.silent:
                flight.silent = False
                return
            self.tell(DecodeStarted(i, engine.index, engine.load(now)))
            return
        self.tell(PrefillDone(i, engine.index, engine.load(now), self._predict(flight, flight.generated)))

    def _on_finished(self, engine: Engine, seq: Seq) -> None:
        now = self.now
        i = seq.request
        flight = self.flights[i]
        if flight.move is not None:
            moves.roll_back(self, flight, "finished first")
        if flight.generated == 0:  # a single token was asked for: it came out of the prefill
            self.prefill_instance[i] = engine.index
            self.first_token_s[i] = now
            self.prefill_start_s[i] = seq.started_s
        self.outcome[i] = 1
        self.finish_s[i] = now
        if flight.pace is not None:
            self.lateness_s[i] = flight.pace.late_s
        generated = flight.final_tokens - flight.prompt
        self.emitted[i] = generated
        del self.flights[i]
        self.tell(Finished(i, engine.index, generated, engine.load(now)))

    def _on_pull_ready(self, engine: Engine, seq: Seq) -> None:
        flight = self.flights[seq.request]
        move = flight.move
        if move is not None and move.target == engine.index:
            tokens = seq.tokens - 1 if seq.kind == PULL else seq.tokens
            tokens -= move.copied
            purpose = STAGE_COPY if seq.kind == STAGE else LAST_COPY
            source = move.source
        else:
            tokens = seq.tokens - 1
            purpose = DECODE
            source = flight.source
        if source < 0 or not self.up[source]:
            self.recompute(flight, engine)
            return
        size_bytes = tokens * self.kv_bytes_per_token
        flight.flow = self.network.start(seq.request, purpose, source, engine.index, size_bytes, self.now)
        self._arm_network()

    def _arm_network(self) -> None:
        """Put the end of the soonest transfer into the heap, in place of any other."""
        self.flow_version += 1
        flow = self.network.soonest()
        if flow is not None:
            self._push(flow.done_s, FLOW_DONE, 0, flow, self.flow_version)

    def _on_flow_done(self, flow: Flow) -> None:
        now = self.now
        self.network.end(flow, now)
        self._arm_network()
        flight = self.flights[flow.request]
        flight.flow = None
        target = self.engines[flow.target]
        if flow.purpose == STAGE_COPY:
            moves.on_staged(self, flight, target)
            return
        source = self.engines[flow.source]
        flight.source = -1
        source.release(flow.request, now)
        self.arm(source)
        target.pulled(flow.request, now)
        self.arm(target)

    def _on_joined(self, engine: Engine, seq: Seq) -> None:
        now = self.now
        i = seq.request
        flight = self.flights[i]
        if flight.silent:
            flight.silent = False
            return
        move = flight.move
        if move is not None and move.target == engine.index:
            moves.complete(self, flight, move, engine, seq, now + engine.first_s - seq.last_token_s)
            return
        flight.source = -1
        self.decode_instance[i] = engine.index
        if self.decode_start_s[i] != self.decode_start_s[i]:
            self.decode_start_s[i] = now
        self.tell(DecodeStarted(i, engine.index, engine.load(now)))

    def _on_preempted(self, engine: Engine, seq: Seq) -> None:
        i = seq.request
        self.preempted[i] += 1
        flight = self.flights[i]
        move = flight.move
        if move is not None:
            if engine.index == move.target and move.extracted:
                return  # a replay: it has nowhere to go back to, and will be computed again here
            moves.roll_back(self, flight, "preempted")
            if engine.index == move.target:
                return
        flight.silent = False  # the controller knows now, so it is told of the next join
        self.tell(Preempted(i, engine.index, engine.load(self.now)))

    def _on_tick(self) -> None:
        now = self.now
        instances: list[int] = []
        loads: list[Load] = []
        requests: list[int] = []
        generated: list[int] = []
        predicted: list[float] = []
        for engine in self.engines:
            if not self.up[engine.index]:
                continue
            instances.append(engine.index)
            loads.append(engine.load(now))
            for seq, tokens in engine.decoding(now):
                flight = self.flights.get(seq.request)
                if flight is None or flight.engine != engine.index:
                    continue
                requests.append(seq.request)
                generated.append(tokens - flight.prompt)
                predicted.append(self._predict(flight, tokens - flight.prompt))
        self.tell(Tick(tuple(instances), tuple(loads), tuple(requests), tuple(generated), tuple(predicted)))

    def _on_sweep(self) -> None:
        """End the leases of KV that nobody has begun to pull in time.

        A claim waits in the target's queue while the target has no room. Its source gives the blocks back when the
        lease runs out, and the target computes the KV itself; a migration is rolled back instead. Without this, two
        full instances that each wait for the other's pinned blocks would wait for ever.
        """
        oldest_s = self.now - self.controller.lease_s
        for flight in list(self.flights.values()):
            if flight.source < 0 or flight.flow is not None or flight.pinned_s > oldest_s:
                continue
            self.expired_leases += 1
            if flight.move is not None:
                moves.roll_back(self, flight, "waited too long for room on the target")
            else:
                self.unpin(flight)

    def _predict(self, flight: Flight, generated: int) -> float:
        if self.lengths is None:
            return NO_PREDICTION
        left = flight.final_tokens - flight.prompt - generated
        prediction: float = self.lengths.remaining(flight.request, left, generated)
        return prediction

    # -- what the controller wants ----------------------------------------------------------------------------------

    def act(self, action: Action) -> None:
        if isinstance(action, Prefill):
            self._do_prefill(action.request, action.instance, PREFILL_ONLY)
        elif isinstance(action, Decode):
            self._do_decode(action)
        elif isinstance(action, Serve):
            self._do_prefill(action.request, action.instance, SERVE)
        elif isinstance(action, Migrate):
            moves.start(self, action)
        elif isinstance(action, Flip):
            self.flips.append((self.now, action.instance, int(action.role)))
            self.engines[action.instance].play(action.role)
        elif isinstance(action, Reject):
            self._do_reject(action)

    def _do_prefill(self, request: int, instance: int, kind: int) -> None:
        flight = self.flights[request]
        if flight.source >= 0:  # computed again from the start: nobody will pull the old KV
            self.unpin(flight)
        engine = self.engines[instance]
        hashes = self.hashes[request] if self.hashes else ()
        seq = Seq(request, kind, flight.prompt + flight.generated, flight.final_tokens, hashes)
        seq.job = flight.job
        seq.pace = flight.pace
        seq.last_token_s = flight.last_token_s
        flight.silent = False
        flight.engine = instance
        engine.submit(seq, self.now)
        self.arm(engine)

    def _do_decode(self, action: Decode) -> None:
        flight = self.flights[action.request]
        engine = self.engines[action.instance]
        flight.engine = action.instance
        if flight.source == action.instance:
            flight.source = -1
            engine.adopt(action.request, flight.final_tokens, self.now)
        else:
            seq = Seq(action.request, PULL, flight.prompt + flight.generated, flight.final_tokens)
            seq.job = flight.job
            seq.pace = flight.pace
            seq.last_token_s = flight.last_token_s
            engine.submit(seq, self.now)
        self.arm(engine)

    def _do_reject(self, action: Reject) -> None:
        flight = self.flights.pop(action.request)
        if flight.source >= 0:
            self.unpin(flight)
        self.outcome[action.request] = 2
        self.emitted[action.request] = flight.generated
        self.reject_reasons[action.reason] = self.reject_reasons.get(action.reason, 0) + 1

    def unpin(self, flight: Flight) -> None:
        """Let the source forget a request's KV."""
        source = self.engines[flight.source]
        if self.up[flight.source] and flight.request in source.seqs:
            source.release(flight.request, self.now)
            self.arm(source)
        flight.source = -1

    def recompute(self, flight: Flight, engine: Engine) -> None:
        """The KV cannot be pulled: have ``engine`` compute it."""
        engine.recompute(flight.request, self.now)
        flight.source = -1
        self.arm(engine)

    def cancel_flow(self, flight: Flight) -> None:
        """Stop a request's transfer, if there is one."""
        if flight.flow is not None:
            self.network.end(flight.flow, self.now)
            self._arm_network()
            flight.flow = None
