"""Deadlines of tokens: how late the latest one was, and what the scorer makes of it."""

from __future__ import annotations

from math import inf

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.types import Slo
from penstock.policy.parts import Beliefs
from penstock.policy.registry import build_policy
from penstock.report.metrics import Verdicts, summarize
from penstock.sim.cluster import Scenario
from penstock.sim.result import SimResult
from penstock.sim.run import simulate
from penstock.sim.seq import Pace
from tests.report.factory import make_result
from tests.sim.support import Case, cases

LEAPS = st.tuples(st.integers(1, 30), st.floats(0.001, 0.1), st.floats(0, 0.01), st.floats(0, 1), st.integers(0, 3))


@given(st.lists(LEAPS), st.floats(0, 0.2))
def test_the_ends_of_leaps_are_enough(leaps: list[tuple[int, float, float, float, int]], tpot_s: float) -> None:
    pace, due, times = Pace(0.7, tpot_s, 5), 0.7, [0.3]
    pace.emit(0, 1, 0.3, 0.0, 0.0)
    now = 0.3
    for steps, first, rise, pause, again in leaps:
        begin = now + pause
        before = max(len(times) - again, 0)  # after a restart, some tokens come a second time
        for j in range(1, steps + 1):
            now = begin + j * first + rise * j * (j - 1) / 2
            if before + j - 1 >= len(times):
                times.append(now)
        pace.emit(before, steps, begin, first, rise)
    assert pace.sent == len(times)
    late = [t - due - i * tpot_s for i, t in enumerate(times) if i > 0]
    assert pace.late_s == pytest.approx(max(late, default=-inf), abs=1e-9)


def test_nothing_is_late_without_targets() -> None:
    for due, tpot in ((inf, 0.01), (1.0, inf)):
        pace = Pace(due, tpot, 1)
        pace.emit(0, 9, 5.0, 1.0, 0.1)
        assert pace.late_s == -inf


def judged(times_s: list[float], slo: Slo) -> SimResult:
    """One finished request that arrived at 0 and whose tokens came at these times."""
    pace = Pace(slo.ttft_s, slo.tpot_s, 10)
    for i, t in enumerate(times_s):
        pace.emit(i, 1, t, 0.0, 0.0)
    result = make_result(1, classes=("chat",), reject=0.0, unfinished=0.0)
    result.trace.arrival_s[:] = 0.0
    r = result.requests
    r.first_token_s[:], r.finish_s[:], r.emitted[:] = times_s[0], times_s[-1], len(times_s)
    object.__setattr__(r, "lateness_s", np.array([pace.late_s]))
    return result


def test_early_tokens_make_slack() -> None:
    slo = Slo(1.0, 0.1)
    # First token 0.8 s early: the rest may be slower than TPOT in the mean, up to their deadlines.
    result = judged([0.2, 0.5, 0.8, 1.1], slo)
    verdict = Verdicts(result, slo)
    assert verdict.tpot_s[0] == pytest.approx(0.3)
    assert verdict.met.all()
    assert verdict.late_s is not None and verdict.late_s[0] == pytest.approx(1.1 - 1.3)
    assert summarize(result, slo).slo_form == "deadline"
    # By the mean form the same request misses its TPOT.
    object.__setattr__(result.requests, "lateness_s", None)
    assert not Verdicts(result, slo).met.any()


def test_one_late_token_is_not_forgiven() -> None:
    slo = Slo(1.0, 0.1)
    # The second token stalls until 1.2 s (due 1.1), then the request recovers: on time in the mean and at the end.
    verdict = Verdicts(judged([0.9, 1.2, 1.21, 1.22], slo), slo)
    assert verdict.ttft_met.all() and not verdict.tpot_met.any() and not verdict.met.any()
    assert verdict.late_s is not None and verdict.late_s[0] == pytest.approx(0.1)
    metrics = summarize(judged([0.9, 1.2, 1.21, 1.22], slo), slo)
    assert metrics.misses.tpot == 1 and metrics.misses.ttft == 0
    assert metrics.lateness_s is not None and metrics.lateness_s.max == pytest.approx(0.1)


def test_a_late_first_token_is_a_miss_of_ttft() -> None:
    slo = Slo(1.0, 0.5)
    verdict = Verdicts(judged([1.1, 1.2], slo), slo)
    assert not verdict.ttft_met.any() and verdict.tpot_met.all() and not verdict.met.any()
    assert Verdicts(judged([0.9], slo), slo).met.all()


@given(cases())
def test_watching_changes_nothing(case: Case) -> None:
    beliefs = Beliefs(case.cluster.instances[0].step_model, case.cluster.kv_bytes_per_token, 1e9)
    name = "mixed" if case.mixed else "least-kv"
    runs = []
    for deadlines in (False, True):
        scenario = Scenario(seed=1, deadlines=deadlines)
        policy = build_policy(name, beliefs, Slo(0.2, 0.02))
        runs.append(simulate(case.trace, case.cluster, policy, beliefs, Slo(0.2, 0.02), scenario))
    plain, watched = runs
    assert plain.requests.lateness_s is None
    assert plain.events == watched.events
    assert plain.requests.finish_s.tobytes() == watched.requests.finish_s.tobytes()
