"""The engine that divides its GPU: the timeline, its books, and the plain engine where nothing is divided."""

from __future__ import annotations

from math import inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.types import Role, Slo
from penstock.perf.hardware import hardware_spec
from penstock.perf.models import model_spec
from penstock.perf.roofline import RooflineStepModel
from penstock.perf.sm_share import shared_gpu
from penstock.policy.duet import AdaptiveSharing, FixedSharing, SharingKit
from penstock.policy.engine import EngineKit, EngineParts, Share, Sharing, Situation
from penstock.policy.mixed import LeastTokens
from penstock.policy.parts import Beliefs, Policy
from penstock.sim.cluster import ClusterSpec, Fault, FaultKind, InstanceSpec, Scenario
from penstock.sim.duet import DuetEngine, Leg, timeline
from penstock.sim.result import Outcome, SimResult
from penstock.sim.run import Sampler, build_world, collect
from penstock.sim.world import World
from penstock.workload.trace import Trace

from .support import check, trace_of

MODEL = RooflineStepModel(model_spec("qwen3-8b"), hardware_spec("h100"))
GPU = shared_gpu(MODEL)
legs = st.lists(st.builds(Leg, st.integers(1, 20), st.floats(1e-3, 0.1), st.floats(0.0, 1e-3)), min_size=1, max_size=3)
slow = st.floats(1.0, 2.0)


def ends(found: list[Leg]) -> list[float]:
    """When each step ends."""
    at, now = [], 0.0
    for leg in found:
        for j in range(leg.steps):
            now += leg.first_s + leg.rise_s * j
            at.append(now)
    return at


@settings(deadline=None)
@given(legs, st.floats(1e-3, 5.0), slow, slow)
def test_timeline_runs_both_slowed_until_one_has_ended(
    alone: list[Leg], prefill_s: float, slow_decode: float, slow_prefill: float
) -> None:
    found, join_s = timeline(alone, prefill_s, slow_decode, slow_prefill)
    at, solo = ends(found), ends(alone)
    assert len(at) == len(solo)
    together_s = min(solo[-1] * slow_decode, prefill_s * slow_prefill)
    for real, planned in zip(at, solo, strict=True):
        if real <= together_s:
            expected = planned * slow_decode
        else:
            expected = together_s + planned - together_s / slow_decode
        assert real == pytest.approx(expected, rel=1e-9)
    prefill_end = together_s + prefill_s - together_s / slow_prefill
    assert join_s == pytest.approx(max(at[-1], prefill_end), rel=1e-9)


class Always(Sharing):
    """Divide whatever comes, with a fixed number of steps; every third time let the prompts wait."""

    def __init__(self, steps: int, decode_sms: int, holds: bool) -> None:
        self.steps = steps
        self.decode_sms = decode_sms
        self.holds = holds
        self.asked = 0

    def share(self, situation: Situation, new: list[int], past: list[int]) -> Share | None:
        assert situation.decodes > 0 and len(new) == len(past) > 0
        self.asked += 1
        if self.holds and self.asked % 3 == 1:
            return Share(132, 0, 1)
        return Share(self.decode_sms, 132 - self.decode_sms, self.steps)


def world_of(
    trace: Trace, spec: InstanceSpec, kit: EngineKit | None, faults: tuple[Fault, ...] = (), noise: float = 0.0
) -> tuple[World, ClusterSpec]:
    cluster = ClusterSpec((spec,), 147_456.0)
    policy = Policy("duet", LeastTokens(), engine=kit)
    beliefs = Beliefs(MODEL, 147_456.0, 1e9)
    return build_world(trace, cluster, policy, beliefs, Slo(), Scenario(seed=3, noise=noise, faults=faults)), cluster


def run(world: World, cluster: ClusterSpec, trace: Trace) -> SimResult:
    world.run(1e9)
    check(world)
    return collect(world, trace, "duet", cluster, Sampler(world), 0.0)


def random_trace(rnd: np.random.Generator, n: int) -> Trace:
    arrival = np.cumsum(rnd.exponential(float(rnd.choice([0.01, 0.1, 0.5])), n)) - 1e-9
    prompt = rnd.integers(1, int(rnd.choice([50, 2000, 9000])), n)
    output = rnd.integers(1, int(rnd.choice([3, 40, 200])), n)
    return trace_of(np.maximum(arrival, 0.0).tolist(), prompt.tolist(), output.tolist())


def random_spec(rnd: np.random.Generator, trace: Trace) -> InstanceSpec:
    longest = int((trace.prompt_tokens + trace.output_tokens).max())
    blocks = int(longest * float(rnd.choice([1.0, 1.5, 4.0, 30.0])) / 16) + 2
    return InstanceSpec(
        Role.MIXED,
        MODEL,
        blocks,
        16,
        int(rnd.choice([2, 8, 64])),
        int(rnd.choice([64, 512, 8192])),
        async_scheduling=bool(rnd.random() < 0.5),
        shared_bandwidth=float(rnd.choice([1.0, 0.7])),
    )


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.integers(1, 24), st.integers(1, 40), st.sampled_from([2, 16, 66, 130]), st.booleans()
)
def test_nothing_is_lost_whatever_is_divided(seed: int, n: int, steps: int, decode_sms: int, holds: bool) -> None:
    rnd = np.random.default_rng(seed)
    trace = random_trace(rnd, n)
    faults: tuple[Fault, ...] = ()
    if rnd.random() < 0.3:
        at = float(rnd.uniform(0.0, 3.0))
        faults = (Fault(at, 0, FaultKind.DOWN), Fault(at + 0.5, 0, FaultKind.UP))
    elif rnd.random() < 0.3:
        faults = (Fault(float(rnd.uniform(0.0, 3.0)), 0, FaultKind.SLOW, 2.0),)
    kit = SharingKit(lambda: Always(steps, decode_sms, holds))
    world, cluster = world_of(trace, random_spec(rnd, trace), kit, faults, float(rnd.choice([0.0, 0.1])))
    world.sample_s = 0.037
    world.on_sample = lambda now: within(world, now)
    result = run(world, cluster, trace)
    finished = result.requests.outcome == Outcome.FINISHED
    assert not (result.requests.outcome == Outcome.UNFINISHED).any()
    assert (result.requests.emitted[finished] == trace.output_tokens[finished]).all()
    if faults and faults[0].kind is FaultKind.DOWN:
        return  # work and gaps that an instance took down with it are counted too
    assert finished.all()
    gaps = result.gaps
    spans = gaps.batch * (gaps.count * gaps.first_s + gaps.rise_s * gaps.count * (gaps.count - 1) / 2)
    assert int((gaps.batch * gaps.count).sum()) == int((trace.output_tokens - 1).sum())
    # Every gap of every request, joins, pauses and recomputations included: together they span its decode.
    whole = result.requests.finish_s - result.requests.first_token_s
    assert float(spans.sum()) == pytest.approx(float(whole.sum()), rel=1e-9, abs=1e-9)
    assert float(gaps.first_s.min(initial=inf)) > 0.0


def within(world: World, now: float) -> None:
    """Blocks: what is held, free, reserved and lingering never exceeds what there is."""
    engine = world.engines[0]
    assert isinstance(engine, DuetEngine)
    held = sum(s.blocks for s in engine.seqs.values())
    assert min(engine.free, engine.reserved) >= 0
    assert held + engine.free + engine.reserved + engine.lingering_blocks <= engine.capacity_blocks
    load = engine.load(now)
    assert 0 <= load.free_blocks <= engine.capacity_blocks
    assert load.waiting >= 0


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 24))
def test_with_an_endless_target_it_is_the_plain_engine(seed: int, n: int) -> None:
    rnd = np.random.default_rng(seed)
    trace = random_trace(rnd, n)
    spec = random_spec(rnd, trace)
    results = []
    for kit in (None, SharingKit(lambda: AdaptiveSharing(GPU, inf, 256, True))):
        world, cluster = world_of(trace, spec, kit)
        results.append(run(world, cluster, trace))
    plain, duet = results
    assert np.array_equal(plain.requests.first_token_s, duet.requests.first_token_s)
    assert np.array_equal(plain.requests.finish_s, duet.requests.finish_s)
    assert np.array_equal(plain.gaps.first_s, duet.gaps.first_s)


def one_division(steps: int, outputs: tuple[int, int] = (50, 5)) -> tuple[DuetEngine, SimResult]:
    """A request decodes when a long prompt comes."""
    trace = trace_of([0.0, 0.05], [100, 8000], list(outputs))
    spec = InstanceSpec(Role.MIXED, MODEL, 4000)
    world, cluster = world_of(trace, spec, SharingKit(lambda: FixedSharing(GPU, 26, steps)))
    result = run(world, cluster, trace)
    engine = world.engines[0]
    assert isinstance(engine, DuetEngine)
    return engine, result


def test_one_division_takes_what_the_parts_take() -> None:
    engine, result = one_division(256)
    assert engine.divisions == 1
    prefill_s = GPU.on(106).step_s(0, 0, [8000], [0])
    decode_s = GPU.on(26).step_s(1, 105, [], [])
    # The prompt is noticed at the end of the step in progress.
    began = result.requests.prefill_start_s[1]
    assert began == pytest.approx(0.05, abs=decode_s)
    took_s = float(result.requests.first_token_s[1] - began)
    steps = int(np.ceil(prefill_s / decode_s))
    assert steps * decode_s <= took_s <= 1.2 * steps * decode_s
    # The decode never waited longer than one slowed step.
    assert engine.waited_s < decode_s
    assert float(result.gaps.first_s.max()) < 1.5 * decode_s


def test_decodes_wait_for_the_join_and_the_gap_says_so() -> None:
    engine, result = one_division(2)
    prefill_s = GPU.on(106).step_s(0, 0, [8000], [0])
    decode_s = GPU.on(26).step_s(1, 105, [], [])
    assert engine.waited_s == pytest.approx(prefill_s - 2 * decode_s, rel=0.1)
    assert float(result.gaps.first_s.max()) == pytest.approx(engine.waited_s, abs=2 * decode_s)


def test_a_request_that_ends_within_a_division_is_told_at_once_and_holds_its_blocks_until_the_join() -> None:
    trace = trace_of([0.0, 0.05, 0.06], [100, 8000, 100], [12, 5, 5])
    spec = InstanceSpec(Role.MIXED, MODEL, 4000, max_num_seqs=2)
    world, cluster = world_of(trace, spec, SharingKit(lambda: FixedSharing(GPU, 26, 256)))
    seen: list[tuple[float, int]] = []
    engine = world.engines[0]
    assert isinstance(engine, DuetEngine)
    world.sample_s = 0.001
    world.on_sample = lambda now: seen.append((now, engine.lingering_slots))
    result = run(world, cluster, trace)
    r = result.requests
    join_s = float(r.first_token_s[1])
    assert r.finish_s[0] < join_s
    assert {slots for now, slots in seen if r.finish_s[0] < now < join_s} == {1}
    assert r.prefill_start_s[2] >= join_s  # its slot came free with the join


def test_a_policy_cannot_have_both() -> None:
    from penstock.core.errors import PenstockError
    from penstock.policy.engine import Clock

    class Both(EngineKit):
        def parts(self, instance: int, role: Role) -> EngineParts:
            return EngineParts(clock=Clock(), sharing=FixedSharing(GPU, 26, 8))

    with pytest.raises(PenstockError, match="divide its GPU and set its clock"):
        world_of(trace_of([0.0], [1], [1]), InstanceSpec(Role.MIXED, MODEL, 100), Both())
