"""``simulate``: a trace, a cluster and a policy in; columns out."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import inf
from typing import Any

import numpy as np

from penstock.control.controller import Controller
from penstock.core.errors import PenstockError
from penstock.core.events import MoveOrdered
from penstock.core.types import MigrationLevel, Slo
from penstock.perf.energy import busy_joules
from penstock.policy.engine import EngineParts
from penstock.policy.parts import Beliefs, Policy
from penstock.sim.cluster import ClusterSpec, Fault, FaultKind, ForcedMove, InstanceSpec, LengthSource, Scenario
from penstock.sim.composed import ComposedEngine
from penstock.sim.duet import DuetEngine
from penstock.sim.engine import Engine, GapLog
from penstock.sim.faults import bring_up, slow_down, take_down
from penstock.sim.leaping import LeapingEngine
from penstock.sim.network import Network
from penstock.sim.result import (
    EnergyColumns,
    Flips,
    InstanceColumns,
    Migrations,
    RequestColumns,
    SimResult,
    Timeline,
    TokenGaps,
)
from penstock.sim.stepping import SteppingEngine
from penstock.sim.tuning import TuningEngine
from penstock.sim.world import World
from penstock.workload.trace import I64, Trace

ALL_LEVELS = tuple(MigrationLevel)
NOISE_DRAWS = 4096


def simulate(
    trace: Trace,
    cluster: ClusterSpec,
    policy: Policy,
    beliefs: Beliefs,
    slos: Slo | Sequence[Slo],
    scenario: Scenario | None = None,
    lengths: LengthSource | None = None,
    log: Any = None,
    progress: Callable[[int], None] | None = None,
) -> SimResult:
    """Run a trace through a cluster under a policy.

    Parameters
    ----------
    trace : Trace
    cluster : ClusterSpec
        The true costs.
    policy : Policy
        A fresh one: policies keep state.
    beliefs : Beliefs
        What the policy thinks things cost.
    slos : Slo or one Slo per class of the trace
    scenario : Scenario, optional
        Noise, faults, sampling, stepping.
    lengths : LengthSource, optional
        Stands in for the engines' remaining-length predictor.
    log : object with ``write(now_s, event, actions)``, optional
        Receives every event with the controller's answer.
    progress : callable, optional
        Called with the number of requests that have arrived, now and then.

    Returns
    -------
    SimResult
        ``wall_s`` is the time of the event loop alone.
    """
    scenario = scenario if scenario is not None else Scenario()
    world = build_world(trace, cluster, policy, beliefs, slos, scenario, lengths, log)
    sampler = Sampler(world)
    if scenario.sample_s is not None:
        world.sample_s = scenario.sample_s
        world.on_sample = sampler.sample
    until_s = scenario.until_s if scenario.until_s is not None else inf
    start = time.perf_counter()
    with _no_garbage_collection():
        world.run(until_s, progress)
    wall_s = time.perf_counter() - start
    return collect(world, trace, policy.name, cluster, sampler, wall_s)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """The event loop makes no reference cycles; looking for them costs more the more requests there are."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def build_world(
    trace: Trace,
    cluster: ClusterSpec,
    policy: Policy,
    beliefs: Beliefs,
    slos: Slo | Sequence[Slo],
    scenario: Scenario,
    lengths: LengthSource | None = None,
    log: Any = None,
) -> World:
    """The world at time zero, instances announced: for those who want to look inside (tests). See ``simulate``."""
    per_class = [slos] * len(trace.class_names) if isinstance(slos, Slo) else list(slos)
    if len(per_class) != len(trace.class_names):
        raise PenstockError(
            f"{len(per_class)} SLOs for {len(trace.class_names)} classes {', '.join(trace.class_names)}",
            "give one SLO a class, or one for all",
        )
    gaps = GapLog()
    engines = _engines(trace, cluster, policy, scenario, gaps)
    network = Network([s.link_bytes_per_s for s in cluster.instances], cluster.link_latency_s, cluster.handshake_s)
    world = World(
        Controller(policy, beliefs, cluster.migration_level, cluster.lease_s),
        engines,
        network,
        cluster.kv_bytes_per_token,
        trace.arrival_s.tolist(),
        trace.prompt_tokens.tolist(),
        trace.output_tokens.tolist(),
        per_class,
        trace.slo_class.tolist(),
        [trace.prefixes.of(i) for i in range(len(trace))] if trace.prefixes is not None else [],
        min(s.capacity_tokens for s in cluster.instances),
    )
    world.equipped = policy.engine is not None
    world.lengths = lengths
    world.log = log
    world.paced = scenario.deadlines
    for engine in engines:
        engine.paced = scenario.deadlines
    world.tick_s = policy.tick_s() or 0.0
    world.on_injected = lambda thing: _injected(world, cluster, thing)
    for i, spec in enumerate(cluster.instances):
        world.announce(i, spec.role, ALL_LEVELS)
    things: list[Fault | ForcedMove] = [*scenario.faults, *scenario.forced_moves]
    for thing in things:
        world.inject(thing.time_s, thing)
    return world


def _engines(trace: Trace, cluster: ClusterSpec, policy: Policy, scenario: Scenario, gaps: GapLog) -> list[Engine]:
    rng = np.random.default_rng(scenario.seed)
    hash_tokens = trace.prefixes.block_tokens if trace.prefixes is not None else 0
    engines: list[Engine] = []
    for i, spec in enumerate(cluster.instances):
        if hash_tokens % spec.block_size:
            raise PenstockError(
                f"prefix hashes cover {hash_tokens} tokens, not a multiple of the block size {spec.block_size}",
                "choose a block size that divides it",
            )
        noise: list[float] = []
        if scenario.noise > 0.0:
            sigma = scenario.noise
            noise = np.exp(rng.normal(-0.5 * sigma * sigma, sigma, NOISE_DRAWS)).tolist()
        parts = EngineParts() if policy.engine is None else policy.engine.parts(i, spec.role)
        engine = _engine(i, spec, parts, scenario.stepping, gaps, hash_tokens, noise)
        engine.equip(parts)
        engines.append(engine)
    return engines


def _engine(
    i: int, spec: InstanceSpec, parts: EngineParts, stepping: bool, gaps: GapLog, hash_tokens: int, noise: list[float]
) -> Engine:
    """The engine that can do what the policy's parts ask for."""
    if parts.sharing is not None:
        if parts.batching is not None:
            raise PenstockError("an engine cannot both compose its batches and divide its GPU", "leave one part out")
        return DuetEngine(i, spec, gaps, hash_tokens, noise)
    if parts.batching is not None:
        return ComposedEngine(i, spec, gaps, hash_tokens, noise)
    if parts.tuning is not None:
        return TuningEngine(i, spec, gaps, hash_tokens, noise)
    if stepping:
        engine = SteppingEngine(i, spec, gaps, hash_tokens, noise)
        engine.open_table()
        return engine
    return LeapingEngine(i, spec, gaps, hash_tokens, noise)


def _injected(world: World, cluster: ClusterSpec, thing: Fault | ForcedMove) -> None:
    """A fault or a forced move is due."""
    if isinstance(thing, ForcedMove):
        world.tell(MoveOrdered(thing.request, thing.target))
        return
    if thing.kind is FaultKind.DOWN:
        take_down(world, thing.instance)
    elif thing.kind is FaultKind.UP:
        bring_up(world, thing.instance, ALL_LEVELS)
    else:
        slow_down(world, thing.instance, thing.factor)


def _finetuned(world: World) -> I64 | None:
    """Tokens fine-tuned by each instance up to now; None where none does."""
    counts = np.zeros(len(world.engines), np.int64)
    some = False
    for engine in world.engines:
        if isinstance(engine, TuningEngine):
            engine.tune_to(world.now)
            counts[engine.index] = engine.finetune_tokens
            some = True
    return counts if some else None


class Sampler:
    """Collects the timeline of a world: give ``sample`` to its ``on_sample``."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.rows: list[tuple[float, list[tuple[int, int, int, int, int]]]] = []

    def sample(self, now: float) -> None:
        world = self.world
        row = []
        for engine in world.engines:
            load = engine.load(now)
            used = engine.capacity_blocks - load.free_blocks
            role = int(world.controller.view.role[engine.index])
            row.append((load.decode_tokens, load.running, load.waiting, used, role))
        self.rows.append((now, row))

    def timeline(self) -> Timeline | None:
        if not self.rows:
            return None
        data = np.array([row for _, row in self.rows], dtype=np.int64)
        return Timeline(
            time_s=np.array([t for t, _ in self.rows]),
            resident_tokens=data[:, :, 0],
            running=data[:, :, 1].astype(np.int32),
            waiting=data[:, :, 2].astype(np.int32),
            used_blocks=data[:, :, 3],
            role=data[:, :, 4].astype(np.int8),
        )


def _energy(world: World, cluster: ClusterSpec) -> EnergyColumns:
    """Joules by instance and clock level. An instance that is down is taken to idle."""
    n, levels = len(world.engines), max(len(e.models) for e in world.engines)
    idle_j, mhz, busy_s, joules = np.full(n, np.nan), *(np.full((n, levels), np.nan) for _ in range(3))
    for i, (engine, spec) in enumerate(zip(world.engines, cluster.instances, strict=True)):
        here = slice(0, len(engine.models))
        prompt_s, decode_s = np.array(engine.prompt_busy_s), np.array(engine.decode_busy_s)
        busy_s[i, here] = prompt_s + decode_s
        if spec.clocks:
            mhz[i, here] = [clock.mhz for clock in spec.clocks]
        if spec.power is not None:
            clocks = [clock.mhz for clock in spec.clocks] or [1.0]
            joules[i, here] = busy_joules(spec.power, clocks, prompt_s, decode_s)
            idle_j[i] = spec.power.idle_w * max(world.now - engine.busy_s, 0.0)
    unknown = np.isnan(idle_j)
    return EnergyColumns(np.where(unknown, np.nan, np.nansum(joules, axis=1) + idle_j), idle_j, mhz, busy_s, joules)


def collect(
    world: World, trace: Trace, policy: str, cluster: ClusterSpec, sampler: Sampler, wall_s: float
) -> SimResult:
    for flight in world.flights.values():  # unfinished: say how far they came
        engine = world.engines[flight.engine] if flight.engine >= 0 else None
        seq = engine.seqs.get(flight.request) if engine is not None else None
        if engine is not None and seq is not None and world.first_token_s[flight.request] >= 0:
            world.emitted[flight.request] = max(
                world.emitted[flight.request], engine.tokens_of(seq, world.now) - flight.prompt
            )
    gaps = world.engines[0].gaps
    moves = world.moves
    return SimResult(
        trace=trace,
        policy=policy,
        requests=RequestColumns(
            outcome=np.array(world.outcome, np.int8),
            prefill_start_s=np.array(world.prefill_start_s),
            first_token_s=np.array(world.first_token_s),
            decode_start_s=np.array(world.decode_start_s),
            finish_s=np.array(world.finish_s),
            emitted=np.array(world.emitted, np.int64),
            prefill_instance=np.array(world.prefill_instance, np.int32),
            decode_instance=np.array(world.decode_instance, np.int32),
            preemptions=np.array(world.preempted, np.int32),
            migrations=np.array(world.migrated, np.int32),
            lateness_s=np.array(world.lateness_s) if world.paced else None,
        ),
        gaps=TokenGaps(np.array(gaps.first_s), np.array(gaps.rise_s), np.array(gaps.count), np.array(gaps.batch)),
        migrations=Migrations(
            start_s=np.array([m[0] for m in moves], np.float64),
            done_s=np.array([m[1] for m in moves], np.float64),
            request=np.array([m[2] for m in moves], np.int64),
            source=np.array([m[3] for m in moves], np.int32),
            target=np.array([m[4] for m in moves], np.int32),
            tokens=np.array([m[5] for m in moves], np.int64),
            level=np.array([m[6] for m in moves], np.int8),
            pause_s=np.array([m[7] for m in moves], np.float64),
            reason=tuple(m[8] for m in moves),
        ),
        flips=Flips(
            time_s=np.array([f[0] for f in world.flips], np.float64),
            instance=np.array([f[1] for f in world.flips], np.int32),
            role=np.array([f[2] for f in world.flips], np.int8),
        ),
        timeline=sampler.timeline(),
        instances=InstanceColumns(
            role=np.array(world.controller.view.role, np.int8),
            capacity_blocks=np.array([e.capacity_blocks for e in world.engines], np.int64),
            block_size=np.array([e.block_size for e in world.engines], np.int64),
            busy_s=np.array([e.busy_s for e in world.engines]),
            steps=np.array([e.step for e in world.engines], np.int64),
            prefill_tokens=np.array([e.prefill_tokens for e in world.engines], np.int64),
            decode_tokens=np.array([e.decode_tokens for e in world.engines], np.int64),
            peak_blocks=np.array([e.capacity_blocks - e.least_free for e in world.engines], np.int64),
            preemptions=np.array([e.preemptions for e in world.engines], np.int64),
            bytes_in=np.array(world.network.bytes_in),
            bytes_out=np.array(world.network.bytes_out),
            energy=_energy(world, cluster),
            finetune_tokens=_finetuned(world),
        ),
        simulated_s=world.now,
        wall_s=wall_s,
        events=world.events,
        reject_reasons=dict(world.reject_reasons),
        failed_migrations=dict(world.failed_moves),
        leases_expired=world.expired_leases,
    )
