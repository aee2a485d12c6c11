"""Kairos: urgency, step table, subset, and its effect in a small world."""

from __future__ import annotations

from math import inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.events import PrefillDone, RequestArrived
from penstock.core.types import Role, Slo
from penstock.perf.step import LinearStepModel
from penstock.policy.engine import Job, Situation
from penstock.policy.kairos import (
    SlackBatching,
    SlackOrder,
    StepTable,
    Throughput,
    prefill_slack_s,
    subset,
)
from penstock.policy.parts import Beliefs
from penstock.policy.registry import build_policy
from penstock.policy.view import ClusterView
from penstock.report.metrics import summarize
from penstock.sim.cluster import ClusterSpec, InstanceSpec
from penstock.sim.run import simulate
from penstock.workload.trace import Trace
from tests.policy.cluster import load

SLO = Slo(ttft_s=8.0, tpot_s=0.05)
# A step of B decodes over N tokens: 10 ms + N * 1 us. A prompt: 20,000 tokens/s.
STEP = LinearStepModel(0.010, per_context_s=1e-6, per_prefill_s=5e-5)
BELIEFS = Beliefs(STEP, 1000.0, 1e12)


def situation(now_s: float = 0.0, last_step_s: float = 0.0) -> Situation:
    found = Situation(0, Role.PREFILL, 16, 10_000)
    found.now_s = now_s
    found.last_step_s = last_step_s
    return found


def prompt(tokens: int, arrival_s: float = 0.0, request: int = 0) -> Job:
    return Job(request, tokens, SLO, 0, arrival_s)


def decode(request: int, length: int, generated: int, first_s: float = 0.0) -> Job:
    job = Job(request, length - generated, SLO, 0, first_s - 1.0)
    job.first_token_s = first_s
    job.tokens = length
    job.left = 0
    return job


# -- prefill ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("left", "now", "slack"), [(20_000, 0.0, 7.0), (20_000, 6.5, 0.5), (100_000, 0.0, 3.0), (20_000, 8.0, -1.0)]
)
def test_slack_is_what_is_left_when_it_will_be_done(left: int, now: float, slack: float) -> None:
    assert prefill_slack_s(left, 8.0, now, 20_000.0) == pytest.approx(slack)


def order(weigh: str = "weighted", late_last: bool = True) -> SlackOrder:
    return SlackOrder(Throughput(20_000.0, 4), weigh, late_last)


def ranked(part: SlackOrder, jobs: list[Job], now_s: float) -> list[int]:
    return [j.request for j in sorted(jobs, key=lambda j: part.urgency(j, situation(now_s)))]


def test_a_long_prompt_waits_while_it_has_slack() -> None:
    jobs = [prompt(80_000, request=1), prompt(8000, request=2)]  # slack 4 and 7.6 s at time 0
    assert ranked(order(), jobs, 0.0) == [2, 1]
    jobs[1].arrival_s = 3.0
    assert ranked(order(), jobs, 3.9) == [1, 2]  # 0.1 s * 80,000 against 6.7 s * 8,000


def test_the_other_readings() -> None:
    jobs = [prompt(80_000, request=1), prompt(8000, request=2)]
    assert ranked(order("per-token"), jobs, 0.0) == [1, 2]
    assert ranked(order("laxity"), jobs, 0.0) == [1, 2]
    jobs[0].arrival_s = 0.5
    assert ranked(order("arrival"), jobs, 0.6) == [2, 1]


def test_a_lost_prompt_waits_for_those_that_are_not() -> None:
    jobs = [prompt(80_000, request=1), prompt(40_000, request=2), prompt(8000, 5.0, request=3)]
    assert ranked(order(), jobs, 7.0) == [3, 2, 1]
    assert ranked(order(late_last=False), jobs, 7.0) == [1, 2, 3]


def test_what_is_computed_counts() -> None:
    """A prompt set aside with little left has more slack, so a newcomer of its length with less slack goes first."""
    aside, fresh = prompt(80_000, request=1), prompt(80_000, 0.5, request=2)
    assert ranked(order(), [aside, fresh], 1.0) == [1, 2]
    aside.left = 10_000
    assert ranked(order(), [aside, fresh], 1.0) == [2, 1]


def test_pulls_and_recomputed_outputs_go_first() -> None:
    pull, again = prompt(100), prompt(100)
    pull.pull = True
    again.first_token_s = 1.0
    assert order().urgency(pull, situation(2.0)) == order().urgency(again, situation(2.0)) == -inf


def test_throughput_is_measured_while_the_engine_is_busy() -> None:
    view, meter = ClusterView(), Throughput(1000.0, 2)
    assert meter.tokens_per_s(0) == 1000.0
    meter.observe(RequestArrived(1, 400, SLO), view, 10.0)
    meter.observe(RequestArrived(2, 600, SLO), view, 10.5)
    meter.observe(PrefillDone(1, 0, load()), view, 11.0)
    meter.observe(PrefillDone(2, 0, load()), view, 12.0)
    assert meter.tokens_per_s(0) == pytest.approx(1000 / 2.0)  # 1 s each: not 1.5 s for the second
    assert meter.tokens_per_s(1) == 1000.0


# -- decode -----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 700), st.integers(1, 400_000))
@settings(deadline=None)
def test_the_table_is_exact_where_steps_are_linear(requests: int, length: int) -> None:
    table = StepTable(BELIEFS, 100.0)
    assert table.seconds(requests, requests * length) == pytest.approx(0.010 + 1e-6 * requests * length)


def test_measurements_correct_their_cell_only() -> None:
    table = StepTable(BELIEFS, 3.0)
    believed = table.seconds(10, 10 * 5000)
    table.note(10, 10 * 5000, 2.0 * believed)
    assert table.seconds(10, 10 * 5000) == pytest.approx(believed * (3.0 + 2.0) / 4.0)
    assert table.seconds(9, 9 * 4500) == pytest.approx((0.010 + 1e-6 * 9 * 4500) * 1.25)
    assert table.seconds(20, 20 * 5000) == pytest.approx(0.010 + 0.1)


SHORT, LONG = 1000, 30_000  # a step of one takes 11 and 40 ms


@pytest.mark.parametrize(
    ("lead_s", "chosen", "why"),
    [
        (1.0, [1, 2, 3], "all fit: a full step of 42 ms is within the budget"),
        (0.042 + 0.0125, [1, 2], "12.5 ms are enough for the two short ones, 12 ms, and not for 42"),
        (0.042 + 0.0115, [1], "and 11.5 ms for one of them: 1/11 ms is above 3/42 ms"),
        (0.042 + 0.0050, [1, 2, 3], "nobody fits: all run"),
        (0.020, [1, 2, 3], "somebody would be late: all run"),
    ],
)
def test_the_shortest_run_while_the_rest_can_wait(lead_s: float, chosen: list[int], why: str) -> None:
    jobs = [decode(3, LONG, 20), decode(1, SHORT, 20), decode(2, SHORT, 20)]
    now = 20 * 0.05 - lead_s
    assert sorted(j.request for j in subset(jobs, now, StepTable(BELIEFS, 100.0))) == chosen, why


def test_a_reserve_is_kept() -> None:
    jobs = [decode(3, LONG, 20), decode(1, SHORT, 20), decode(2, SHORT, 20)]
    now = 1.0 - (0.042 + 0.0125)
    assert len(subset(jobs, now, StepTable(BELIEFS, 100.0), 0.001)) == 1
    assert len(subset(jobs, now, StepTable(BELIEFS, 100.0), 0.02)) == 3


def test_the_fastest_subset_runs_even_if_all_fit() -> None:
    jobs = [decode(3, LONG, 20), decode(1, SHORT, 20), decode(2, SHORT, 20)]
    assert [j.request for j in subset(jobs, 0.0, StepTable(BELIEFS, 100.0), fastest=True)] == [1, 2]
    assert len(subset(jobs, 0.0, StepTable(BELIEFS, 100.0), 0.95, fastest=True)) == 3


def test_a_subset_of_lower_throughput_does_not_run() -> None:
    """One of two alike: 11 ms for one token against 12 ms for two."""
    jobs = [decode(1, SHORT, 20), decode(2, SHORT, 20)]
    assert len(subset(jobs, 1.0 - (0.012 + 0.0115), StepTable(BELIEFS, 100.0))) == 2


@given(
    st.lists(st.tuples(st.integers(1, 50_000), st.integers(1, 200)), min_size=1, max_size=12),
    st.floats(0.0, 10.0),
    st.booleans(),
)
@settings(deadline=None)
def test_whoever_sits_out_still_keeps_the_schedule(rows: list[tuple[int, int]], now: float, fastest: bool) -> None:
    """After the subset's step a full one ends in time for everybody; the chosen are the shortest."""
    table = StepTable(BELIEFS, 100.0)
    jobs = [decode(i, length + out, out) for i, (length, out) in enumerate(rows)]
    chosen = subset(jobs, now, table, fastest=fastest)
    assert chosen
    left_out = [j for j in jobs if j not in chosen]
    if left_out:
        step_s = table.seconds(len(chosen), sum(j.tokens for j in chosen))
        full_s = table.seconds(len(jobs), sum(j.tokens for j in jobs))
        assert max(j.tokens for j in chosen) <= min(j.tokens for j in left_out)
        assert len(chosen) / step_s > len(jobs) / full_s
        for job in jobs:
            assert now + step_s + full_s <= job.first_token_s + job.generated() * job.tpot_s + 1e-9


def test_steps_are_measured_unless_somebody_joined() -> None:
    table = StepTable(BELIEFS, 0.0)
    part = SlackBatching(table)
    one, two = decode(1, SHORT, 1), decode(2, SHORT, 1)
    part.compose([one], [], situation(0.0))
    part.compose([one, two], [], situation(0.0, 0.5))  # the second joined in that step
    assert table.seconds(1, SHORT) == pytest.approx(0.011)
    part.compose([one, two], [], situation(0.0, 0.024))
    assert table.seconds(2, 2 * SHORT) == pytest.approx(0.024)


# -- in a small world -------------------------------------------------------------------------------------------------


def world(name: str, trace: Trace, **options: float | str):  # type: ignore[no-untyped-def]
    specs = tuple(InstanceSpec(role, STEP, 100_000) for role in (Role.PREFILL, Role.DECODE))
    policy = build_policy(name, BELIEFS, SLO, **options)
    return simulate(trace, ClusterSpec(specs, 1000.0), policy, BELIEFS, SLO)


def long_tail(n: int, rate: float) -> Trace:
    rng = np.random.default_rng(3)
    arrival = np.cumsum(rng.exponential(1 / rate, n))
    lengths = np.where(rng.random(n) < 0.1, 80_000, 3000)
    outputs = np.full(n, 20)
    return Trace(arrival - arrival[0], lengths.astype(np.int64), outputs.astype(np.int64), np.zeros(n, np.int16))


def test_slack_order_meets_more_ttft_targets_than_fcfs() -> None:
    """Ten per cent of the prompts take 4 s each; at 2.1/s the prefill instance cannot keep up."""
    trace = long_tail(200, 2.1)
    fcfs = summarize(world("least-kv", trace), SLO)
    slack = summarize(world("kairos", trace, subset="off"), SLO)
    assert slack.finished == fcfs.finished == 200
    assert slack.ttft_attainment > fcfs.ttft_attainment + 0.15


def test_short_requests_are_faster_and_long_ones_still_in_time() -> None:
    """Two long contexts make a full step of 36 ms. At 50 ms a token they leave room for one of 12 ms between."""
    n = 10
    prompts = np.array([12_000, 12_000] + [200] * (n - 2))
    outputs = np.array([100, 100] + [150] * (n - 2))
    trace = Trace(np.zeros(n), prompts, outputs, np.zeros(n, np.int16))
    runs = [world("kairos", trace, subset=word, order="off") for word in ("off", "fastest")]
    tpot = [(r.requests.finish_s - r.requests.first_token_s) / (outputs - 1) for r in runs]
    assert (tpot[1][2:] < 0.95 * tpot[0][2:]).all()
    assert (tpot[1][:2] > tpot[0][:2]).all()
    assert (tpot[1] <= SLO.tpot_s).all()


def test_an_old_prompt_goes_first_where_that_is_asked_for() -> None:
    """Without the bound a lost long prompt waits until the short ones stop coming."""
    n = 60
    prompts = np.full(n, 18_000)
    prompts[1] = 150_000  # 7.5 s of work, lost by the time that it could begin
    trace = Trace(np.linspace(0.0, 0.9 * (n - 1), n), prompts, np.full(n, 2), np.zeros(n, np.int16))
    waits = [world("kairos", trace, max_age=age).requests.first_token_s[1] - 0.9 for age in (0.0, 12.0)]
    assert waits[1] < 12.0 + 10.0 < waits[0]
