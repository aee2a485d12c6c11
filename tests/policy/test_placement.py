"""Placements: who is chosen, given loads."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.types import Role
from penstock.policy.latency import BatchFit, PrefillFit, TokenFit
from penstock.policy.llumnix import HighestFreeness
from penstock.policy.mixed import LeastTokens
from penstock.policy.parts import DecodePlacement, PrefillPlacement
from penstock.policy.placement import (
    FewestRequests,
    LeastPrefillWork,
    LeastResident,
    RoundRobinDecode,
    RoundRobinPrefill,
    ShortestQueue,
)
from penstock.policy.registry import PRESETS, build_policy
from tests.policy.cluster import BELIEFS, SLO, cluster, load, request, up

P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED


def test_round_robin_takes_turns_and_skips_the_small() -> None:
    view = cluster([P, D, P, P])
    part = RoundRobinPrefill()
    assert [part.place(request(), view, 0.0).instance for _ in range(4)] == [0, 2, 3, 0]
    view.capacity_tokens[2] = 50
    assert [part.place(request(), view, 0.0).instance for _ in range(3)] == [3, 0, 3]
    assert not RoundRobinPrefill().place(request(prompt=10**7), view, 0.0).fits


def test_round_robin_outlives_a_shrinking_pool() -> None:
    view = cluster([D, D, D])
    part = RoundRobinDecode()
    for _ in range(3):
        part.place(request(), view, 0.0)
    view.remove(2)
    assert part.place(request(), view, 0.0).instance in (0, 1)


@pytest.mark.parametrize(
    ("tokens", "running", "chosen"),
    [
        ([0, 500, 400, 600], [0, 1, 9, 1], 2),
        ([0, 500, 500, 600], [0, 3, 2, 1], 1),
        ([0, 99_950, 99_970, 99_990], [0] * 4, 1),
    ],
)
def test_least_resident(tokens: list[int], running: list[int], chosen: int) -> None:
    assert LeastResident().place(request(), cluster([P, D, D, D], tokens, running), 0.0).instance == chosen


def test_least_resident_counts_promises_and_growth() -> None:
    view = cluster([D, D], [1000, 1200], [10, 10])
    assert LeastResident().place(request(), view, 0.0).instance == 0
    view.pending_tokens[0] = 300
    assert LeastResident().place(request(), view, 0.0).instance == 1
    view.sync(1, load(1200, 10, step_s=0.01), 0.0)  # a thousand tokens a second
    assert LeastResident().place(request(), view, 1.0).instance == 0


def test_full_instances_are_passed_over() -> None:
    view = cluster([D, D], [1000, 5000], [256, 1])
    choice = LeastResident().place(request(), view, 0.0)
    assert (choice.instance, choice.fits) == (1, True)
    view = cluster([D, D], [99_950, 99_990])
    choice = LeastResident().place(request(), view, 0.0)
    assert (choice.instance, choice.fits) == (0, False)


def test_fewest_requests_and_shortest_queue() -> None:
    view = cluster([P, P, D, D], [0, 0, 10, 9000], [0, 0, 5, 2])
    view.prefill_requests[0] = 2
    view.prefill_requests[1] = 1
    assert FewestRequests().place(request(), view, 0.0).instance == 3
    assert ShortestQueue().place(request(), view, 0.0).instance == 1


def test_least_prefill_work_minds_queues_and_slow_instances() -> None:
    part = LeastPrefillWork(PrefillFit(BELIEFS))
    view = cluster([P, P])
    assert part.place(request(), view, 0.0).instance == 0
    view.slow[0] = 3.0
    assert part.place(request(), view, 0.0).instance == 1
    view.prefill_estimate_s[1] = 10.0
    assert part.place(request(), view, 0.0).instance == 0


def test_highest_freeness_is_steps_not_tokens() -> None:
    # 50,000 free for 100 requests are 500 steps; 20,000 free for 10 are 2,000.
    view = cluster([D, D], [50_000, 80_000], [100, 10])
    assert HighestFreeness().place(request(), view, 0.0).instance == 1
    assert LeastResident().place(request(), view, 0.0).instance == 0


def test_mixed_counts_waiting_prompts() -> None:
    view = cluster([M, M], [500, 800], [1, 1])
    assert LeastTokens().place(request(), view, 0.0).instance == 0
    view.prefill_tokens[0] = 1000
    assert LeastTokens().place(request(), view, 0.0).instance == 1


def test_fits_agree_with_a_linear_belief() -> None:
    assert PrefillFit(BELIEFS).seconds(1000) == pytest.approx(BELIEFS.prefill_s(1000), rel=0.05)
    assert TokenFit(BELIEFS).seconds(32 * 1024) == pytest.approx(BELIEFS.decode_step_s(32, 32 * 1024), rel=1e-6)
    assert BatchFit(BELIEFS).seconds(7, 900) == pytest.approx(BELIEFS.decode_step_s(7, 900), rel=1e-6)
    fit = TokenFit(BELIEFS)
    assert fit.seconds(fit.most_tokens(0.05)) == pytest.approx(0.05)
    assert fit.most_tokens(0.001) == 0.0


PLACEMENTS: list[tuple[str, PrefillPlacement | DecodePlacement]] = []
for _name in PRESETS:
    _policy = build_policy(_name, BELIEFS, SLO)
    PLACEMENTS.append((_name, _policy.prefill))
    if _policy.decode is not None:
        PLACEMENTS.append((_name, _policy.decode))


@given(st.data())
def test_only_instances_that_are_up_are_chosen(data: st.DataObject) -> None:
    name, _ = data.draw(st.sampled_from(PLACEMENTS))
    policy = build_policy(name, BELIEFS, SLO)
    n = data.draw(st.integers(1, 6))
    roles = data.draw(st.lists(st.sampled_from([P, D, M]), min_size=n, max_size=n))
    view = cluster(roles, data.draw(st.lists(st.integers(0, 100_000), min_size=n, max_size=n)))
    for i in data.draw(st.sets(st.integers(0, n - 1))):
        view.remove(i)
    parts: list[PrefillPlacement | DecodePlacement] = [policy.prefill]
    if policy.decode is not None:
        parts.append(policy.decode)
    record = request(prompt=data.draw(st.integers(1, 120_000)))
    for part in parts:
        choice = part.place(record, view, 0.0)
        assert choice.instance == -1 or view.up[choice.instance]
        if choice.fits:
            assert choice.instance >= 0
            assert record.prompt_tokens <= view.capacity_tokens[choice.instance]
        again = build_policy(name, BELIEFS, SLO)
        twin = again.prefill if part is policy.prefill else again.decode
        assert twin is not None
        if part is policy.prefill:
            assert twin.place(request(prompt=record.prompt_tokens), view, 0.0).instance == choice.instance


def test_a_new_instance_is_seen() -> None:
    view = cluster([D], [500])
    view.add(up(1, D), 0.0)
    assert LeastResident().place(request(), view, 0.0).instance == 1
