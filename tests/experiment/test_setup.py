"""A setup is data: it survives JSON, and equal setups give equal worlds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from penstock.core.errors import PenstockError
from penstock.core.types import MigrationLevel, Role
from penstock.experiment.build import build_beliefs, build_cluster, digests, lengths, roles, run
from penstock.experiment.parse import faults
from penstock.experiment.setup import (
    BeliefSetup,
    ClusterSetup,
    Setup,
    Target,
    TruthSetup,
    WorkloadSetup,
    check,
    replace,
    setup_from_plain,
)
from penstock.experiment.traffic import build_trace, slos
from penstock.predict.simulated import LengthOracle, NoisyOracle
from penstock.workload.recording import write_recording
from penstock.workload.synthetic import synthesize

RICH = Setup(
    policy="ares",
    options={"horizon": 100.0, "predictor": "history"},
    workload=WorkloadSetup(synthetic="512/128", requests=50, rate_rps=4.0, cv=2.0, classes={"a": 0.5, "b": 0.5}),
    cluster=ClusterSetup(prefill=1, decode=3, tp=2, decode_hardware="h100", migration_level=MigrationLevel.HANDOFF),
    slo=Target(None, 0.04),
    slo_classes={"a": Target(0.5, None)},
    truth=TruthSetup(noise=0.1, faults=faults("down:3@5s,up:3@9s,slow:1x2@1s"), predictor="oracle", until_s=90.0),
    belief=BeliefSetup(error=1.3),
    seed=7,
)


def test_json_round_trip() -> None:
    assert setup_from_plain(json.loads(msgspec.json.encode(RICH.plain()))) == RICH
    assert setup_from_plain(Setup().plain()) == Setup()


@pytest.mark.parametrize("content", [{"polcy": "ares"}, {"cluster": {"tp": "two"}}, {"cluster": {"prefill": -1}}, 3])
def test_what_is_no_setup_is_refused(content: Any) -> None:
    with pytest.raises(PenstockError):
        setup_from_plain(content)


def test_traces_depend_on_workload_and_seed_only() -> None:
    one, two = build_trace(RICH), build_trace(RICH.under("mixed"))
    assert np.array_equal(one.arrival_s, two.arrival_s) and np.array_equal(one.slo_class, two.slo_class)
    assert not np.array_equal(one.arrival_s, build_trace(RICH, 8).arrival_s)


def test_another_rate_brings_the_same_requests_closer_together() -> None:
    slow, fast = build_trace(RICH.at_rate(2.0)), build_trace(RICH.at_rate(6.0))
    assert np.array_equal(slow.output_tokens, fast.output_tokens)
    assert np.allclose(slow.arrival_s, 3.0 * fast.arrival_s)


def test_cv_redraws_the_arrivals_of_a_recorded_trace(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    write_recording(synthesize("512/128", 400, 5.0, cv=0.0), path)
    kept = Setup(workload=WorkloadSetup(trace=str(path)))
    drawn = Setup(workload=WorkloadSetup(trace=str(path), cv=1.0))
    assert np.allclose(np.diff(build_trace(kept).arrival_s), 0.2)
    gaps = np.diff(build_trace(drawn).arrival_s)
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, abs=0.15)
    assert "drawn anew" in build_trace(drawn).notes[-1]


def test_roles_follow_the_policy() -> None:
    p, d, m = Role.PREFILL, Role.DECODE, Role.MIXED
    setup = Setup(cluster=ClusterSetup(prefill=1, decode=2))
    assert roles(setup) == [p, d, d]
    assert roles(setup.under("mixed")) == [m, m, m]
    assert roles(Setup(cluster=ClusterSetup(prefill=0, decode=0, mixed=2)).under("mixed")) == [m, m]
    with pytest.raises(PenstockError, match="needs prefill and decode"):
        roles(Setup(cluster=ClusterSetup(prefill=0, decode=0, mixed=2)))


def test_cluster_follows_hardware_and_overrides() -> None:
    cluster = build_cluster(RICH)
    prefill, decode = cluster.instances[0], cluster.instances[1]
    assert prefill.step_model is not decode.step_model
    assert decode.step_model.step_s(1, 1000, [], []) < prefill.step_model.step_s(1, 1000, [], [])
    assert cluster.migration_level is MigrationLevel.HANDOFF
    c = replace(RICH.cluster, kv_blocks=77, link_bytes_per_s=1e9)
    small = build_cluster(replace(RICH, cluster=c))
    assert {s.capacity_blocks for s in small.instances} == {77} and {s.link_bytes_per_s for s in small.instances} == {
        1e9
    }


def test_beliefs_are_the_truth_unless_spoiled() -> None:
    plain, spoiled = Setup(), replace(Setup(), belief=BeliefSetup(error=1.5))
    cluster = build_cluster(plain)
    truth, belief = build_beliefs(plain, cluster), build_beliefs(spoiled, cluster)
    assert truth.step is cluster.instances[0].step_model
    assert belief.prefill_s(1000) == pytest.approx(1.5 * truth.prefill_s(1000))
    assert belief.decode_step_s(8, 8000) == pytest.approx(1.5 * truth.decode_step_s(8, 8000))
    intercept, slope, _ = belief.step.decode_affine(8, 8000)
    assert intercept + slope * 8000 == pytest.approx(belief.decode_step_s(8, 8000))
    other = replace(plain, belief=BeliefSetup(profile="rtx-4090/llama-3.1-8b"))
    assert build_beliefs(other, cluster).decode_step_s(1, 1000) > truth.decode_step_s(1, 1000)


def test_the_world_predicts_lengths_only_where_the_preset_wants_it() -> None:
    assert lengths(Setup(), 0) is None
    assert isinstance(lengths(Setup().under("ares"), 0), NoisyOracle)
    oracle = lengths(Setup().under("ares-oracle"), 0)
    assert type(oracle) is LengthOracle
    assert lengths(replace(Setup(policy="ares"), truth=TruthSetup(predictor="none")), 0) is None


def test_slo_by_class() -> None:
    found = slos(RICH, build_trace(RICH))
    assert found["a"].ttft_s == 0.5 and found["a"].tpot_s == float("inf") and found["b"].tpot_s == 0.04


def test_a_rich_setup_runs_the_same_twice() -> None:
    first, second = run(RICH), run(RICH)
    assert np.array_equal(first.requests.finish_s, second.requests.finish_s, equal_nan=True)
    assert len(first.requests.outcome) == 50 and first.timeline is not None
    blind = run(RICH, sample=False)
    assert blind.timeline is None
    assert np.array_equal(first.requests.finish_s, blind.requests.finish_s, equal_nan=True)


def test_digests_name_files_only(tmp_path: Path) -> None:
    assert digests(Setup()) == {}
    path = tmp_path / "config.json"
    path.write_text("{}")
    assert list(digests(Setup(cluster=ClusterSetup(model=str(tmp_path))))) == [str(path)]


def test_check_refuses_a_fault_of_no_instance() -> None:
    with pytest.raises(PenstockError, match="instance 9"):
        check(replace(Setup(), truth=TruthSetup(faults=faults("down:9@1s"))))
