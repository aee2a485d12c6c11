"""Nested WAIT: segments, entrances, and memory within its bound while nobody's length is known."""

from __future__ import annotations

from math import inf

import pytest

from penstock.core.types import Role, Slo
from penstock.perf.step import LinearStepModel
from penstock.plan.fluid import StepCost
from penstock.plan.fluid_check import observe, traffic
from penstock.plan.nested import Segments, bound, whole_thresholds
from penstock.policy.options import OptionValue
from penstock.policy.parts import Beliefs
from penstock.policy.registry import build_policy
from penstock.policy.wait_nested import NestedWaitBatching, segments_of
from penstock.policy.wait_traffic import Gate, gate
from penstock.sim.cluster import ClusterSpec, InstanceSpec
from penstock.sim.run import simulate
from tests.policy.cluster import SLO
from tests.policy.test_wait import at, ids, job

SLOW = StepCost(0.100, 1e-5)
TWO = Segments(10, (10.0, 20.0), (60.0, 60.0))


def three(waits: bool = True, patience: float = inf) -> NestedWaitBatching:
    """Stages 0-2, 3-5 and 6 on, with thresholds 3, 2 and 1."""
    return NestedWaitBatching([2, 5, 8], [gate(3, 3), gate(2, 3), gate(1, 3)], waits, patience)


def test_the_longest_run_of_gathered_segments_takes_part() -> None:
    decodes = [job(1, 1), job(2, 3), job(3, 3), job(4, 3), job(5, 4), job(6, 7)]
    waiting = [job(7), job(8), job(9), job(10)]
    chosen = three().compose(decodes, waiting, at(0.0))
    assert ids(chosen.run) == [1, 2, 3, 5]  # two of stage 3; segment 3 has nobody at its entrance
    assert ids(chosen.enter) == [7, 8, 9]
    deeper = three().compose([*decodes, job(11, 6)], waiting, at(0.0))
    assert ids(deeper.run) == [1, 2, 3, 5, 6, 11]


def test_a_gap_stops_the_run_and_an_empty_front_rests() -> None:
    decodes = [job(1, 3), job(2, 6)]  # segment 2 lacks one at its entrance, so segment 3 does not matter
    chosen = three().compose(decodes, [job(3), job(4), job(5)], at(0.0))
    assert ids(chosen.run) == [] and ids(chosen.enter) == [3, 4, 5]
    rests = three().compose(decodes, [job(3)], at(0.0))
    assert ids(rests.run) == [] and ids(rests.enter) == [] and rests.rest_s == inf
    eager = three(waits=False).compose(decodes, [job(3)], at(0.0))
    assert ids(eager.run) == [1, 2] and ids(eager.enter) == [3]


def test_the_wait_ends_when_nothing_has_come_for_long() -> None:
    part = three(patience=2.0)
    part.gather_s, part.latest_s = 1.0, 5.0
    assert part.compose([job(1, 6)], [], at(6.0)).rest_s == pytest.approx(1.0)
    assert ids(part.compose([job(1, 6)], [], at(7.0)).run) == [1]


def test_limits_count_whole_segments() -> None:
    part = NestedWaitBatching([2, 5], [Gate(0, inf, 2), Gate(0, inf, 1)])
    chosen = part.compose([job(1, 3), job(2, 4), job(3, 1)], [job(4), job(5)], at(0.0))
    assert ids(chosen.run) == [1, 3] and ids(chosen.enter) == [4]
    assert chosen.steps == 2  # request 3 leaves its segment after that


def test_segments_from_finished_lengths() -> None:
    """Output lengths count the first token; parts in which nothing ends join the next."""
    found = segments_of([1, 2, 5, 21, 41], 4, prompt=10.0, rate_rps=5.0)
    assert found.ends == (10.0, 20.0, 40.0)
    assert found.rates == pytest.approx((3.0, 1.0, 1.0))
    assert segments_of([7, 7], 3, 10.0, 2.0) == Segments(10.0, (6.0,), (2.0,))


def part_of(own: tuple[int, ...]) -> NestedWaitBatching:
    return NestedWaitBatching([10, 20], [gate(n, d) for n, d in zip(own, TWO.stages(), strict=True)])


def test_the_bound_holds_and_throughput_comes_up_with_the_horizon() -> None:
    """Delta is 0.2, so that of these 4 + 4 runs 1.6 could overflow; the bound is loose, and none does."""
    own = whole_thresholds(TWO, SLOW)
    shares = []
    for seconds in (20.0, 60.0):
        need = int(bound(TWO, SLOW, own, seconds, 0.2).memory_tokens)
        runs = [observe(TWO.flows(), SLOW, need, lambda: part_of(own), seconds, seed) for seed in range(4)]
        assert all(run.evictions == 0 and run.peak_tokens <= need for run in runs)
        shares.append(sum(run.throughput for run in runs) / 4)
    assert shares[0] < shares[1] and shares[1] > 0.9


def test_the_preset_learns_and_serves_every_request() -> None:
    model = LinearStepModel(0.010, per_context_s=1e-6, per_prefill_s=1e-6)
    beliefs = Beliefs(model, 1.0, 1e9)
    flows = Segments(10, (10.0, 80.0), (200.0, 200.0)).flows()
    trace = traffic(flows, 4.0, seed=1)
    spec = InstanceSpec(Role.MIXED, model, 60_000, 1, 4096, 1 << 16)
    tried: list[dict[str, OptionValue]] = [{}, {"cap": 400.0}, {"batching": "no-wait"}, {"batching": "fcfs"}]
    for options in tried:
        policy = build_policy("nested-wait", beliefs, SLO, window=2.0, **options)
        result = simulate(trace, ClusterSpec((spec,), 1.0), policy, beliefs, Slo())
        assert (result.requests.finish_s > 0).all(), options
