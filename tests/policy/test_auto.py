"""The parts of ``auto``: the waiting room's order, chunks at a pace, tenants, the outlook, and all of it together."""

from __future__ import annotations

from itertools import combinations
from math import inf

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.events import Finished, Load, MigrationDone, PrefillDone
from penstock.core.types import Slo
from penstock.experiment.build import run
from penstock.experiment.setup import BeliefSetup, ClusterSetup, Setup, Target, WorkloadSetup
from penstock.experiment.traffic import slos
from penstock.perf.step import LinearStepModel
from penstock.policy.backlog import Backlog
from penstock.policy.doors import Doors, Lag, on_time
from penstock.policy.margin import Margin
from penstock.policy.outlook import Outlook
from penstock.policy.pace import GRAIN, LEAST, Pace
from penstock.policy.parts import Beliefs
from penstock.policy.tenants import Tenants
from penstock.policy.view import ClusterView, RequestRecord
from penstock.predict.remaining import History, Observed
from penstock.report.metrics import RunMetrics, summarize

LOAD = Load(0, 0, 0, 100, 0.0)


def request(number: int, tokens: int, arrival_s: float = 0.0, slo: Slo | None = None) -> RequestRecord:
    return RequestRecord(number, tokens, slo or Slo(1.0, 0.05), 0, (), arrival_s)


# -- the order --------------------------------------------------------------------------------------------------------


def late(order: tuple[RequestRecord, ...] | list[RequestRecord], rate: float) -> int:
    """How many of them, served one after the other, miss their TTFT."""
    end, count = 0.0, 0
    for record in order:
        end += record.prompt_tokens / rate
        count += end > record.arrival_s + record.slo.ttft_s + 1e-9
    return count


@given(st.lists(st.tuples(st.integers(1, 900), st.floats(0.0, 2.0)), min_size=1, max_size=7))
def test_no_larger_set_could_be_on_time(jobs: list[tuple[int, float]]) -> None:
    """Against every subset in order of deadline, which is the best order of a subset."""
    records = [request(i, tokens, arrival) for i, (tokens, arrival) in enumerate(jobs)]
    rate = 1000.0
    chosen = on_time(records, rate, 0.0)
    by_deadline = sorted(records, key=lambda r: (r.arrival_s + r.slo.ttft_s, r.request))
    best = max(
        size
        for size in range(len(records) + 1)
        if any(late(subset, rate) == 0 for subset in combinations(by_deadline, size))
    )
    assert late(chosen, rate) == 0
    assert len(chosen) == best


def test_the_dearest_is_put_off() -> None:
    short = [request(i, 200) for i in range(4)]
    assert [r.request for r in on_time([request(9, 900), *short], 1000.0, 0.0)] == [0, 1, 2, 3]


def test_the_lag_is_learnt_from_dispatch_to_first_token() -> None:
    lag, view = Lag(deviations=2.0, gain=0.5), ClusterView()
    for i in range(40):
        lag.send(i, float(i), 0.1)
        lag.observe(PrefillDone(i, 0, LOAD), view, i + 0.1 + 0.05)
    assert lag.mean_s == pytest.approx(0.05, rel=1e-6)
    assert lag.safe_s() == pytest.approx(0.05, abs=1e-3)
    lag.send(99, 0.0, 0.1)
    lag.observe(PrefillDone(99, 0, LOAD), view, 0.35)
    assert lag.safe_s() > 0.2  # one surprise widens the margin


class Capacity:
    """Always open, 1,000 tokens/s."""

    def open_rate(self, view: ClusterView, now_s: float) -> float:
        return 1000.0

    def prefill_s(self, tokens: int) -> float:
        return tokens / 1000.0


def test_who_is_late_goes_last_and_a_broken_answer_first() -> None:
    doors, view = Doors(Capacity(), Lag(0.0), patience_s=5.0), ClusterView()
    late, soon, broken = request(1, 100, -3.0), request(2, 900), request(3, 500, -9.0)
    broken.generated = 7
    for record in (late, soon, broken):
        doors.enter(record)
    assert [r.request for r in doors.order(view, 0.0)] == [3, 2]
    doors.leave(broken)
    doors.leave(soon)
    assert [r.request for r in doors.order(view, 0.5)] == [1]
    assert doors.hopeless(view, 2.9) == []
    assert [r.request for r in doors.hopeless(view, 3.1)] == [1]


def test_the_backlog_shrinks_between_first_tokens() -> None:
    backlog, view = Backlog(), ClusterView()
    backlog.send(1, 0, 300, 10.0)
    backlog.send(2, 0, 200, 11.0)
    assert backlog.computed(0, 100.0, 12.0) == 200.0
    assert backlog.computed(0, 100.0, 19.0) == 300.0  # the second has not begun as far as is known
    backlog.observe(PrefillDone(1, 0, LOAD), view, 19.0)
    assert backlog.computed(0, 100.0, 20.5) == 150.0
    backlog.send(2, 1, 200, 20.5)  # placed anew elsewhere
    assert backlog.computed(0, 100.0, 25.0) == 0.0
    backlog.forget(2, 26.0)
    assert backlog.computed(1, 100.0, 27.0) == 0.0


def test_one_outage_does_not_make_everybody_late() -> None:
    lag, view = Lag(deviations=3.0), ClusterView()
    for i in range(200):
        lag.send(i, float(i), 0.1)
        lag.observe(PrefillDone(i, 0, LOAD), view, i + 0.1 + (0.05 if i % 2 else 0.07))
    for i in range(200, 206):
        lag.send(i, 300.0, 0.1)
        lag.observe(PrefillDone(i, 0, LOAD), view, 340.0)
    assert lag.safe_s() < 1.0  # 30 s and more if they counted in full


# -- the pace ---------------------------------------------------------------------------------------------------------


def pace(share: float = 1.0) -> Pace:
    step = LinearStepModel(0.005, 1e-4, 1e-8, 2e-5, 1e-10)
    return Pace(Beliefs(step, 1.0, 1e9, max_batched_tokens=8192), share, Margin(0.0))


@pytest.mark.parametrize("tpot_s", [0.015, 0.03, 0.1])
def test_a_chunk_is_the_largest_that_keeps_the_target(tpot_s: float) -> None:
    p = pace()
    chunk = p.chunk(42, 4096 * 3 + 2048, 0, tpot_s)  # in the middle of the remembered cell
    step = p.beliefs.step
    assert chunk % GRAIN == 0
    assert step.step_s(42, 4096 * 3 + 2048, [chunk], [0]) <= tpot_s
    assert step.step_s(42, 4096 * 3 + 2048, [chunk + GRAIN], [0]) > tpot_s


def test_chunks_without_a_target_and_without_room() -> None:
    p = pace()
    assert p.chunk(0, 0, 0, 0.01) == 8192
    assert p.chunk(50, 1000, 0, inf) == 8192
    assert p.chunk(250, 1000, 0, 0.01) == LEAST  # even the decodes alone take longer: prompts must not starve
    assert pace(0.0).chunk(50, 1000, 0, 0.01) == 8192


def test_the_rate_is_a_chunk_a_step() -> None:
    p = pace()
    chunk = p.chunk(42, 4096 * 3 + 2048, 0, 0.03)
    assert p.rate(42, 4096 * 3 + 2048, 0.03) == pytest.approx(
        chunk / p.beliefs.step.step_s(42, 4096 * 3 + 2048, [chunk], [0])
    )
    assert p.rate(0, 0, 0.03) > p.rate(42, 4096 * 3 + 2048, 0.03)
    assert pace(0.0).rate(42, 0, 0.03) == pytest.approx(pace().rate(42, 0, inf))


def margin_after(ratios: list[float], misses: float = 0.02) -> float:
    """The margin of a target of 100 ms after requests that took so many times their pace, one after the other."""
    margin, view = Margin(misses), ClusterView()
    for i, ratio in enumerate(ratios):
        margin.send(i, 0.1)
        margin.observe(PrefillDone(i, 0, LOAD), view, 0.0)
        margin.observe(Finished(i, 0, 11, LOAD), view, ratio * margin.of(0.1))
    assert margin.of(0.2) == 1.0  # another target learns by itself
    return margin.of(0.1)


def test_a_margin_is_what_all_but_a_few_need() -> None:
    assert margin_after([0.9] * 500) == 1.0
    assert margin_after([1.25] * 500) == pytest.approx(0.8, rel=0.03)
    slow = np.random.default_rng(1).normal(1.0, 0.1, 20_000).tolist()
    assert margin_after(slow) == pytest.approx(1.0 / (1.0 + 2.054 * 0.1), rel=0.04)  # the quantile of 98 %
    assert margin_after([9.0] * 500, misses=0.0) == 1.0


def test_late_news_counts_with_the_margin_of_its_time() -> None:
    margin, view = Margin(0.02), ClusterView()
    for i in range(300):  # all began at a margin of 1, and all took a quarter longer
        margin.send(i, 0.1)
        margin.observe(PrefillDone(i, 0, LOAD), view, 0.0)
    for i in range(300):
        margin.observe(Finished(i, 0, 11, LOAD), view, 1.25)
    assert margin.of(0.1) == pytest.approx(0.8, rel=0.03)


# -- tenants and outlook ----------------------------------------------------------------------------------------------


def test_tenants_follow_their_requests() -> None:
    tenants, view = Tenants(), ClusterView()
    assert tenants.tightest_s(0) == inf
    tenants.move_in(1, 0, 0.02)
    tenants.move_in(2, 0, 0.1)
    assert tenants.tightest_s(0) == 0.02
    tenants.observe(MigrationDone(1, 0, 3, LOAD, LOAD), view, 0.0)
    assert (tenants.tightest_s(0), tenants.tightest_s(3)) == (0.1, 0.02)
    tenants.forget(2, 0.0)
    tenants.forget(1, 0.0)
    assert (tenants.tightest_s(0), tenants.tightest_s(3)) == (inf, inf)


def test_the_outlook_of_a_new_request_is_its_survival() -> None:
    history = History(100)
    for length in [10] * 50 + [90] * 50:
        history.finished(length)
    outlook = Outlook(Observed(history), history, 100.0, 2)
    assert outlook.of(200.0).tolist() == [200.0, 250.0 * 0.5, 0.0]
    own = outlook.of(200.0)
    assert outlook.of_instances(np.array([1]), 3).tolist() == [[0.0], [0.0], [0.0]]
    outlook.send(1, 1, own)
    assert outlook.of_instances(np.array([0, 1]), 3)[:, 1].tolist() == own.tolist()
    assert outlook.of_instances(np.array([0]), 3).sum() == 0.0


# -- all of it --------------------------------------------------------------------------------------------------------


def played(
    policy: str, rate: float, workload: str = "azure-code", error: float = 1.0, **options: float | str
) -> RunMetrics:
    setup = Setup(
        policy=policy,
        options=options,
        workload=WorkloadSetup(synthetic=workload, requests=700, rate_rps=rate),
        cluster=ClusterSetup(model="llama-3.1-8b", hardware="a100-80g", prefill=3, decode=1),
        slo=Target(1.0, 0.04),
        belief=BeliefSetup(error=error),
    )
    result = run(setup, sample=False)
    return summarize(result, slos(setup, result.trace))


def test_under_overload_most_are_on_time_and_nobody_is_forgotten() -> None:
    mine, plain, sooner = played("auto", 40.0), played("least-kv", 40.0), played("auto", 40.0, sort=0)
    assert mine.unfinished == 0 and mine.finished + mine.rejected == 700
    assert mine.attainment > 0.75
    assert mine.attainment > plain.attainment + 0.3
    assert mine.attainment > sooner.attainment + 0.1


def test_at_low_load_nobody_waits_or_is_refused() -> None:
    mine = played("auto", 4.0)
    assert mine.attainment > 0.97 and mine.rejected == 0


def test_decodes_keep_their_pace_beside_prompts() -> None:
    assert played("auto", 20.0).tpot_attainment > 0.97
    assert played("auto", 20.0, pace=0).tpot_attainment < played("auto", 20.0).tpot_attainment


def test_decodes_move_only_where_room_gets_scarce() -> None:
    assert played("auto", 20.0).migrations == 0
    assert (played("auto", 20.0, pressure=0).migrations or 0) > 0


def test_steps_that_are_slower_than_believed_are_found_out() -> None:
    blind, learning = played("auto", 30.0, error=0.8, misses=0), played("auto", 30.0, error=0.8)
    assert blind.tpot_attainment < 0.4
    assert learning.tpot_attainment > 0.85
