"""Arrow: costs, the three algorithms, sustained trigger, cooldown and the traps of its monitor."""

from __future__ import annotations

import pytest

from penstock.core.events import DecodeStarted, Event, InstanceUp, Load, PrefillDone, Tick
from penstock.core.types import Role, Slo
from penstock.policy.arrow import ArrowDecode, ArrowPrefill, ArrowRoles
from penstock.policy.arrow_monitor import LoadMonitor
from penstock.policy.latency import PrefillFit, TokenFit
from penstock.policy.view import ClusterView
from tests.policy.cluster import BELIEFS, SLO, cluster, load, request, up

P, D = Role.PREFILL, Role.DECODE
COST, STEP = PrefillFit(BELIEFS), TokenFit(BELIEFS)


def tick(loads: dict[int, tuple[int, int, float]]) -> Tick:
    """A tick from instance -> (tokens, running, step seconds)."""
    return Tick(tuple(loads), tuple(load(t, r, s) for t, r, s in loads.values()), (), (), ())


def roles_part(**settings: float) -> ArrowRoles:
    part = ArrowRoles(COST, STEP, SLO)
    for name, value in settings.items():
        setattr(part, name, value)
    return part


# -- placement ------------------------------------------------------------------------------------------------------


def test_prefill_prefers_an_instance_without_decodes() -> None:
    view = cluster([P, P, D], [500, 0, 0])
    view.prefill_estimate_s[1] = 0.5
    assert ArrowPrefill(COST).place(request(), view, 0.0).instance == 1


def test_prefill_that_misses_on_the_clean_instance_takes_one_that_meets() -> None:
    view = cluster([P, P, D], [500, 0, 0])
    view.prefill_estimate_s[1] = 5.0
    choice = ArrowPrefill(COST).place(request(), view, 0.0)
    assert (choice.instance, choice.fits) == (0, True)
    view.prefill_estimate_s[0] = 5.0
    choice = ArrowPrefill(COST).place(request(), view, 0.0)
    assert (choice.instance, choice.fits) == (1, False)


def test_early_asks_for_help_before_the_target_is_lost() -> None:
    view = cluster([P])
    view.prefill_estimate_s[0] = 0.6
    assert ArrowPrefill(COST).place(request(), view, 0.0).fits
    assert not ArrowPrefill(COST, early=0.5).place(request(), view, 0.0).fits


def test_time_already_waited_counts_against_ttft() -> None:
    view = cluster([P])
    assert ArrowPrefill(COST).place(request(), view, 0.5).fits
    assert not ArrowPrefill(COST).place(request(), view, 0.999).fits


def test_all_candidates_reach_an_idle_decode_instance() -> None:
    view = cluster([P, D], [500, 0])
    assert ArrowPrefill(COST).place(request(), view, 0.0).instance == 0
    assert ArrowPrefill(COST, everywhere=True).place(request(), view, 0.0).instance == 1


def test_decode_prefers_an_instance_without_prefills_then_fewer_tokens() -> None:
    view = cluster([P, D, D, D], [0, 100, 900, 800])
    view.prefill_tokens[1] = 50
    assert ArrowDecode(STEP).place(request(), view, 0.0).instance == 3


def test_decode_respects_mt_and_slowness() -> None:
    most = STEP.most_tokens(SLO.tpot_s)
    view = cluster([D, D], [int(most) - 50, int(most) - 200], capacity_tokens=10**7)
    choice = ArrowDecode(STEP).place(request(), view, 0.0)
    assert (choice.instance, choice.fits) == (1, True)
    view.slow[1] = 1.5
    assert not ArrowDecode(STEP).place(request(), view, 0.0).fits


def test_decode_without_target_is_bounded_by_memory() -> None:
    view = cluster([D], [99_950])
    assert not ArrowDecode(STEP).place(request(slo=Slo()), view, 0.0).fits
    assert ArrowDecode(STEP).place(request(prompt=50, slo=Slo()), view, 0.0).fits


def test_decode_stays_where_prefill_became_decode() -> None:
    view = cluster([D, D], [5000, 0])
    record = request()
    record.prefill_instance = 0
    assert ArrowDecode(STEP).place(record, view, 0.0).instance == 0


# -- urgent flips ---------------------------------------------------------------------------------------------------


def test_prefill_is_relieved_at_once_if_decode_load_is_low() -> None:
    view = cluster([P, D, D], [0, 900, 800])
    change = roles_part().relieve(P, request(), view, 0.0)
    assert change is not None
    assert (change.instance, change.role) == (2, P)
    assert roles_part(decode_load=0.5).relieve(P, request(), view, 0.0) is None


def test_an_instance_with_prefills_left_over_flips_first() -> None:
    view = cluster([P, D, D], [0, 900, 800])
    view.prefill_requests[1] = 1
    change = roles_part().relieve(P, request(), view, 0.0)
    assert change is not None
    assert change.instance == 1


def test_decode_is_relieved_only_after_the_cooldown_and_start_counts() -> None:
    view = cluster([P, P, D])
    view.prefill_estimate_s[0] = 1.0
    part = roles_part()
    part.observe(up(0, P), view, 100.0)
    assert part.relieve(D, request(), view, 109.0) is None
    change = part.relieve(D, request(), view, 110.0)
    assert change is not None
    assert (change.instance, change.role) == (1, D)
    assert part.relieve(D, request(), view, 115.0) is None


def test_an_empty_pool_is_refilled_whatever_the_cooldown() -> None:
    part = roles_part(decode_load=9.0)
    view = cluster([P, P])
    part.observe(up(0, P), view, 0.0)
    assert part.relieve(D, request(), view, 0.0) is not None
    assert part.relieve(P, request(), cluster([D, D]), 0.0) is not None


@pytest.mark.parametrize("phase", [P, D])
def test_the_last_of_a_pool_is_never_taken(phase: Role) -> None:
    view = cluster([P, D])
    assert roles_part().relieve(phase, request(), view, 1000.0) is None


def test_a_flip_that_cannot_help_is_not_made() -> None:
    view = cluster([P, P, D, D])
    assert roles_part().relieve(P, request(prompt=20_000), view, 1000.0) is None
    assert roles_part().relieve(D, request(slo=Slo(1.0, 0.001)), view, 1000.0) is None


# -- the monitor ----------------------------------------------------------------------------------------------------


def drive(part: ArrowRoles, view: ClusterView, step_s: float, seconds: int, tokens: int = 1000) -> list[int]:
    """Review once a second with all decode instances at ``step_s``; return the seconds at which something flipped."""
    flips = []
    for second in range(1, seconds + 1):
        event = tick({int(i): (tokens + second * 100, 5, step_s) for i in view.everyone})
        for change in part.review(event, view, float(second)):
            flips.append(second)
            view.relabel(change.instance, change.role)
        part.observe(event, view, float(second))
    return flips


def test_overload_must_last_and_the_cooldown_must_pass() -> None:
    view = cluster([P, P, P, D])
    part = roles_part(cooldown_s=5.0)
    part.observe(up(0, P), view, 0.0)
    # The first review has measured nothing yet; the start counts as a flip; then again after cooldown and three looks.
    assert drive(part, view, 0.06, 12) == [5, 10]
    assert len(view.prefills) == 1


def test_a_short_spike_flips_nothing() -> None:
    view = cluster([P, P, D])
    part = roles_part(cooldown_s=0.0)
    part.observe(up(0, P), view, 0.0)
    assert drive(part, view, 0.06, 3) == []


def test_idle_prefill_gives_an_instance_to_half_loaded_decode() -> None:
    half = STEP.intercept + 0.7 * (SLO.tpot_s - STEP.intercept)
    view = cluster([P, P, D])
    part = roles_part(cooldown_s=0.0)
    part.observe(up(0, P), view, 0.0)
    assert drive(part, view, half, 6) == [4]
    view = cluster([P, P, D])
    view.prefill_estimate_s[:2] = 0.8  # prefill is busy: LP above shrink
    part = roles_part(cooldown_s=0.0)
    part.observe(up(0, P), view, 0.0)
    assert drive(part, view, half, 6) == []


def test_a_natural_cadence_near_the_target_is_not_load() -> None:
    """Raw latency / target would read 0.9 for an engine whose empty step takes that long."""
    monitor = LoadMonitor(Slo(1.0, 0.011), floor_s=0.010)
    view = cluster([D])
    monitor.observe(up(0, D), view, 0.0)
    monitor.observe(DecodeStarted(1, 0, load(100, 1, 0.0101)), view, 0.0)
    monitor.observe(tick({0: (200, 1, 0.0101)}), view, 1.0)
    assert monitor.pool_loads(view, 1.0)[1] == pytest.approx(0.1)


def test_a_stalled_instance_is_overloaded_not_idle() -> None:
    monitor = LoadMonitor(SLO, floor_s=0.010)
    view = cluster([D])
    monitor.observe(up(0, D), view, 0.0)
    for second in range(1, 5):
        monitor.observe(tick({0: (500, 3, 0.02)}), view, float(second))
        _, decode = monitor.pool_loads(view, float(second))
    assert decode == pytest.approx((3.0 - 0.01) / 0.04)


def test_prefills_left_over_on_a_flipped_instance_are_no_stall() -> None:
    """It has prefilled for 20 s without a decode token; the clock starts with its first decode, not before."""
    monitor = LoadMonitor(SLO, floor_s=0.010)
    view = cluster([P])
    monitor.observe(up(0, P), view, 0.0)
    for second in range(1, 21):
        monitor.observe(Tick((0,), (Load(0, 4, 0, 1000, 0.2),), (), (), ()), view, float(second))
    view.relabel(0, D)
    view.pending_requests[0] = 1.0
    monitor.observe(Tick((0,), (Load(0, 4, 0, 1000, 0.2),), (), (), ()), view, 20.0)
    assert monitor.pool_loads(view, 20.0)[1] == 0.0
    monitor.observe(Tick((0,), (Load(0, 4, 0, 1000, 0.2),), (), (), ()), view, 22.0)
    assert monitor.pool_loads(view, 22.0)[1] == pytest.approx((2.0 - 0.01) / 0.04)


def test_an_idle_instance_has_no_load() -> None:
    monitor = LoadMonitor(SLO, floor_s=0.010)
    view = cluster([D])
    monitor.observe(up(0, D), view, 0.0)
    for second in range(1, 4):
        monitor.observe(tick({0: (0, 0, 0.0)}), view, float(second))
        assert monitor.pool_loads(view, float(second))[1] == 0.0


def test_prefill_load_is_an_average_not_a_sample() -> None:
    """Half a second of work, gone at the review: LP = 0.5 s * 0.4 s / 1 s."""
    monitor = LoadMonitor(SLO, floor_s=0.010)
    view = cluster([P, D])
    monitor.observe(up(0, P), view, 0.0)
    view.prefill_estimate_s[0] = 0.5
    other: Event = InstanceUp(1, D, 10, 16, 8)
    monitor.observe(other, view, 0.2)
    view.prefill_estimate_s[0] = 0.0
    monitor.observe(PrefillDone(1, 0, load()), view, 0.6)
    assert monitor.pool_loads(view, 1.0)[0] == pytest.approx(0.2)
    assert monitor.pool_loads(view, 2.0)[0] == 0.0


def test_an_event_before_any_review_measures_nothing() -> None:
    assert LoadMonitor(SLO, 0.01).pool_loads(cluster([P, D]), 1.0) == (0.0, 0.0)
