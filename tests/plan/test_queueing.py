"""Queues against their closed forms, against simulated waits, and against each other."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.errors import PenstockError
from penstock.plan.queueing import KINDS, PrefillQueue, check_percentile, erlang_c
from penstock.workload.trace import F64

S = 6144 / 28_300
"""Seconds of a prompt in the worked example of arXiv 2603.04716."""
BUDGET_S = 1.9


def sojourns(service: F64, rate_rps: float, seed: int) -> F64:
    """Sojourn times of a single server with Poisson arrivals (Lindley's recursion, unrolled)."""
    gaps = np.random.default_rng(seed).exponential(1 / rate_rps, len(service))
    walk = np.concatenate([[0.0], np.cumsum(service[:-1] - gaps[1:])])
    return walk - np.minimum.accumulate(walk) + service


@pytest.mark.parametrize(("percentile", "tokens_per_s"), [(None, 25_066), (90, 20_854), (99, 13_408)])
def test_published_prefill_throughput(percentile: float | None, tokens_per_s: float) -> None:
    queue = PrefillQueue("mm1", np.array([S]))
    assert queue.highest_rps(1, BUDGET_S, percentile) * 6144 == pytest.approx(tokens_per_s, abs=0.7)


def test_published_prefill_throughput_of_md1() -> None:
    assert PrefillQueue("md1", np.array([S])).highest_rps(1, BUDGET_S) * 6144 == pytest.approx(26_585, abs=0.7)


@pytest.mark.parametrize(("tpm", "mm1_s", "md1_s"), [(4.20e6, 1.01, 0.66), (4.76e6, 1.68, 1.00), (4.93e6, 2.14, 1.23)])
def test_published_cross_check_of_ttft(tpm: float, mm1_s: float, md1_s: float) -> None:
    rate = tpm / 60 / 6656 / 3
    assert PrefillQueue("mm1", np.array([S])).ttft_s(rate, 1) + 0.1 == pytest.approx(mm1_s, abs=0.006)
    assert PrefillQueue("md1", np.array([S])).ttft_s(rate, 1) + 0.1 == pytest.approx(md1_s, abs=0.006)


def test_queues_at_the_planned_rate_meet_the_target_and_equal_prompts_beat_it() -> None:
    """Simulated M/M/1 has a mean within 5 % of the target; M/D/1 at the same rate is well below (conservative)."""
    n = 3_000_000
    rate = PrefillQueue("mm1", np.array([S])).highest_rps(1, BUDGET_S)
    exponential = np.random.default_rng(5).exponential(S, n)
    assert sojourns(exponential, rate, 6).mean() == pytest.approx(BUDGET_S, rel=0.05)
    assert sojourns(np.full(n, S), rate, 6).mean() < 0.7 * BUDGET_S


@pytest.mark.parametrize("percentile", [50, 90, 99])
@pytest.mark.parametrize("load", [0.3, 0.8, 0.95])
def test_the_grid_agrees_with_the_exponential_sojourn(load: float, percentile: float) -> None:
    """M/M/1 has a closed form for its percentile; the transform, which all other queues use, finds the same."""
    queue = PrefillQueue("mm1", np.array([S]))
    at = queue.ttft_s(load / S, 1, percentile)
    assert queue._share_within(at, load / S, 1) == pytest.approx(percentile / 100, abs=2e-4)


@pytest.mark.parametrize("kind", ["md1", "mg1"])
@pytest.mark.parametrize("percentile", [50, 90, 99])
def test_percentiles_agree_with_simulated_sojourns(kind: str, percentile: float) -> None:
    rng = np.random.default_rng(1)
    sample = np.sort(rng.choice([0.02, 0.1, 0.6], 300, p=[0.5, 0.4, 0.1]))
    service = np.full(1_000_000, sample.mean()) if kind == "md1" else rng.choice(sample, 1_000_000)
    rate = 0.7 / sample.mean()
    simulated = np.quantile(sojourns(service, rate, 2), percentile / 100)
    queue = PrefillQueue(kind, sample)
    assert queue.ttft_s(rate, 1, percentile) == pytest.approx(simulated, rel=0.03)
    assert queue.ttft_s(rate, 1) == pytest.approx(sojourns(service, rate, 2).mean(), rel=0.03)


def test_erlang_c() -> None:
    """Published values: C(1, a) = a; C(2, 1) = 1/3; 5 servers at 4 Erlangs 0.5541."""
    assert erlang_c(1, 0.6) == pytest.approx(0.6)
    assert erlang_c(2, 1.0) == pytest.approx(1 / 3)
    assert erlang_c(5, 4.0) == pytest.approx(0.5541, abs=1e-4)


def test_one_pooled_server_is_a_queue_of_its_own_and_pooling_helps() -> None:
    sample = np.array([0.1, 0.2, 0.9])
    own, pooled = PrefillQueue("mg1", sample), PrefillQueue("pooled", sample)
    assert pooled.highest_rps(1, 1.5, 90) == pytest.approx(own.highest_rps(1, 1.5, 90))
    for percentile in (None, 90):
        assert pooled.highest_rps(4, 1.5, percentile) > 1.05 * own.highest_rps(4, 1.5, percentile)


def test_pooled_exponential_service_is_an_mmk_queue() -> None:
    """M/M/3 at 80 %: mean wait C / (3 mu - lambda). The sample stands for an exponential distribution."""
    ranks = (np.arange(20_000) + 0.5) / 20_000
    queue = PrefillQueue("pooled", -np.log1p(-ranks))
    wait = queue.ttft_s(2.4, 3) - queue.alone_s
    assert wait == pytest.approx(erlang_c(3, 2.4) / (3 - 2.4), rel=0.01)


def test_bursts_cost_and_shared_steps_pay() -> None:
    sample = np.array([0.1, 0.2, 0.9])
    plain = PrefillQueue("mg1", sample)
    assert PrefillQueue("mg1", sample, arrival_cv=3.0).highest_rps(1, 1.5) < plain.highest_rps(1, 1.5)
    shared = PrefillQueue("mg1", sample, shared_s=sample / 2, step_s=1.0)
    assert shared.highest_rps(1, 5.0) > 1.5 * plain.highest_rps(1, 5.0)
    assert shared.ttft_s(1e-9, 1) == pytest.approx(plain.ttft_s(1e-9, 1))


def test_no_target_at_all_leaves_only_stability_and_a_target_below_the_floor_nothing() -> None:
    queue = PrefillQueue("pooled", np.array([0.25]))
    assert queue.highest_rps(3, math.inf) == pytest.approx(12)
    assert queue.highest_rps(3, 0.25) == 0
    assert queue.ttft_s(12.0, 3) == math.inf


def test_the_floor_of_a_percentile_between_two_services_is_the_upper_one() -> None:
    """Half of the prompts take 0.5 s: at any load fewer than half are done by then, so P50 is that of the others."""
    queue = PrefillQueue("mg1", np.array([0.5, 1.0]))
    assert queue.floor_s(50.0) == 1.0 and queue.floor_s(49.0) == 0.5
    assert queue.ttft_s(1e-6, 1, 50.0) == pytest.approx(1.0, rel=1e-3)
    assert queue.highest_rps(1, 0.99, 50.0) == 0 < queue.highest_rps(1, 1.01, 50.0)


@pytest.mark.parametrize("percentile", [0.0, 100.0, -3.0, float("nan")])
def test_percentiles_out_of_range(percentile: float) -> None:
    with pytest.raises(PenstockError, match="percentile"):
        check_percentile(percentile)


def test_unknown_kinds_are_named() -> None:
    with pytest.raises(PenstockError, match="did you mean mm1"):
        PrefillQueue("m1", np.array([1.0]))


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    sample=st.lists(st.floats(0.01, 2.0), min_size=1, max_size=6),
    servers=st.integers(1, 6),
    slack=st.floats(1.05, 30.0),
    percentile=st.sampled_from([None, 50.0, 90.0, 99.0]),
    cv=st.sampled_from([0.5, 1.0, 2.0]),
)
def test_the_highest_rate_meets_the_target_just_so(
    kind: str, sample: list[float], servers: int, slack: float, percentile: float | None, cv: float
) -> None:
    """TTFT at the highest rate is the target; a little more breaks it; a looser target and more servers allow more."""
    queue = PrefillQueue(kind, np.sort(sample), cv)
    target = queue.floor_s(percentile) * slack
    rate = queue.highest_rps(servers, target, percentile)
    assert 0 < rate <= servers / queue.mean_s
    tolerance = 1e-6 if percentile is None else 3e-3
    assert queue.ttft_s(rate * (1 - 1e-9), servers, percentile) <= target * (1 + tolerance)
    assert queue.ttft_s(rate * 1.01, servers, percentile) >= target * (1 - tolerance)
    assert queue.highest_rps(servers, 1.2 * target, percentile) >= rate * (1 - 1e-9)
    assert queue.highest_rps(servers + 1, target, percentile) > rate
