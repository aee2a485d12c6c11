"""WAIT: who takes part in a step, memory that never passes its bound, and thresholds from counted traffic."""

from __future__ import annotations

from math import inf

import pytest

from penstock.core.events import Finished
from penstock.core.types import Role, Slo
from penstock.perf.step import LinearStepModel
from penstock.plan.fluid import Flow, StepCost, whole_thresholds
from penstock.plan.fluid_check import observe, traffic
from penstock.policy.engine import DECODING, Job, Situation
from penstock.policy.parts import Beliefs
from penstock.policy.registry import build_policy
from penstock.policy.view import ClusterView
from penstock.policy.wait import CappedFcfs, LearningWait, Rule, WaitBatching
from penstock.policy.wait_traffic import LEAST, LEAST_FINISHED, Gate, Lengths, Traffic, gate, step_cost
from penstock.sim.cluster import ClusterSpec, InstanceSpec
from penstock.sim.run import simulate
from tests.policy.cluster import BELIEFS, SLO, load

COST = StepCost(0.010, 1e-6)
BUSY = (Flow(10, 10, 1000.0), Flow(10, 20, 1000.0))
BOUND = 15_210
ROOM = 15_294  # 1.085 M*


def job(request: int, generated: int = 0, kind: int = 0, arrival_s: float = 0.0, predicted: float = -1.0) -> Job:
    """A request that has ``generated`` tokens, or waits."""
    made = Job(request, 10, Slo(), kind, arrival_s)
    made.tokens += generated
    made.predicted_output = predicted
    if generated:
        made.state = DECODING
    return made


def at(now_s: float, capacity: int = 1000) -> Situation:
    made = Situation(0, Role.MIXED, 1, capacity)
    made.now_s = now_s
    return made


def ids(jobs: list[Job] | None) -> list[int]:
    return [one.request for one in jobs or []]


def test_a_threshold_is_a_gate() -> None:
    whole, fraction = gate(26.0, 11), gate(0.25, 41)
    assert (whole.start, whole.stage, whole.running) == (26, 26, inf)
    assert (fraction.start, fraction.stage, fraction.running) == (0, inf, 11)


def test_types_that_have_not_gathered_pause() -> None:
    part = WaitBatching({0: gate(2, 3), 1: gate(2, 5)})
    decodes = [job(1, 1, 0), job(2, 1, 0), job(3, 1, 0), job(4, 2, 0), job(5, 1, 1)]
    waiting = [job(6), job(7, kind=1), job(8), job(9)]
    chosen = part.compose(decodes, waiting, at(0.0))
    assert ids(chosen.run) == [1, 2, 4]  # two of a stage; the third waits, as does type 1
    assert ids(chosen.enter) == [6, 8]
    assert chosen.steps == 1


def test_without_a_gathered_type_the_engine_rests() -> None:
    part = WaitBatching({0: gate(2, 3), 1: gate(2, 5)})
    chosen = part.compose([job(1, 1, 0)], [job(2), job(3, kind=1)], at(0.0))
    assert ids(chosen.run) == [] and ids(chosen.enter) == [] and chosen.rest_s == inf
    eager = WaitBatching({0: gate(2, 3), 1: gate(2, 5)}, waits=False)
    assert ids(eager.compose([job(1, 1, 0)], [job(2)], at(0.0)).run) == [1]


def test_the_wait_ends_when_nothing_has_come_for_long() -> None:
    part = WaitBatching({0: gate(4, 3)}, patience=3.0)
    part.gather_s, part.latest_s = {0: 0.5}, {0: 10.0}
    assert part.compose([job(1, 1)], [job(2)], at(11.0)).rest_s == pytest.approx(0.5)
    chosen = part.compose([job(1, 1)], [job(2)], at(11.5))
    assert ids(chosen.run) == [1] and ids(chosen.enter) == [2]


def test_below_one_a_threshold_only_limits() -> None:
    part = WaitBatching({0: Gate(0, inf, 3)})
    chosen = part.compose([job(1, 1), job(2, 1)], [job(3), job(4)], at(0.0))
    assert ids(chosen.run) == [1, 2] and ids(chosen.enter) == [3]
    assert chosen.steps > 1


def test_capped_fcfs_knows_no_types() -> None:
    chosen = CappedFcfs(3).compose([job(1, 1), job(2, 1, 1)], [job(3, kind=1), job(4)], at(0.0))
    assert ids(chosen.run) == [1, 2] and ids(chosen.enter) == [3]
    assert ids(CappedFcfs(1).compose([job(1, 1), job(2, 1)], [job(3)], at(0.0)).enter) == []


def test_traffic_is_counted_once_and_forgotten() -> None:
    lengths = Lengths()
    seen = Traffic(10.0, lengths)
    for k in range(LEAST):
        for _ in range(2):  # still waiting at the next look
            seen.note([job(k, arrival_s=0.1 * k, predicted=5.0)], [0])
    assert len(seen.arrivals) == LEAST
    found = seen.flows(2.0)[0]
    assert (found.prompt, found.output, found.rate_rps) == (10.0, 4.0, LEAST / 2.0)
    assert seen.flows(100.0) == {}


def test_lengths_are_those_of_the_type_that_finished() -> None:
    lengths = Lengths()
    view = ClusterView()
    for k in range(LEAST_FINISHED):
        lengths.came(k, 7)
        assert lengths.known(7) is None
        lengths.observe(Finished(k, 0, 30, load()), view, 0.0)
    lengths.observe(Finished(999, 0, 1000, load()), view, 0.0)  # not counted on arrival: unknown type
    assert set(lengths.known(7) or ()) == {30}
    assert lengths.known(0) is None and lengths.types == {}


def test_believed_costs_are_read_off_a_linear_model() -> None:
    model = LinearStepModel(0.010, per_decode_s=1e-5, per_context_s=2e-7, per_prefill_s=1e-4)
    found = step_cost(Beliefs(model, 1.0, 1e9))
    assert found.base_s == pytest.approx(0.010, rel=1e-6)
    assert found.per_token_s == pytest.approx(2e-7, rel=1e-6)
    assert found.per_prompt_token_s == pytest.approx(1e-4, rel=1e-6)
    assert found.per_request_s == pytest.approx(1e-5, rel=1e-6)


def rule(cap: float = 0.0) -> Rule:
    return Rule(COST, cap, margin=0.03, fill=1.0, rate=0.0, window_s=10.0)


def test_gates_from_rates() -> None:
    dense = rule().gates(list(BUSY), 16_000)
    assert [(g.start, g.stage) for g in dense] == [(26, 26), (26, 26)]
    rare = Flow(100, 50, 0.5)
    mixed = rule().gates([*BUSY, rare], 40_000)
    assert mixed[0].start == 26 and mixed[2].start == 0
    # What the dense types leave, in whole requests of the rare one.
    assert mixed[2].running == pytest.approx((40_000 - BOUND) / rare.held() * rare.stages())
    assert [g.start for g in rule(cap=832.0).gates(list(BUSY), 16_000)] == [26, 26]


def test_in_overload_the_memory_is_shared_by_rate() -> None:
    flood = [Flow(10, 10, 4000.0), Flow(10, 20, 2000.0)]
    found = rule().gates(flood, 16_000)
    assert found[0].start == pytest.approx(2 * found[1].start, abs=1)
    held = sum(g.stage * flow.held() for g, flow in zip(found, flood, strict=True))
    assert 0.95 * 16_000 < held < 1.05 * 16_000


# -- in the simulator -----------------------------------------------------------------------------------------------


def fixed() -> WaitBatching:
    """WAIT with the worked vector's thresholds."""
    own = whole_thresholds(BUSY, COST)
    return WaitBatching({k: gate(n, flow.stages()) for k, (n, flow) in enumerate(zip(own, BUSY, strict=True))})


def test_memory_peaks_at_its_bound_and_nobody_is_evicted() -> None:
    found = observe(BUSY, COST, ROOM, fixed, seconds=3.0, warm_up_s=1.0)
    assert found.peak_tokens == BOUND
    assert found.evictions == 0
    assert found.throughput >= 0.99
    exact = observe(BUSY, COST, BOUND, fixed, seconds=3.0, warm_up_s=1.0)
    assert exact == found  # what it never uses, it does not need


def test_first_come_first_served_needs_more_than_the_equilibrium() -> None:
    """At M* itself it evicts all the time; with 30 % more it evicts nobody and answers sooner.

    Throughput takes longer runs to tell apart: benchmarks/wait.py.
    """
    tight = observe(BUSY, COST, 14_097, None, seconds=3.0, warm_up_s=1.0)
    assert tight.evictions > 100 and tight.peak_tokens == 14_097
    roomy = observe(BUSY, COST, int(1.3 * 14_097), None, seconds=3.0, warm_up_s=1.0)
    assert roomy.evictions == 0 and roomy.latency_s < tight.latency_s


def test_the_toy_that_breaks_fcfs() -> None:
    """Prompt 1, two stages, memory 12, four arrivals a step: FCFS does 3 to 3.5 (tests/sim/test_theory.py), WAIT 4."""
    toy = [Flow(1, 1, 4.0)]
    unit = StepCost(1.0, 0.0)
    found = observe(toy, unit, 12, lambda: WaitBatching({0: gate(4, 2)}), seconds=400.0, warm_up_s=20.0)
    assert found.peak_tokens == 12 and found.evictions == 0
    assert found.throughput > 0.9  # Poisson arrivals at exactly the capacity: a queue grows, nothing is lost


def test_learned_thresholds_serve_every_request_of_a_finite_trace() -> None:
    """The preset counts rates by itself, and the last requests, which never gather, end all the same."""
    flows = [Flow(10, 10, 200.0), Flow(10, 80, 200.0)]
    model = LinearStepModel(0.010, per_context_s=1e-6, per_prefill_s=1e-6)
    beliefs = Beliefs(model, 1.0, 1e9)
    trace = traffic(flows, 4.0, seed=1)
    spec = InstanceSpec(Role.MIXED, model, 60_000, 1, 4096, 1 << 16)
    for batching in ("wait", "no-wait", "fcfs"):
        policy = build_policy("wait", beliefs, SLO, types="class", batching=batching, window=2.0)
        result = simulate(trace, ClusterSpec((spec,), 1.0), policy, beliefs, Slo())
        assert (result.requests.finish_s > 0).all(), batching
        assert result.instances.preemptions[0] == 0


def test_the_preset_reviews_its_gates() -> None:
    lengths = Lengths()
    part = LearningWait(rule(), lengths, bin_tokens=10.0, waits=True, patience=3.0)
    assert ids(part.compose([], [job(1, predicted=11.0)], at(0.0)).enter) == [1]  # nothing is known: whatever fits
    queue = [job(k, arrival_s=0.001 * k, predicted=11.0) for k in range(2, 102)]
    part.compose([], queue, at(0.101, capacity=20_000))
    assert set(part.gates) == {1} and part.gates[1].start >= 10
    assert part.gather_s[1] == pytest.approx(part.gates[1].start / part.flows[1].rate_rps)
    assert build_policy("wait", BELIEFS, SLO).engine is not None
