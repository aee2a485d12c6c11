"""Ranges hold the figure, come from what they say, and the sensitivity ranks inputs as the formulas do."""

from __future__ import annotations

import math

import numpy as np
import pytest

from penstock.core.errors import PenstockError
from penstock.plan.closed_form import solve
from penstock.plan.machine import Benchmark
from penstock.plan.sources import ROOFLINE_DECODE_ERROR, ROOFLINE_PREFILL_ERROR, check_error, errors
from penstock.plan.uncertainty import ranges, sensitivity
from tests.plan.support import LADDER, PREFILL_TPS, worked_example


def no_price(prefill: float, decode: float) -> None:
    return None


def test_ranges_hold_the_figure() -> None:
    answer = solve(worked_example(machine=Benchmark(PREFILL_TPS, LADDER, "quadratic", 0.05, 0.03)))
    found = ranges(answer, 3, 4, lambda p, d: 10 * (p + d), seed=1)
    for name, one in found.items():
        assert one.low is not None, name
        assert one.low <= one.value, name
        assert one.high is None or one.value <= one.high, name
    p = found["prefill_instances"]
    # Slower by 5 % makes M/M/1 lose that of its peak: 28,300 / 1.05 - 6144 / 1.9.
    assert p.fit_high == pytest.approx(5e6 / 60 * 6144 / 6656 / (28_300 / 1.05 - 6144 / 1.9))
    assert p.arrivals_high is not None and 0.01 < p.arrivals_high / p.value - 1 < 0.1
    assert found["cost_per_hour"].value == pytest.approx(10 * (answer.prefill_instances + answer.decode_instances))


def test_no_error_no_range_and_longer_windows_are_quieter() -> None:
    answer = solve(worked_example())
    short = ranges(answer, 3, 4, no_price, window_s=600)["decode_instances"]
    long = ranges(answer, 3, 4, no_price, window_s=60_000)["decode_instances"]
    assert short.fit_low == short.fit_high == short.value
    assert short.arrivals_high is not None and long.arrivals_high is not None
    # Poisson counts: a hundred times the window, a tenth of the noise.
    assert (short.arrivals_high - short.value) / (long.arrivals_high - long.value) == pytest.approx(10, rel=0.4)
    relative = 1.96 / math.sqrt(600 * answer.case.rate_rps)
    assert short.arrivals_high / short.value - 1 == pytest.approx(relative, rel=0.35)
    assert "cost_per_hour" not in ranges(answer, 3, 4, no_price, replicates=2)


def test_varied_lengths_add_noise() -> None:
    rng = np.random.default_rng(0)
    mixed = worked_example(outputs=rng.choice([10.0, 2000.0], 500), prompts=np.full(500, 6144.0))
    even = worked_example(outputs=np.full(500, mixed.osl), prompts=np.full(500, 6144.0))
    noise = [ranges(solve(case), 3, 4, no_price)["decode_instances"] for case in (mixed, even)]
    widths = [one.arrivals_high - one.value for one in noise if one.arrivals_high is not None]
    assert widths[0] > 1.2 * widths[1]


def test_sensitivity_ranks_inputs() -> None:
    found = {one.input: one for one in sensitivity(solve(worked_example()))}
    here = solve(worked_example())
    total = here.prefill_instances + here.decode_instances
    assert found["demand"].low == pytest.approx(0.9 * total) and found["demand"].high == pytest.approx(1.1 * total)
    assert found["decode speed"].swing > found["TTFT target"].swing > found["overhead"].swing
    names = [one.input for one in sensitivity(here)]
    assert names[0] == "decode speed" and names[-1] == "overhead"
    assert "overhead" not in [one.input for one in sensitivity(solve(worked_example(overhead_s=0.0)))]


def test_a_plan_that_may_not_exist_is_told() -> None:
    found = {one.input: one for one in sensitivity(solve(worked_example(tpot_s=0.0135)))}
    assert found["TPOT target"].low is None and found["TPOT target"].swing == math.inf


def test_errors_of_step_models() -> None:
    assert errors(None) == (ROOFLINE_PREFILL_ERROR, ROOFLINE_DECODE_ERROR)
    prefill, decode = errors("rtx-4090/llama-3.1-8b")
    assert (prefill, decode) == pytest.approx((0.0277, 0.0147), abs=1e-4)
    with pytest.raises(PenstockError, match="fit error 1 is not"):
        check_error(1.0)
