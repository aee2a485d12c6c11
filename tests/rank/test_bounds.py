"""No simulation beats a bound, and bounds are not idle."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from penstock.core.types import Role
from penstock.experiment.build import build, build_cluster, run, with_policy
from penstock.experiment.goodput import goodput
from penstock.experiment.setup import ClusterSetup, Setup, Target, TruthSetup, WorkloadSetup, replace
from penstock.experiment.traffic import slos
from penstock.policy.registry import PRESETS
from penstock.rank.bounds import FREE, Bound, Bounds, load_of
from penstock.report.metrics import Verdicts


def bound(setup: Setup, goal: float, seed: int = 0) -> Bound:
    return Bounds(setup, [seed], goal).of(setup, "one kind")[0]


def attained(setup: Setup, rate: float, seed: int = 0) -> float:
    result = run(setup.at_rate(rate), seed, sample=False)
    return float(Verdicts(result, slos(setup, result.trace)).met.mean())


@st.composite
def small_setups(draw: st.DrawFn) -> tuple[Setup, float, int]:
    """A small cluster of the roofline with targets near what it can do, a goal, and a seed."""
    mixed = draw(st.booleans())
    lengths = draw(st.sampled_from(["azure-conv", "azure-code", "512/64", "100-3000/1-40", "50-400/100-600"]))
    whole = draw(st.booleans()) and mixed
    cluster = ClusterSetup(
        prefill=0 if mixed else draw(st.integers(1, 3)),
        decode=0 if mixed else draw(st.integers(1, 3)),
        mixed=draw(st.integers(1, 3)) if mixed else 0,
        prefill_tp=draw(st.sampled_from([1, 2])),
        decode_tp=draw(st.sampled_from([1, 4])),
        max_num_seqs=draw(st.sampled_from([4, 32, 256])),
        max_num_batched_tokens=16384 if whole else draw(st.sampled_from([256, 2048, 8192])),
        chunked_prefill=not whole,
        kv_blocks=draw(st.sampled_from([None, 1500])),
        link_bytes_per_s=draw(st.sampled_from([None, 2e9])),
        async_scheduling=draw(st.booleans()),
    )
    ttft, tpot = draw(st.sampled_from([0.2, 1.0, None])), draw(st.sampled_from([0.012, 0.03, 0.1, None]))
    setup = Setup(
        policy="mixed" if mixed else draw(st.sampled_from(["least-kv", "static", "ares-oracle"])),
        workload=WorkloadSetup(synthetic=lengths, requests=150, cv=draw(st.sampled_from([0.0, 1.0, 3.0]))),
        cluster=cluster,
        slo=Target(ttft, tpot),
    )
    return setup, draw(st.sampled_from([0.5, 0.9, 1.0])), draw(st.integers(0, 99))


@settings(max_examples=80, deadline=None)
@given(small_setups(), st.floats(1.0, 4.0))
def test_no_rate_above_the_bound_meets_the_goal(case: tuple[Setup, float, int], factor: float) -> None:
    setup, goal, seed = case
    found = bound(setup, goal, seed)
    event(found.resource or "no bound")
    if found.rate_rps == 0:
        assert attained(setup, 0.05, seed) < goal
    elif np.isfinite(found.rate_rps):
        assert attained(setup, found.rate_rps * 1.0001 * factor, seed) < goal


@pytest.mark.parametrize(
    ("cluster", "workload", "slo", "resource", "share"),
    [
        (ClusterSetup(prefill=1, decode=3), "2000/2", Target(0.5, None), "prefill time", 0.95),
        (ClusterSetup(prefill=4, decode=1), "200/100", Target(None, 0.02), "", 0.0),
        (ClusterSetup(prefill=6, decode=1), "200/100", Target(1.0, 0.02), "decode time", 0.85),
        (ClusterSetup(prefill=6, decode=1, max_num_seqs=8), "200/100", Target(1.0, 0.02), "batch slots", 0.9),
        (ClusterSetup(prefill=6, decode=1, kv_blocks=200), "200/100", Target(1.0, 0.02), "KV capacity", 0.8),
        (ClusterSetup(prefill=6, decode=1, link_bytes_per_s=2e9), "1000/50", Target(1.0, 0.1), "link", 0.95),
        (ClusterSetup(mixed=1), "1000/100", Target(1.0, 0.04), "mixed time", 0.85),
        (ClusterSetup(mixed=1, max_num_batched_tokens=512), "1000/100", Target(1.0, 0.04), "mixed time", 0.95),
    ],
)
def test_bounds_are_near_where_one_resource_binds(
    cluster: ClusterSetup, workload: str, slo: Target, resource: str, share: float
) -> None:
    """Regular arrivals of equal requests: the goodput comes close to the bound of what is short."""
    policy = "mixed" if cluster.mixed else "least-kv"
    setup = Setup(
        policy=policy, workload=WorkloadSetup(synthetic=workload, requests=5000, cv=0.0), cluster=cluster, slo=slo
    )
    found = bound(setup, 1.0)
    assert found.resource == resource
    if not resource:
        assert found.rate_rps == np.inf
        return
    reached = goodput(setup, 0, 1.0, 0.02, bound_rps=found.rate_rps).rate_rps
    assert reached is not None
    assert share * found.rate_rps <= reached < found.rate_rps


def test_a_search_that_starts_at_its_bound_finds_the_same() -> None:
    setup = Setup(workload=WorkloadSetup(requests=300), slo=Target(0.5, 0.03))
    free = goodput(setup, 1, tolerance=0.01)
    bounded = goodput(setup, 1, tolerance=0.01, bound_rps=bound(setup, 0.9, 1).rate_rps)
    assert free.rate_rps is not None and bounded.rate_rps is not None
    assert bounded.rate_rps == pytest.approx(free.rate_rps, rel=0.02)
    assert len(bounded.evaluations) <= len(free.evaluations)


def test_a_target_that_few_can_meet_is_out_of_reach() -> None:
    setup = Setup(workload=WorkloadSetup(synthetic="100-4000/10", requests=200), slo=Target(0.05, None))
    found = bound(setup, 0.9)
    assert found == Bound(0.0, "TTFT of a request alone")
    assert attained(setup, 0.01) < 0.9


def test_nothing_is_said_where_nothing_is_known() -> None:
    setup = Setup(workload=WorkloadSetup(requests=100), slo=Target(0.5, 0.03))
    unknown = [
        replace(setup, truth=TruthSetup(noise=0.1)),
        replace(setup, policy="arrow"),
        replace(setup, workload=WorkloadSetup(synthetic="azure-conv@30x4,azure-code@30", requests=100)),
    ]
    assert [bound(one, 0.9).rate_rps for one in unknown] == [np.inf] * 3
    assert np.isfinite(bound(replace(setup, workload=WorkloadSetup(requests=2000)), 0.9).rate_rps)


def test_shared_prefixes_are_not_charged_twice(tmp_path: Path) -> None:
    """Requests of one prefix: only the first computes it; the bound must leave room for that."""
    trace = tmp_path / "shared.jsonl"
    row = {"input_length": 2000, "output_length": 4, "hash_ids": [1, 2, 3]}
    trace.write_text("\n".join(json.dumps({"timestamp": 100 * i, **row}) for i in range(400)))
    setup = Setup(workload=WorkloadSetup(trace=str(trace)), slo=Target(0.5, 0.05))
    load = load_of(setup, 0)
    assert load is not None
    assert load.computed[0] == 2000 and (load.computed[1:] == 2000 - 3 * 512).all()
    found = bound(setup, 0.9)
    apart = bound(replace(setup, cluster=replace(setup.cluster, prefix_caching=False)), 0.9)
    assert apart.rate_rps < found.rate_rps
    assert attained(setup, 1.01 * apart.rate_rps) >= 0.9 > attained(setup, 1.01 * found.rate_rps)


@pytest.mark.parametrize("name", list(PRESETS))
def test_nothing_is_said_of_policies_that_the_bounds_do_not_cover(name: str) -> None:
    setup = with_policy(Setup(cluster=ClusterSetup(hardware="h100", prefill=1, decode=1)), name)
    policy, _ = build(setup, build_cluster(setup))
    shares = policy.engine is not None and policy.engine.parts(0, Role.MIXED).sharing is not None
    assert (name in FREE) == (policy.roles is not None or shares)
