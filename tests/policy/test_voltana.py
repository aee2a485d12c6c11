"""VoltanaLLM: the clock rule and its exits, the predictor by clock and bin, the decode placements, and the effect."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.errors import PenstockError
from penstock.core.types import Role, Slo
from penstock.experiment.build import build_beliefs, build_cluster, run
from penstock.experiment.setup import ClusterSetup, Setup, Target, TruthSetup, WorkloadSetup
from penstock.policy.ecofreq import IDLE_S, EcoFreq, EcoFreqSettings, Rates, Reading, ecofreq
from penstock.policy.ecopred import (
    BIN_ENDS,
    FALLBACK_S,
    PROFILED_BATCHES,
    EcoPred,
    Samples,
    believed_samples,
    ecopred,
    fit,
)
from penstock.policy.ecoroute import Fadr, TileAware, fadr_order, light_order, tile_order
from penstock.policy.engine import Job, Situation
from penstock.policy.parts import Beliefs
from penstock.policy.registry import build_policy
from penstock.report.metrics import summarize
from penstock.report.schema import RunMetrics
from tests.policy.cluster import cluster, request

MHZ = (1005.0, 1095.0, 1200.0, 1305.0, 1410.0)
SECONDS = (0.060, 0.050, 0.040, 0.030, 0.020)
"""What a step takes by level in the table tests."""


def step_s(level: int, batch: float, tokens: float) -> float:
    return SECONDS[level]


def one(waiting: int = 0, batch: int = 8, tokens: int = 4000, waited_s: float = 0.0) -> Reading:
    return Reading(waiting, batch, tokens, waited_s)


# -- EcoFreq ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("readings", "current", "rates", "quiet_s", "wanted", "why"),
    [
        ([one()], 2, Rates(11.0, 0.0, 10.0), 0.0, 4, "more tokens/s than the threshold"),
        ([], 2, Rates(11.0, 0.0, 10.0), 0.0, 4, "the rates are looked at first, readings or not"),
        ([one()], 2, Rates(10.0, 0.0, 10.0), 0.0, 0, "at the threshold is not above it"),
        ([one()], 2, Rates(0.0, 5.1, 10.0, 5.0), 0.0, 4, "more requests/s than the threshold"),
        ([], 2, None, IDLE_S, 2, "nothing to read: keep"),
        ([], 2, None, IDLE_S + 0.1, 0, "nothing to read for long: lowest"),
        ([one(waiting=1)], 0, None, 0.0, 4, "somebody waits"),
        ([one(waiting=1), one()], 4, None, 0.0, 0, "only the latest reading says who waits"),
        ([one(), one(waiting=1)], 0, None, 0.0, 4, "the latest one does"),
    ],
)
def test_the_early_exits(
    readings: list[Reading], current: int, rates: Rates | None, quiet_s: float, wanted: int, why: str
) -> None:
    assert ecofreq(readings, current, range(5), step_s, 0.060, 0.0, rates, quiet_s) == wanted, why


@pytest.mark.parametrize(
    ("slo_s", "margin", "waited_s", "levels", "wanted"),
    [
        (0.060, 0.0, 0.0, (0, 1, 2, 3, 4), 0),
        (0.045, 0.0, 0.0, (0, 1, 2, 3, 4), 2),
        (0.045, 0.35, 0.0, (0, 1, 2, 3, 4), 0),  # 60.75 ms: the margin loosens the target
        (0.045, -0.2, 0.0, (0, 1, 2, 3, 4), 3),
        (0.060, 0.0, 0.015, (0, 1, 2, 3, 4), 2),  # what was waited for is gone from the target
        (0.010, 0.0, 0.0, (0, 1, 2, 3, 4), 4),  # none is fast enough: highest
        (0.045, 0.0, 0.0, (0, 4), 4),  # two levels: a switch
        (0.060, 0.0, 0.0, (0, 4), 0),
        (0.010, 0.0, 0.0, (0,), 0),
    ],
)
def test_the_lowest_feasible_level_else_the_highest(
    slo_s: float, margin: float, waited_s: float, levels: Sequence[int], wanted: int
) -> None:
    assert ecofreq([one(waited_s=waited_s)], 3, levels, step_s, slo_s, margin) == wanted


def test_medians_leave_out_empty_steps_and_the_longest_wait_counts() -> None:
    asked: list[tuple[float, float]] = []

    def predict(level: int, batch: float, tokens: float) -> float:
        asked.append((batch, tokens))
        return 0.03

    readings = [one(batch=2, tokens=0), one(batch=4, tokens=100, waited_s=0.02), one(batch=9, tokens=300)]
    assert ecofreq(readings, 0, range(5), predict, 0.049) == 4
    assert set(asked) == {(4, 200.0)}


@given(
    st.lists(st.floats(0.001, 1.0), min_size=5, max_size=5),
    st.floats(0.001, 1.0),
    st.floats(-0.5, 0.5),
    st.floats(0.0, 0.5),
)
def test_no_lower_level_is_feasible_and_the_chosen_one_is_or_is_the_highest(
    costs: list[float], slo_s: float, margin: float, waited_s: float
) -> None:
    found = ecofreq([one(waited_s=waited_s)], 0, range(5), lambda level, b, n: costs[level], slo_s, margin)
    target = slo_s * (1 + margin) - waited_s
    assert all(costs[level] > target for level in range(found))
    assert found == 4 or costs[found] <= target


def engine_of(ttft_s: float = 0.8, tpot_s: float = 0.05, **more: float) -> EcoFreq:
    lines = [(1e-4 * 1410 / f, 0.0) for f in MHZ]
    planes = [[(0.0, 1e-6 * 1410 / f, 0.0)] * len(BIN_ENDS) for f in MHZ]
    predictor = EcoPred(MHZ, lines, planes)
    return EcoFreq(EcoFreqSettings(predictor, MHZ, (0, 1, 2, 3, 4), ttft_s, tpot_s, **more))  # type: ignore[arg-type]


def situation(decodes: int = 0, context: int = 0, waiting: int = 0, now_s: float = 10.0) -> Situation:
    found = Situation(0, Role.DECODE, 16, 1000)
    found.decodes, found.context, found.waiting, found.now_s = decodes, context, waiting, now_s
    return found


def prompt(arrival_s: float, number: int = 1) -> Job:
    return Job(number, 1000, Slo(1.0, 0.05), 0, arrival_s)


def test_in_an_engine_prompts_are_held_to_ttft_and_decodes_to_tpot() -> None:
    part = engine_of()
    assert part.choose(situation(8, 30_000), [], 0) == 0
    assert part.choose(situation(8, 45_000), [], 0) == 3  # 45 ms at 1410 MHz, 48.6 ms at 1305
    assert part.choose(situation(8, 60_000), [], 0) == 4
    assert part.choose(situation(8, 30_000, waiting=1), [], 0) == 4
    assert part.choose(situation(), [prompt(10.0)], 5_000) == 0  # 0.70 s at 1005 MHz
    assert part.choose(situation(), [prompt(9.7)], 4_000) == 2  # 0.5 s are left: 0.515 s at 1095 MHz, 0.47 at 1200
    assert part.choose(situation(8, 45_000), [prompt(10.0)], 5_000) == 3  # both phases: the higher of the two


def test_in_an_engine_many_prompt_tokens_in_the_window_mean_the_highest_clock() -> None:
    part = engine_of(prefill_tps=1000.0, window_s=3.0)
    assert part.choose(situation(now_s=10.0), [prompt(10.0)], 2_000) == 0
    assert part.choose(situation(now_s=11.0), [prompt(11.0, 2)], 2_000) == 4
    assert part.choose(situation(now_s=13.5), [prompt(13.5, 3)], 500) == 0  # the first two have left the window
    few = engine_of(prefill_rps=0.5, window_s=3.0)
    assert few.choose(situation(now_s=10.0), [prompt(10.0)], 100) == 0
    assert few.choose(situation(now_s=10.1), [prompt(10.0)], 100) == 0  # the same prompt, in chunks
    assert few.choose(situation(now_s=10.2), [prompt(10.2, 2)], 100) == 4


# -- EcoPred ---------------------------------------------------------------------------------------------------------


def tiled(mhz: float, batch: float, tokens: float) -> float:
    """A synthetic truth with a step at every 128 requests, slower at lower clocks in the batch only."""
    return 0.008 + 0.006 * math.ceil(batch / 128) * 1410 / mhz + 2e-8 * tokens


def synthetic(levels: Sequence[float] = MHZ) -> tuple[Samples, Samples]:
    prefill = [(f, 1.0, n, 7e-5 * n * 1410 / f + 0.01) for f in levels for n in range(2_100, 20_000, 900)]
    decode = [
        (f, float(b), float(b * c), tiled(f, b, b * c))
        for f in levels
        for b in PROFILED_BATCHES
        for c in (50, 200, 400)
    ]
    first, second = np.array(prefill).T, np.array(decode).T
    return Samples(*first), Samples(*second)


def test_synthetic_coefficients_come_back_by_clock_and_bin() -> None:
    found = fit(*synthetic())
    assert found.mhz == MHZ
    for f, (a, c) in zip(MHZ, found.prefill, strict=True):
        assert a == pytest.approx(7e-5 * 1410 / f, rel=1e-6)
        assert c == pytest.approx(0.01, rel=1e-5)
    for f, planes in zip(MHZ, found.decode, strict=True):
        for end, (a, b, c) in zip(BIN_ENDS, planes, strict=True):
            if end <= 1152:  # profiled; beyond, the last profiled bin's
                assert b == pytest.approx(2e-8, rel=1e-4)
                assert a * end + c == pytest.approx(tiled(f, end, 0), rel=1e-6)


def test_the_step_at_128_survives_and_one_plane_loses_it() -> None:
    prefill, decode = synthetic()
    found = fit(prefill, decode)
    held = 30_000.0
    for f in MHZ:
        jump = tiled(f, 129, held) - tiled(f, 128, held)
        assert found.decode_s(f, 129, held) - found.decode_s(f, 128, held) == pytest.approx(jump, rel=1e-3)
        here = decode.mhz == f
        terms = np.stack([decode.batch[here], decode.tokens[here], np.ones(here.sum())], axis=1)
        a = np.linalg.lstsq(terms, decode.seconds[here], rcond=None)[0][0]
        assert a < 0.1 * jump  # what one more request costs by a single plane


def test_between_two_clocks_predictions_are_interpolated_and_beyond_them_held() -> None:
    found = fit(*synthetic())
    prefill: Callable[[float], float] = lambda f: found.prefill_s(f, 5_000)  # noqa: E731
    decode: Callable[[float], float] = lambda f: found.decode_s(f, 40, 9_000)  # noqa: E731
    for say in (prefill, decode):
        assert say(1050.0) == pytest.approx((say(1005.0) + say(1095.0)) / 2)
        assert say(900.0) == say(1005.0) and say(2000.0) == say(1410.0)
        assert say(1005.0) > say(1200.0) > say(1410.0)


def test_predictions_that_are_not_positive_are_replaced() -> None:
    predictor = EcoPred((1.0,), [(1.0, -5.0)], [[(0.0, 0.0, -1.0)] * len(BIN_ENDS)])
    assert predictor.prefill_s(1.0, 4.0) == FALLBACK_S and predictor.decode_s(1.0, 3, 100) == FALLBACK_S
    assert predictor.prefill_s(1.0, 6.0) == 1.0


def test_a_few_wild_prefill_samples_do_not_move_the_line() -> None:
    prefill, decode = synthetic((1410.0,))
    seconds = prefill.seconds.copy()
    seconds[[3, 11]] *= 5.0
    a, c = fit(Samples(prefill.mhz, prefill.batch, prefill.tokens, seconds), decode).prefill[0]
    assert a == pytest.approx(7e-5, rel=1e-6) and c == pytest.approx(0.01, rel=1e-4)


def test_a_clock_without_samples_is_an_error() -> None:
    prefill, decode = synthetic((1005.0, 1410.0))
    keep = decode.mhz == 1005.0
    some = Samples(decode.mhz[keep], decode.batch[keep], decode.tokens[keep], decode.seconds[keep])
    with pytest.raises(PenstockError, match="0 decode samples at 1410 MHz"):
        fit(prefill, some)


def setup_of(rate_rps: float = 20.0, requests: int = 300, tile: int = 128, **options: float | str) -> Setup:
    return Setup(
        policy="voltana",
        options={"prefill": "shortest-queue", **options},
        workload=WorkloadSetup(synthetic="sharegpt", requests=requests, rate_rps=rate_rps),
        cluster=ClusterSetup(prefill=2, decode=2, max_num_seqs=1024),
        slo=Target(0.8, 0.045),
        truth=TruthSetup(batch_tile=tile),
        seed=5,
    )


def test_what_is_believed_of_the_roofline_with_tiles_is_predicted_within_a_few_percent() -> None:
    setup = setup_of()
    beliefs = build_beliefs(setup, build_cluster(setup))
    found = ecopred(beliefs)
    assert found.mhz == MHZ
    for level in beliefs.clocks:
        for batch in (1, 8, 100, 128, 129, 200, 256, 257, 500):
            for each in (100, 400, 800):
                truth = level.step_model.step_s(batch, batch * each, [], [])
                assert found.decode_s(level.mhz, batch, batch * each) == pytest.approx(truth, rel=0.05)
        truth = level.step_model.step_s(0, 0, [1000] * 6, [0] * 6)
        assert found.prefill_s(level.mhz, 6_000) == pytest.approx(truth, rel=0.1)


def test_without_levels_there_is_one_clock() -> None:
    setup = setup_of()
    plain = Beliefs(build_cluster(setup).instances[0].step_model, 1.0, 1e9)
    prefill, decode = believed_samples(plain)
    assert set(prefill.mhz) == set(decode.mhz) == {1.0}
    assert build_policy("voltana", plain, Slo(0.8, 0.045)).engine is not None


# -- EcoRoute --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("requests", "wanted"),
    [
        ((130, 250), 1),  # both in the second tile: the fuller one
        ((128, 100), 1),  # both in the first, but one more would open the second on 128
        ((128, 256), 0),  # all tiles full: the lowest one is opened
        ((0, 200), 0),  # an empty instance opens no tile that costs more
        ((127, 130), 0),
    ],
)
def test_tile_aware(requests: Sequence[float], wanted: int) -> None:
    assert tile_order(requests)[0] == wanted
    assert sorted(tile_order(requests)) == list(range(len(requests)))


def test_below_one_tile_clock_and_requests_decide() -> None:
    assert light_order([1, 0, 0], [1, 60, 50]) == [2, 1, 0]
    assert light_order([-1, -1], [3, 2]) == [1, 0]


def needs(mhz: float, requests: float, tokens: float) -> float:
    """A step that each 100 requests lengthen by 10 ms at the highest clock."""
    return 0.0001 * requests * 1410 / mhz


@pytest.mark.parametrize(
    ("requests", "slo_s", "wanted", "why"),
    [
        ((200, 150), 0.100, 0, "no clock rises: equal keys, same tile, the fuller one"),
        ((300, 140), 0.100, 1, "no clock rises: the lower tile"),
        ((142, 140), 0.02, 1, "142 -> 143 raises its clock, 140 -> 141 does not"),
        ((141, 139, 160), 0.0201, 0, "two need the lowest clock, one the fourth: apart, the first lowest"),
        ((150, 154), 0.02, 1, "neither rises: the one at the higher clock (less left to lose)"),
        ((500, 500), 0.02, 0, "both at the highest: lower index"),
    ],
)
def test_fadr(requests: Sequence[float], slo_s: float, wanted: int, why: str) -> None:
    order = fadr_order(requests, [0.0] * len(requests), 100.0, needs, MHZ, slo_s)
    assert order[0] == wanted, (why, order)


def test_the_placements_read_the_view_and_pass_over_the_full() -> None:
    view = cluster([Role.PREFILL, Role.DECODE, Role.DECODE], [0, 1000, 1000], [0, 130, 250], capacity_tokens=1_000)
    assert not TileAware().place(request(100), view, 0.0).fits
    roomy = cluster([Role.PREFILL, Role.DECODE, Role.DECODE], [0, 1000, 1000], [0, 130, 250])
    assert TileAware().place(request(100), roomy, 0.0).instance == 2
    predictor = fit(*synthetic())
    assert Fadr(predictor, MHZ, 0.1).place(request(100), roomy, 0.0).instance == 2
    light = cluster([Role.PREFILL, Role.DECODE, Role.DECODE], [0, 1000, 1000], [0, 20, 10])
    light.clock[1], light.clock[2] = 0, 4
    assert TileAware().place(request(100), light, 0.0).instance == 1
    assert TileAware().place(request(100), cluster([Role.PREFILL]), 0.0).instance == -1


# -- all of it -------------------------------------------------------------------------------------------------------


def figures(setup: Setup) -> RunMetrics:
    return summarize(run(setup, sample=False), setup.slo.slo())


def test_at_low_load_clocks_stay_low_and_a_fifth_of_the_energy_is_saved() -> None:
    high, ours, low = (figures(setup_of(clock=clock)) for clock in ("max", "ecofreq", "low"))
    assert high.energy_j is not None and ours.energy_j is not None and low.energy_j is not None
    assert ours.energy_j < 0.8 * high.energy_j
    assert ours.energy_j == pytest.approx(low.energy_j, rel=0.05)
    assert ours.attainment >= high.attainment - 0.02
    for run_, only in ((high, "1410"), (low, "1005")):
        for instance in run_.instances:
            assert instance.clock_busy_s is not None
            assert {mhz for mhz, busy in instance.clock_busy_s.items() if busy > 0} <= {only}
    assert ours.joules_per_token == pytest.approx(ours.energy_j / (ours.output_tokens_per_s * ours.simulated_seconds))


def test_a_profile_without_hardware_has_no_joules() -> None:
    setup = Setup(
        workload=WorkloadSetup(requests=20), cluster=ClusterSetup(hardware="rtx-4090", profile="rtx-4090/llama-3.1-8b")
    )
    found = figures(setup)
    assert found.energy_j is None and found.joules_per_token is None and found.joules_per_request is None
    assert all(i.energy_j is None and i.clock_busy_s is None for i in found.instances)
