"""Small clusters, simple policies and random workloads for the simulator's tests."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from penstock.core.events import Tick
from penstock.core.types import MigrationLevel, Role, Slo
from penstock.perf.energy import ClockLevel, PowerModel
from penstock.perf.step import LinearStepModel
from penstock.policy.engine import (
    Batching,
    Chunking,
    Clock,
    Composition,
    EngineKit,
    EngineParts,
    Job,
    QueueOrder,
    Situation,
)
from penstock.policy.parts import (
    Beliefs,
    Choice,
    DecodePlacement,
    Policy,
    PrefillPlacement,
    RoleChange,
    Roles,
)
from penstock.policy.view import ClusterView, RequestRecord
from penstock.sim.cluster import ClusterSpec, Fault, FaultKind, ForcedMove, InstanceSpec, Scenario
from penstock.sim.result import SimResult
from penstock.sim.run import Sampler, build_world, collect
from penstock.sim.stepping import SteppingEngine
from penstock.sim.world import World
from penstock.workload.trace import PrefixHashes, Trace


class Turns(PrefillPlacement, DecodePlacement):
    """Take the instances of a role in turn; if there is none of it, any that is up."""

    def __init__(self, role: Role) -> None:
        self.role = role
        self.count = 0

    def place(self, request: RequestRecord, view: ClusterView, now_s: float) -> Choice:
        rows = view.index_of(self.role)
        if len(rows) == 0:
            rows = view.everyone
        if len(rows) == 0:
            return Choice(-1, False)
        self.count += 1
        return Choice(int(rows[self.count % len(rows)]))


class LeastTokens(DecodePlacement):
    """The decode instance with the fewest believed resident tokens."""

    def place(self, request: RequestRecord, view: ClusterView, now_s: float) -> Choice:
        rows = view.decodes if len(view.decodes) else view.everyone
        if len(rows) == 0:
            return Choice(-1, False)
        return Choice(int(rows[int(view.resident_tokens(now_s, rows).argmin())]))


class Patient(PrefillPlacement, DecodePlacement):
    """Another placement, behind a door: no more than ``most`` requests in that phase, the others wait."""

    def __init__(self, inner: Turns | LeastTokens, most: int, decodes: bool) -> None:
        self.inner = inner
        self.most = most
        self.decodes = decodes

    def place(self, request: RequestRecord, view: ClusterView, now_s: float) -> Choice:
        rows = view.everyone
        busy = view.decode_requests(rows).sum() if self.decodes else view.prefill_requests[rows].sum()
        return Choice.wait() if busy >= self.most else self.inner.place(request, view, now_s)


class ScriptedFlips(Roles):
    """Flip as told: ``script`` holds (time_s, instance, role)."""

    interval_s = 0.05

    def __init__(self, script: list[tuple[float, int, Role]]) -> None:
        self.script = sorted(script)

    def review(self, event: Tick, view: ClusterView, now_s: float) -> list[RoleChange]:
        due = [s for s in self.script if s[0] <= now_s]
        self.script = [s for s in self.script if s[0] > now_s]
        return [RoleChange(i, role, "scripted") for _, i, role in due]


class Shuffle(QueueOrder):
    """A fixed random rank per request; the urgent push the others aside and out."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def sets_aside(self) -> bool:
        return self.seed % 2 == 0

    def evicts(self) -> bool:
        return self.seed % 3 == 0

    def urgency(self, job: Job, situation: Situation) -> float:
        return float((job.request * 7919 + self.seed) % 101)

    def may_evict(self, running: Job, waiting: Job, situation: Situation) -> bool:
        return running.generated() < 10


class Budget(Chunking):
    """A budget that depends on the batch, often nothing at all."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def budget(self, situation: Situation, partial: Job | None) -> int:
        return (situation.context * 31 + situation.decodes + self.seed) % 40 - 10


class Everybody(Batching):
    """The composition that leaves everything as it is."""

    def compose(self, decodes: list[Job], waiting: list[Job], situation: Situation) -> Composition:
        return Composition(decodes, steps=1_000_000)


class Some(Batching):
    """A third of the decodes sits out each step, and prompts enter one at a time, the last first."""

    def __init__(self, seed: int) -> None:
        self.turn = seed

    def compose(self, decodes: list[Job], waiting: list[Job], situation: Situation) -> Composition:
        self.turn += 1
        run = [job for job in decodes if (job.request + self.turn) % 3]
        enter = waiting[-1:] if self.turn % 2 else None
        if not run and not enter and (decodes or waiting):
            run, enter = decodes[:1], waiting[:1] if waiting else None
        return Composition(run, enter, steps=1 + self.turn % 3)


class Switch(Clock):
    """A level that follows from everything the part is told, the times apart: those are equal up to rounding only."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.asked = 0

    def max_steps(self) -> int:
        return 1 + self.seed % 7

    def choose(self, situation: Situation, prompts: list[Job], prompt_tokens: int) -> int:
        self.asked += 1
        told = situation.context * 31 + situation.decodes * 7 + situation.waiting * 5 + prompt_tokens
        return (told + sum(job.request for job in prompts) + self.asked + self.seed) % 4 - situation.clock % 2


class Kit(EngineKit):
    """The parts above, by name."""

    def __init__(self, kind: str, seed: int) -> None:
        self.kind = kind
        self.seed = seed

    def parts(self, instance: int, role: Role) -> EngineParts:
        order = Shuffle(self.seed) if "order" in self.kind else None
        chunking = Budget(self.seed) if "budget" in self.kind else None
        batching = Everybody() if "everybody" in self.kind else Some(self.seed) if "some" in self.kind else None
        return EngineParts(order, batching, chunking, Switch(self.seed) if "clock" in self.kind else None)


def trace_of(
    arrival_s: list[float],
    prompt: list[int],
    output: list[int],
    prefixes: PrefixHashes | None = None,
) -> Trace:
    order = np.argsort(np.array(arrival_s), kind="stable")
    return Trace(
        np.array(arrival_s, np.float64)[order],
        np.array(prompt, np.int64)[order],
        np.array(output, np.int64)[order],
        np.zeros(len(arrival_s), np.int16),
        prefixes=prefixes.take(order) if prefixes is not None else None,
    )


SLO = Slo(0.3, 0.015)
"""Of all cases: no policy here looks at it, but deadlines are watched. Met by some requests and missed by others."""


@dataclass(frozen=True)
class Case:
    """A small random world."""

    trace: Trace
    cluster: ClusterSpec
    scenario: Scenario
    flips: tuple[tuple[float, int, Role], ...]
    placement: str
    mixed: bool
    parts: str = ""

    def equipped(self, parts: str) -> Case:
        """The same world with parts in its engines (words of ``Kit``)."""
        return replace(self, parts=parts)

    def clocked(self) -> Case:
        """The same world on instances with four clock levels and a power model."""
        top = self.cluster.instances[0].step_model
        assert isinstance(top, LinearStepModel)
        slower = [LinearStepModel(top.base_s * s, top.per_decode_s, top.per_context_s * s, top.per_prefill_s * s * s)
                  for s in (1.9, 1.4, 1.2)]  # fmt: skip
        clocks = tuple(ClockLevel(1000.0 + 100 * i, m) for i, m in enumerate([*slower, top]))
        specs = tuple(replace(i, clocks=clocks, power=PowerModel(60, 80, 260)) for i in self.cluster.instances)
        return replace(self, cluster=replace(self.cluster, instances=specs))

    def policy(self) -> Policy:
        policy = self._plain_policy()
        if self.parts and self.parts != "patient":
            policy.engine = Kit(self.parts, self.scenario.seed)
        return policy

    def _plain_policy(self) -> Policy:
        roles = ScriptedFlips(list(self.flips)) if self.flips else None
        if self.mixed:
            return Policy("test-mixed", Turns(Role.MIXED), None, roles=roles)
        decode = Turns(Role.DECODE) if self.placement == "turns" else LeastTokens()
        if "patient" in self.parts:
            prefill = Patient(Turns(Role.PREFILL), 2, False)
            return Policy("test", prefill, Patient(decode, 3, True), roles=roles)
        return Policy("test", Turns(Role.PREFILL), decode, roles=roles)

    def world(self, stepping: bool, log: Any = None) -> World:
        model = self.cluster.instances[0].step_model
        beliefs = Beliefs(model, self.cluster.kv_bytes_per_token, 1e9)
        scenario = Scenario(
            seed=self.scenario.seed,
            noise=self.scenario.noise,
            stepping=stepping,
            faults=self.scenario.faults,
            forced_moves=self.scenario.forced_moves,
            deadlines=True,
        )
        return build_world(self.trace, self.cluster, self.policy(), beliefs, SLO, scenario, log=log)

    def run(self, stepping: bool, checked: bool = True) -> tuple[World, SimResult]:
        world = self.world(stepping)
        if checked:
            world.sample_s = 0.037
            world.on_sample = lambda now: check(world)
        world.run(1e9)
        check(world)
        return world, collect(world, self.trace, "test", self.cluster, Sampler(world), 0.0)


def check(world: World) -> None:
    """Integrity: no block twice, none leaked; nothing left behind when all is done."""
    for engine in world.engines:
        held = sum(s.blocks for s in engine.seqs.values())
        assert held + engine.free <= engine.capacity_blocks
        if isinstance(engine, SteppingEngine):
            engine.check()
    if not world.flights:
        for engine in world.engines:
            assert not engine.seqs
            if not engine.aborted:
                assert engine.free == engine.capacity_blocks
                assert engine.batch == 0 and engine.context == 0


def case_of(seed: int, n: int, faults: bool = False, hashes: bool = False) -> Case:
    """A world from a seed. One number instead of many draws: a failure is reported as (seed, n), both replayable."""
    rnd = np.random.default_rng(seed)

    def pick(*options: float) -> float:
        return float(options[int(rnd.integers(0, len(options)))])

    arrival = np.cumsum(rnd.exponential(pick(0.002, 0.02, 0.2), n))
    arrival -= arrival[0]
    prompt = rnd.integers(1, int(pick(4, 60, 200)), n)
    output = rnd.integers(1, int(pick(2, 40, 150)), n)
    trace = trace_of(arrival.tolist(), prompt.tolist(), output.tolist(), _hashes(rnd, prompt) if hashes else None)
    block = int(pick(4, 8) if hashes else pick(1, 4, 8))
    longest = int((trace.prompt_tokens + trace.output_tokens).max())
    capacity = int(np.ceil(longest * pick(1.0, 1.5, 3.0, 20.0) / block)) + 1
    model = LinearStepModel(
        float(rnd.uniform(0.002, 0.02)),
        float(rnd.uniform(0, 1e-3)),
        float(rnd.uniform(0, 1e-5)),
        float(rnd.uniform(0, 1e-4)),
        float(rnd.uniform(0, 1e-7)),
    )
    mixed = rnd.random() < 0.3
    overlapped = rnd.random() < 0.5
    chunked = np.random.default_rng([seed, 1]).random() < 0.7  # a stream of its own: the other draws stay as they were
    budget, seqs = int(pick(16, 64, 512)), int(pick(1, 2, 5, 16))

    def spec(role: Role) -> InstanceSpec:
        link = 1e6 * float(rnd.uniform(0.5, 2))
        most = min(seqs, budget)
        return InstanceSpec(
            role, model, capacity, block, most, budget, link, async_scheduling=overlapped, chunked_prefill=chunked
        )

    shape = int(rnd.integers(1, 3)), int(rnd.integers(1, 4))
    roles = [Role.MIXED] * sum(shape) if mixed else [Role.PREFILL] * shape[0] + [Role.DECODE] * shape[1]
    cluster = ClusterSpec(
        tuple(spec(r) for r in roles),
        kv_bytes_per_token=pick(1.0, 1000.0),
        link_latency_s=float(rnd.uniform(1e-4, 5e-3)),
        handshake_s=pick(0.0, 0.05),
        migration_level=MigrationLevel(int(rnd.integers(0, 4))),
    )
    span = float(arrival[-1]) + 1.0
    forced = [
        ForcedMove(float(rnd.uniform(0, 2 * span)), int(rnd.integers(0, n)), int(rnd.integers(0, len(roles))))
        for _ in range(int(rnd.integers(0, 40)))
    ]
    flips = tuple(
        (float(rnd.uniform(0, span)), int(rnd.integers(0, len(roles))), Role(int(rnd.integers(0, 2))))
        for _ in range(0 if mixed else int(rnd.integers(0, 4)))
    )
    injected: list[Fault] = []
    if rnd.random() < 0.5:
        injected.append(Fault(float(rnd.uniform(0, span)), 0, FaultKind.SLOW, float(rnd.uniform(1.1, 4.0))))
    for _ in range(int(rnd.integers(1, 4)) if faults else 0):
        i, at = int(rnd.integers(0, len(roles))), float(rnd.uniform(0, 2 * span))
        injected.append(Fault(at, i, FaultKind.DOWN))
        injected.append(Fault(at + float(rnd.uniform(0.01, 1.0)), i, FaultKind.UP))
    scenario = Scenario(seed=seed % 1000, noise=pick(0.0, 0.1), faults=injected, forced_moves=forced)
    return Case(trace, cluster, scenario, flips, "turns" if rnd.random() < 0.5 else "least", mixed)


def _hashes(rnd: np.random.Generator, prompt: np.ndarray) -> PrefixHashes:
    """Prompts that share leading blocks of 8 tokens: one of few openings, then a tail of their own."""
    rows: list[list[int]] = []
    for i, tokens in enumerate(prompt.tolist()):
        blocks = tokens // 8
        common = min(int(rnd.integers(0, blocks + 1)), blocks)
        opening = int(rnd.integers(0, 3))
        rows.append([opening * 1000 + j for j in range(common)] + [10**6 * (i + 1) + j for j in range(blocks - common)])
    offsets = np.concatenate([[0], np.cumsum([len(r) for r in rows])]).astype(np.int64)
    return PrefixHashes(np.array([h for row in rows for h in row], np.int64), offsets, 8)


def cases(faults: bool = False, hashes: bool = False) -> st.SearchStrategy[Case]:
    """Random cases of up to 24 requests."""
    return st.builds(lambda seed, n: case_of(seed, n, faults, hashes), st.integers(0, 2**32 - 1), st.integers(1, 24))
