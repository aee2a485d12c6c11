"""Queues that know lengths: urgency, eviction, the guard, and their effect on one replica."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.events import Aborted, DecodeStarted, Finished, PrefillDone, RequestArrived
from penstock.core.types import Role, Slo
from penstock.perf.step import LinearStepModel
from penstock.policy.engine import DECODING, QUEUED, Job, QueueOrder, Situation
from penstock.policy.length_order import Guard, LengthKit, Lengths, Shortest, ShortestRemaining
from penstock.policy.options import OptionValue
from penstock.policy.parts import Beliefs
from penstock.policy.registry import PRESETS, build_policy
from penstock.policy.view import ClusterView
from penstock.predict.by_prompt import ENOUGH, PromptHistory
from penstock.predict.remaining import PRIOR_TOKENS
from penstock.predict.simulated import LengthOracle
from penstock.sim.cluster import ClusterSpec, InstanceSpec
from penstock.sim.result import SimResult
from penstock.sim.run import simulate
from penstock.workload.trace import Trace
from tests.policy.cluster import load

SLO = Slo()


def situation(role: Role = Role.MIXED, now_s: float = 0.0) -> Situation:
    found = Situation(0, role, 16, 1000)
    found.now_s = now_s
    return found


def job(request: int, predicted: float = -1.0, generated: int = 0, prompt: int = 100, arrival_s: float = 0.0) -> Job:
    found = Job(request, prompt, SLO, 0, arrival_s)
    found.predicted_output = predicted
    found.tokens += generated
    if generated:
        found.left, found.state = 0, DECODING
    return found


# -- lengths ----------------------------------------------------------------------------------------------------------


def test_history_is_kept_by_prompt_length() -> None:
    history = PromptHistory()
    assert history.remaining(100, 0) == PRIOR_TOKENS
    for _ in range(ENOUGH):
        history.finished(100, 10)
        history.finished(5000, 300)
    assert history.remaining(90, 0) == 10.0  # 64 to 127 tokens
    assert history.remaining(8000, 100) == 200.0  # 4,096 to 8,191
    assert history.remaining(200, 0) == pytest.approx(155.0)  # nothing there yet: all


def test_the_world_s_prediction_comes_first_then_history() -> None:
    lengths, view = Lengths(), ClusterView()
    assert lengths.total(job(1, predicted=40.0)) == 40.0
    assert lengths.remaining(job(1, 40.0, generated=30)) == 10.0
    assert lengths.remaining(job(1, 40.0, generated=50)) == 0.0
    for number in range(ENOUGH):
        lengths.observe(RequestArrived(number, 100, SLO), view, 0.0)
        lengths.observe(Finished(number, 0, 60, load()), view, 0.0)
    lengths.observe(RequestArrived(99, 100, SLO), view, 0.0)
    for number in range(200, 200 + 5 * ENOUGH):
        lengths.observe(RequestArrived(number, 100, SLO), view, 0.0)
        lengths.observe(Finished(number, 0, 6, load()), view, 0.0)
    assert lengths.total(job(99)) == 60.0  # what was expected on arrival
    assert lengths.remaining(job(99, generated=20)) == 40.0
    lengths.observe(Aborted(99), view, 0.0)
    assert lengths.total(job(99)) == pytest.approx((60 + 5 * 6) / 6)


# -- orders -----------------------------------------------------------------------------------------------------------


def test_urgency_is_what_is_left_to_do() -> None:
    order = Shortest(Lengths())
    assert order.urgency(job(1, 40.0), situation()) == 40.0
    assert order.urgency(job(1, 40.0, generated=30), situation(Role.DECODE)) == 10.0
    assert order.urgency(job(1, 40.0, prompt=700), situation(Role.PREFILL)) == 700.0
    assert Shortest(Lengths(), 0.1).urgency(job(1, 40.0, prompt=700), situation()) == 110.0
    assert not order.evicts()


@pytest.mark.parametrize(
    ("c", "generated", "evicts"),
    [(0.8, 79, True), (0.8, 80, False), (1.0, 99, True), (1.0, 100, False), (0.0, 0, False), (0.2, 19, True)],
)
def test_a_request_is_safe_from_the_share_c_of_its_prediction_on(c: float, generated: int, evicts: bool) -> None:
    order = ShortestRemaining(Lengths(), c)
    assert order.evicts() == (c > 0.0)
    assert order.may_evict(job(1, 100.0, generated), job(2, 5.0), situation()) == evicts


def options(**changed: OptionValue) -> dict[str, OptionValue]:
    return {o.name: o.default for o in PRESETS["trail"].options} | changed


def test_every_engine_has_its_own_guard() -> None:
    lengths = Lengths()
    kit = LengthKit(lengths, options(max_passes=3.0))
    first, second = kit.parts(0, Role.MIXED).order, kit.parts(1, Role.MIXED).order
    assert isinstance(first, Guard)
    assert first is not second
    assert first.evicts()
    assert type(LengthKit(lengths, options()).parts(0, Role.MIXED).order) is ShortestRemaining
    assert type(LengthKit(lengths, options(order="sjf")).parts(0, Role.MIXED).order) is Shortest


# -- the guard --------------------------------------------------------------------------------------------------------


def test_age_promotes_and_protects() -> None:
    guard = Guard(ShortestRemaining(Lengths(), 1.0), 10.0, 0)
    old, older, fresh = job(1, 500.0), job(2, 900.0, arrival_s=-1.0), job(3, 5.0, arrival_s=9.0)
    ranks = [guard.urgency(j, situation(now_s=10.5)) for j in (older, old, fresh)]
    assert ranks == sorted(ranks)
    assert guard.urgency(old, situation(now_s=9.5)) > guard.urgency(fresh, situation(now_s=9.5))
    running = job(1, 500.0, generated=10)
    assert guard.may_evict(running, fresh, situation(now_s=9.5))
    assert not guard.may_evict(running, fresh, situation(now_s=10.5))


def test_passes_promote_and_protect() -> None:
    lengths, view = Lengths(), ClusterView()
    guard = Guard(ShortestRemaining(lengths, 1.0), 0.0, 2)
    lengths.guards[0] = guard
    early, long = job(9, 1.0, arrival_s=-1.0), job(1, 500.0)
    later = [job(k, 5.0, arrival_s=float(k)) for k in (2, 3, 4)]
    for each in (early, long, *later):
        guard.urgency(each, situation())
    lengths.observe(PrefillDone(9, 0, load()), view, 5.0)  # came before it: not overtaken
    lengths.observe(PrefillDone(2, 1, load()), view, 5.0)  # on another engine
    lengths.observe(DecodeStarted(2, 0, load()), view, 5.0)
    assert guard.urgency(long, situation()) > guard.urgency(later[1], situation())
    lengths.observe(PrefillDone(3, 0, load()), view, 5.0)
    assert guard.urgency(long, situation()) < guard.urgency(later[2], situation())
    lengths.observe(PrefillDone(1, 0, load()), view, 6.0)
    assert not guard.may_evict(job(1, 500.0, generated=1), later[2], situation())
    lengths.observe(Finished(1, 0, 500, load()), view, 9.0)
    assert guard.may_evict(job(1, 500.0, generated=1), later[2], situation())


class Server:
    """One server that takes a request at a time, whole, in the order's turn."""

    def __init__(self, order: QueueOrder, jobs: list[Job], service_s: list[float]) -> None:
        self.started: list[int] = []
        self.start_s: dict[int, float] = {}
        waiting: list[Job] = []
        coming = sorted(jobs, key=lambda j: j.arrival_s)
        now = 0.0
        while coming or waiting:
            if not waiting:
                now = max(now, coming[0].arrival_s)
            while coming and coming[0].arrival_s <= now:
                waiting.append(coming.pop(0))
            here = situation(now_s=now)
            chosen = min(waiting, key=lambda j: order.urgency(j, here))
            waiting.remove(chosen)
            self.started.append(chosen.request)
            self.start_s[chosen.request] = now
            if isinstance(order, Guard):
                order.started(chosen.request)
            now += service_s[chosen.request]


JOBS = st.lists(st.tuples(st.floats(0.0, 3.0), st.integers(1, 100), st.floats(0.01, 0.5)), min_size=2, max_size=40)


@given(JOBS, st.integers(1, 6))
@settings(deadline=None)
def test_nobody_is_overtaken_more_often_than_allowed(rows: list[tuple[float, int, float]], most: int) -> None:
    """``most`` times, and once more for each promoted one that is younger and was promoted first: there is none."""
    jobs = [job(i, float(length), arrival_s=at) for i, (at, length, _) in enumerate(rows)]
    server = Server(Guard(Shortest(Lengths()), 0.0, most), jobs, [s for _, _, s in rows])
    for n, request in enumerate(server.started):
        overtook = [r for r in server.started[:n] if jobs[r].arrival_s > jobs[request].arrival_s]
        waited = [r for r in overtook if jobs[request].arrival_s <= server.start_s[r]]
        assert len(waited) <= most


@given(JOBS, st.floats(0.1, 3.0))
@settings(deadline=None)
def test_whoever_is_too_old_goes_in_order_of_arrival(rows: list[tuple[float, int, float]], age_s: float) -> None:
    jobs = [job(i, float(length), arrival_s=at) for i, (at, length, _) in enumerate(rows)]
    server = Server(Guard(Shortest(Lengths()), age_s, 0), jobs, [s for _, _, s in rows])
    for n, request in enumerate(server.started):
        now = server.start_s[request]
        left = [jobs[r] for r in server.started[n:]]
        old = [j for j in left if now - j.arrival_s > age_s]
        if old:
            assert jobs[request].arrival_s == min(j.arrival_s for j in old)


def test_without_the_guard_somebody_starves() -> None:
    """Short ones keep coming: the long one is last; overtaken twice at most with the guard."""
    jobs = [job(0, 100.0), *(job(k, 1.0, arrival_s=0.05 * (k - 1)) for k in range(1, 12))]
    service = [0.1] * 12
    assert Server(Shortest(Lengths()), jobs, service).started[-1] == 0
    assert Server(Guard(Shortest(Lengths()), 0.0, 2), jobs, service).started.index(0) <= 3


# -- on one replica ---------------------------------------------------------------------------------------------------

STEP = LinearStepModel(0.010, per_decode_s=1e-4, per_prefill_s=1e-4)
BELIEFS = Beliefs(STEP, 1000.0, 1e12)


def run(name: str, oracle: bool = True, blocks: int = 1000, **changed: OptionValue) -> tuple[Trace, SimResult]:
    """A batch of at most 4, 100 requests that come at about 1.2 times the rate at which it can serve them."""
    rng = np.random.default_rng(5)
    outputs = np.exp(rng.normal(3.3, 1.0, 100)).astype(np.int64) + 1
    trace = Trace(np.cumsum(rng.exponential(0.10, 100)), rng.integers(20, 80, 100), outputs, np.zeros(100, np.int16))
    specs = (InstanceSpec(Role.MIXED, STEP, blocks, max_num_seqs=4),)
    policy = build_policy(name, BELIEFS, SLO, **changed)
    guess = LengthOracle() if oracle else None
    return trace, simulate(trace, ClusterSpec(specs, 1000.0), policy, BELIEFS, SLO, lengths=guess)


def mean_latency(found: tuple[Trace, SimResult]) -> float:
    trace, result = found
    assert np.isfinite(result.requests.finish_s).all()
    return float((result.requests.finish_s - trace.arrival_s).mean())


def test_sjf_has_a_lower_mean_latency_than_fcfs_and_trail_a_lower_one_still() -> None:
    fcfs, sjf, trail = (mean_latency(run(name)) for name in ("mixed", "sjf", "trail"))
    assert sjf < 0.8 * fcfs
    assert trail < sjf


def test_a_smaller_c_evicts_less_and_computes_less_again() -> None:
    found = [run("trail", c=c)[1] for c in (0.0, 0.5, 0.8, 1.0)]
    evictions = [int(r.requests.preemptions.sum()) for r in found]
    computed = [int(r.instances.prefill_tokens.sum()) for r in found]
    assert evictions[0] == 0 < evictions[1]
    assert all(a <= b for a, b in pairwise(evictions))
    assert all(a <= b for a, b in pairwise(computed))
    assert computed[0] < computed[3]


def test_the_guard_bounds_the_longest_wait() -> None:
    trace, free = run("sjf")
    guarded = run("sjf", max_passes=5.0)[1]
    longest = [float((r.requests.first_token_s - trace.arrival_s).max()) for r in (free, guarded)]
    assert longest[1] < longest[0]


def test_orders_combine_with_pools_and_without_predictions() -> None:
    n = 60
    rng = np.random.default_rng(7)
    prompts = np.where(rng.random(n) < 0.5, 200, 8000)  # about 0.4 s each: the prefill instance is full
    trace = Trace(np.cumsum(rng.exponential(0.35, n)), prompts, np.full(n, 10), np.zeros(n, np.int16))
    specs = tuple(InstanceSpec(role, STEP, 20_000) for role in (Role.PREFILL, Role.DECODE))

    def ttft(order: str) -> float:
        policy = build_policy("least-kv", BELIEFS, SLO, order=order)
        r = simulate(trace, ClusterSpec(specs, 1000.0), policy, BELIEFS, SLO)
        assert np.isfinite(r.requests.finish_s).all()
        return float((r.requests.first_token_s - trace.arrival_s).mean())

    assert ttft("sjf") < 0.9 * ttft("fcfs")
    assert build_policy("least-kv", BELIEFS, SLO).engine is None


def test_waiting_jobs_only_are_overtaken() -> None:
    """A running decode that is asked about (it might be evicted) does not count as waiting."""
    guard = Guard(Shortest(Lengths()), 0.0, 1)
    guard.urgency(job(1, 50.0, generated=3), situation())
    waiting = job(2, 5.0, arrival_s=1.0)
    assert waiting.state == QUEUED
    guard.urgency(waiting, situation())
    guard.started(2)
    assert not guard.protects(job(1), 0.0)
