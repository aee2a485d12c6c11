"""Starve one resource at a time; the diagnosis names it."""

from __future__ import annotations

import pytest

from penstock.core.errors import PenstockError
from penstock.experiment.binding import Diagnosis, explain
from penstock.experiment.build import run
from penstock.experiment.floors import check_reachable, floors, rounded_up
from penstock.experiment.setup import ClusterSetup, Setup, Target, WorkloadSetup, replace
from penstock.experiment.traffic import build_trace, slos
from penstock.report.metrics import summarize


def diagnose(rate: float, policy: str = "least-kv", slo: Target | None = None, **cluster: object) -> Diagnosis:
    """Run 400 requests on the cluster and explain."""
    setup = Setup(
        policy=policy,
        workload=WorkloadSetup(requests=400, rate_rps=rate),
        cluster=replace(ClusterSetup(), **cluster),
        slo=slo or Target(),
    )
    result = run(setup)
    return explain(setup, result.trace, summarize(result, slos(setup, result.trace)))


def test_nothing_binds_at_low_load() -> None:
    found = diagnose(2.0)
    assert found.binding == "nothing" and "P99 TTFT is" in found.text


def test_prefill_compute() -> None:
    found = diagnose(40.0, prefill=1, decode=4)
    assert found.binding == "prefill compute" and found.missed == "TTFT"
    assert found.over is not None and found.over > 2 and "add prefill instances" in found.text


def test_decode_memory_bandwidth() -> None:
    found = diagnose(30.0, prefill=8, decode=1, slo=Target(1.0, 0.013))
    assert found.binding == "decode memory bandwidth" and found.missed == "TPOT"


def test_kv_capacity() -> None:
    found = diagnose(20.0, prefill=4, decode=1, kv_blocks=1200)
    assert found.binding == "KV capacity"
    assert "KV" in diagnose(5.0, kv_blocks=60).binding  # most requests do not fit at all


def test_link() -> None:
    assert diagnose(8.0, prefill=4, decode=2, link_bytes_per_s=1e8).binding == "link"


def test_interference() -> None:
    found = diagnose(40.0, policy="mixed", slo=Target(None, 0.025))
    assert found.binding == "interference" and "disaggregate" in found.text


def test_a_prompt_too_long_for_the_target_is_no_matter_of_load() -> None:
    found = diagnose(0.5, slo=Target(0.1, None))
    assert found.binding == "prefill compute" and "at any load" in found.text


def test_floors_are_reached_by_a_lone_request() -> None:
    setup = Setup(workload=WorkloadSetup(synthetic="1000/50", requests=5, rate_rps=0.1))
    result = run(setup)
    m = summarize(result, slos(setup, result.trace))
    f = check_reachable(setup)
    assert m.ttft_s.p50 == pytest.approx(f.ttft_p50_s, rel=1e-6)
    assert m.itl_s.p50 == pytest.approx(f.tpot_p50_s, rel=0.01)
    assert (
        m.decode_wait_s.p50 is not None and f.transfer_p50_s < m.decode_wait_s.p50 < f.transfer_p50_s + 3 * f.tpot_p50_s
    )


def test_an_slo_below_the_floor_names_floor_resource_and_remedy() -> None:
    with pytest.raises(PenstockError) as caught:
        check_reachable(Setup(slo=Target(1.0, 0.006)))
    assert "memory bandwidth binds" in str(caught.value) and "--tp" in caught.value.remedy
    with pytest.raises(PenstockError, match="no hardware tried meets it"):
        check_reachable(Setup(slo=Target(1.0, 1e-5)))
    check_reachable(Setup(workload=WorkloadSetup(synthetic="100/1", requests=3), slo=Target(1.0, 1e-5)))


def test_floors_of_mixed_instances_have_no_transfer() -> None:
    from penstock.experiment.build import build_cluster

    setup = Setup(policy="mixed")
    assert floors(build_cluster(setup), build_trace(setup)).transfer_p50_s == 0.0


@pytest.mark.parametrize(("x", "text"), [(9.13e-3, "9.2 ms"), (0.0123, "13 ms"), (1.5, "1.5 s"), (8.2e-3, "8.2 ms")])
def test_rounding_up(x: float, text: str) -> None:
    assert rounded_up(x) == text
