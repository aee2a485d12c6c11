"""Goodput against known answers: a step function, brute force, and a queue without randomness."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from penstock.core.errors import PenstockError
from penstock.experiment.goodput import goodput, highest_rate
from penstock.experiment.repeat import fan_out, measure, repeats_differ
from penstock.experiment.setup import ClusterSetup, Setup, Target, TruthSetup, WorkloadSetup, replace


@pytest.mark.parametrize("start", [0.01, 1.0, 7.3, 500.0])
@pytest.mark.parametrize("edge", [0.5, 7.3, 123.0])
def test_search_finds_a_step(start: float, edge: float) -> None:
    found = highest_rate(lambda rate: 1.0 if rate <= edge else 0.5, start, tolerance=0.01)
    assert found.rate_rps is not None and found.above_rps is not None
    assert found.rate_rps <= edge < found.above_rps <= 1.01 * found.rate_rps
    assert len(found.evaluations) < 30


def test_search_gives_up_at_both_ends() -> None:
    none = highest_rate(lambda rate: 0.0, 1.0, lowest_rps=0.1)
    assert none.rate_rps is None and none.above_rps == pytest.approx(0.1)
    assert none.evaluations[-1].rate_rps == pytest.approx(0.1)
    always = highest_rate(lambda rate: 1.0, 1.0, widest=64)
    assert always.rate_rps == 64 and always.above_rps is None


@pytest.mark.parametrize(("goal", "tolerance"), [(0.0, 0.02), (1.1, 0.02), (0.9, 0.0), (0.9, float("nan"))])
def test_search_refuses(goal: float, tolerance: float) -> None:
    with pytest.raises(PenstockError):
        highest_rate(lambda rate: 1.0, 1.0, goal, tolerance)


def test_goodput_of_a_deterministic_queue_is_its_capacity(tmp_path: Path) -> None:
    """Regular arrivals of equal prompts at one prefill instance of exactly 0.1 s service: the edge is 10 requests/s."""
    profile = tmp_path / "linear.json"
    costs = {"base_s": 0.0, "per_decode_s": 1e-6, "per_context_s": 0.0, "per_prefill_s": 1e-3, "per_pair_s": 0.0}
    profile.write_text(json.dumps({"schema": "penstock.profile/1", "kind": "linear", "linear": costs}))
    setup = Setup(
        workload=WorkloadSetup(synthetic="100/10", requests=2000, cv=0.0),
        # A budget of one prompt: no two prefills share a step.
        cluster=ClusterSetup(prefill=1, decode=1, profile=str(profile), max_num_batched_tokens=100, max_num_seqs=100),
        slo=Target(0.15, None),
    )
    found = goodput(setup, 0, tolerance=0.005)
    # Above capacity request k waits k (0.1 - 1 / rate) seconds; the 1800th must wait no more than 0.05 s.
    edge = 1 / (0.1 - 0.05 / 1800)
    assert found.rate_rps == pytest.approx(edge, rel=0.006)
    assert found.limit == "TTFT" and found.diagnosis.binding.startswith("prefill")


def test_goodput_meets_a_brute_force_scan() -> None:
    setup = Setup(workload=WorkloadSetup(requests=300), slo=Target(0.5, 0.05))
    found = goodput(setup, 3, tolerance=0.02)
    assert found.rate_rps is not None
    grid = [found.rate_rps * 1.02**k for k in range(-12, 13)]
    met = [rate for rate in grid if measure(setup.at_rate(rate), 3, False).attainment >= 0.9]
    assert found.rate_rps / 1.045 <= max(met) <= found.rate_rps * 1.045


def test_an_unreachable_slo_has_no_goodput_and_says_why() -> None:
    setup = Setup(workload=WorkloadSetup(requests=80), slo=Target(0.05, None))
    found = goodput(setup, 0)
    assert found.rate_rps is None and found.diagnosis.binding == "prefill compute"
    assert found.diagnosis.over is not None and found.diagnosis.over > 1.5
    assert min(e.rate_rps for e in found.evaluations) < 0.1


def _shout(number: int) -> int:
    if number == 3:
        raise PenstockError("three", "not three")
    return 10 * number


@pytest.mark.parametrize("jobs", [1, 2])
def test_fan_out_keeps_order_and_carries_errors(jobs: int) -> None:
    seen: list[int] = []
    assert fan_out(_shout, [(0,), (1,), (2,)], jobs, seen.append) == [0, 10, 20]
    assert seen == [1, 2, 3]
    with pytest.raises(PenstockError, match="three: not three") as caught:
        fan_out(_shout, [(1,), (3,)], jobs)
    assert caught.value.remedy == "not three"


def test_which_repeats_differ(tmp_path: Path) -> None:
    from penstock.workload.recording import write_recording
    from penstock.workload.synthetic import synthesize

    path = tmp_path / "t.jsonl"
    write_recording(synthesize("512/64", 20, 5.0), path)
    recorded = Setup(workload=WorkloadSetup(trace=str(path)))
    assert repeats_differ(Setup()) and not repeats_differ(recorded)
    assert repeats_differ(replace(recorded, truth=TruthSetup(noise=0.1)))
    assert repeats_differ(recorded.under("ares"))
