"""The planner: the published example to the digit, its guards, how it moves with its inputs, and models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.errors import PenstockError
from penstock.experiment.setup import ClusterSetup, Setup
from penstock.plan.closed_form import Case, changed, decode_point, solve
from penstock.plan.queueing import KINDS
from penstock.plan.rounding import Bill, choose, option, options
from penstock.plan.sources import modelled
from tests.plan.support import ISL, OSL, worked_example

TOKENS_A_MINUTE = 60 * (ISL + OSL)


def test_the_published_example() -> None:
    """Of arXiv 2603.04716: about 25,000 and 1,700 tokens/s, 0.82 : 1, 3.07 and 3.8 instances; digits recomputed."""
    answer = solve(worked_example())
    assert answer.prefill_throughput == pytest.approx(25_066, abs=0.5)
    assert answer.decode_throughput == pytest.approx(1_691, abs=0.5)
    assert answer.pd_ratio == pytest.approx(0.8095, abs=5e-5)
    assert answer.prefill_instances == pytest.approx(3.069, abs=5e-4)
    assert answer.decode_instances == pytest.approx(3.791, abs=5e-4)
    linear = solve(worked_example("linear"))
    assert linear.decode_throughput == pytest.approx(1_714, abs=0.5)
    assert linear.decode_instances == pytest.approx(3.739, abs=5e-4)


@pytest.mark.parametrize(
    ("queue", "percentile", "instances"), [("mm1", 90, 3.69), ("mm1", 99, 5.74), ("md1", None, 2.89)]
)
def test_published_variants(queue: str, percentile: float | None, instances: float) -> None:
    case = worked_example(queue=queue, percentile=percentile)
    assert solve(case).prefill_instances == pytest.approx(instances, abs=0.005)


@pytest.mark.parametrize(("prefill", "decode", "tpm"), [(3, 4, 4.89e6), (3, 3, 3.96e6), (9, 4, 5.27e6)])
def test_published_capacities(prefill: int, decode: int, tpm: float) -> None:
    answer = solve(worked_example())
    assert answer.capacity_rps(prefill, decode) * TOKENS_A_MINUTE == pytest.approx(tpm, rel=0.002)


@pytest.mark.parametrize("ttft_s", [0.3, 0.317])
def test_ttft_below_its_floor_is_refused(ttft_s: float) -> None:
    """0.317 s: a prompt on an idle instance, and the overhead. Clamped to 0.95 of it, throughput is negative."""
    with pytest.raises(PenstockError, match=r"TTFT .* cannot be met: mean prefill .* 217 ms and the overhead 100 ms"):
        solve(worked_example(ttft_s=ttft_s))
    assert solve(worked_example(ttft_s=0.3172)).prefill_instances > 100


def test_tpot_outside_the_ladder_is_refused() -> None:
    for tpot_s in (0.0127, 0.0263):
        with pytest.raises(PenstockError, match="the ladder"):
            solve(worked_example(tpot_s=tpot_s))


@pytest.mark.parametrize("changes", [{"rate_rps": 0.0}, {"rate_rps": float("nan")}, {"overhead_s": -1.0}])
def test_numbers_out_of_range(changes: dict[str, Any]) -> None:
    with pytest.raises(PenstockError):
        worked_example(**changes)


@settings(max_examples=40, deadline=None)
@given(
    queue=st.sampled_from(KINDS),
    rate=st.floats(0.5, 200.0),
    ttft_s=st.floats(0.6, 10.0),
    tpot_s=st.floats(0.0145, 0.0255),
    factor=st.floats(1.001, 1.02),
)
def test_how_the_plan_moves(queue: str, rate: float, ttft_s: float, tpot_s: float, factor: float) -> None:
    """More input, more demand and tighter targets take more instances; the ratio does not depend on the demand."""
    case = worked_example(rate_rps=rate, ttft_s=ttft_s, tpot_s=tpot_s, queue=queue)
    answer = solve(case)
    p, d = answer.prefill_instances, answer.decode_instances
    assert solve(changed(case, "input length", factor)).prefill_instances > p
    assert solve(changed(case, "TTFT target", factor)).prefill_instances <= p * (1 + 1e-9)
    assert solve(changed(case, "TPOT target", factor)).decode_instances < d
    assert solve(changed(case, "output length", factor)).decode_instances == pytest.approx(d * factor)
    assert solve(changed(case, "decode speed", factor)).decode_instances < d
    assert solve(changed(case, "prefill speed", factor)).prefill_instances < p
    more = solve(changed(case, "demand", factor))
    assert more.decode_instances == pytest.approx(d * factor)
    assert more.prefill_instances > p
    if queue != "pooled":
        assert more.pd_ratio == pytest.approx(answer.pd_ratio)
    assert answer.pd_ratio == pytest.approx(p / d)


@settings(max_examples=30, deadline=None)
@given(queue=st.sampled_from(KINDS), rate=st.floats(0.5, 100.0), tpot_s=st.floats(0.0145, 0.0255))
def test_rounding_up_carries_the_demand_and_rounding_down_does_not(queue: str, rate: float, tpot_s: float) -> None:
    answer = solve(worked_example("linear", rate_rps=rate, tpot_s=tpot_s, queue=queue))
    floor, nearest, ceil = options(answer, Bill())
    assert ceil.share_of_demand >= 1 - 1e-6
    assert floor.capacity_rps <= nearest.capacity_rps <= ceil.capacity_rps
    if answer.prefill_instances > 1 and answer.decode_instances > 1:
        assert floor.share_of_demand <= 1 + 1e-6
    assert (floor.gpus, ceil.gpus) == (floor.prefill + floor.decode, ceil.prefill + ceil.decode)


def test_rounding_of_the_published_example() -> None:
    """3P4D is what the paper deploys: 2 % short of the demand, so it must be allowed for."""
    answer = solve(worked_example())
    found = options(answer, Bill(8, 8, 4.0, 4.0))
    assert [(one.rule, one.prefill, one.decode) for one in found] == [
        ("floor", 3, 3),
        ("nearest", 3, 4),
        ("ceil", 4, 4),
    ]
    assert [one.binding for one in found] == ["decode", "prefill", "decode"]
    assert choose(found, 0.0).rule == "ceil" and choose(found, 0.03).rule == "nearest"
    assert choose(found, 0.25).rule == "floor"
    nearest = found[1]
    assert nearest.share_of_demand == pytest.approx(0.9776, abs=1e-4)
    assert (nearest.gpus, nearest.cost_per_hour) == (56, 224.0)
    assert "Prefill binds: beyond 4.89M tokens/min" in nearest.text and "instance more: 5.28M" in nearest.text
    assert "Decode binds: beyond 3.96M tokens/min" in found[0].text
    with pytest.raises(PenstockError, match="shortfall"):
        choose(found, 1.0)


def conversation(setup: Setup, **changes: object) -> Case:
    rng = np.random.default_rng(3)
    prompts, outputs = rng.integers(200, 2000, 400).astype(float), rng.integers(50, 500, 400).astype(float)
    case = Case(modelled(setup), 20.0, prompts, outputs, 1.0, 0.02, queue="pooled")
    return replace(case, **changes)  # type: ignore[arg-type]


def test_models_stop_at_the_scheduler_and_at_memory() -> None:
    loose = conversation(Setup(), tpot_s=1.0)
    assert decode_point(loose).bound == "max_num_seqs" and decode_point(loose).batch == 256
    tight = Setup(cluster=ClusterSetup(kv_blocks=2000))
    point = decode_point(conversation(tight, tpot_s=1.0))
    assert point.bound == "KV capacity" and 5 < point.batch < 32_000 / 1100
    assert (
        "KV capacity allows no larger batch" in option(solve(conversation(tight, tpot_s=1.0)), Bill(), "x", 9, 1).text
    )
    assert decode_point(conversation(Setup())).bound == "TPOT"
    with pytest.raises(PenstockError, match="fills the KV cache"):
        decode_point(conversation(Setup(cluster=ClusterSetup(kv_blocks=10))))


def test_percentiles_and_faster_hardware() -> None:
    mean, p90 = solve(conversation(Setup())), solve(conversation(Setup(), percentile=90.0))
    assert p90.prefill_instances > mean.prefill_instances and p90.decode_instances > mean.decode_instances
    faster = solve(conversation(Setup(cluster=ClusterSetup(hardware="h100"))))
    assert faster.prefill_instances < mean.prefill_instances and faster.decode_instances < mean.decode_instances


def test_impossible_targets_name_what_would_do() -> None:
    with pytest.raises(PenstockError, match=r"TPOT 2.00 ms cannot be met: a decode step takes .* raise --tpot above"):
        solve(conversation(Setup(), tpot_s=0.002))
    with pytest.raises(PenstockError, match=r"TTFT 1.00 ms cannot be met.*raise --ttft above"):
        solve(conversation(Setup(), ttft_s=0.001))
    with pytest.raises(PenstockError, match="GiB of weights"):
        modelled(Setup(cluster=ClusterSetup(model="llama-3.1-70b")))
