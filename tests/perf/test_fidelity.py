"""The replay against real vLLM runs: the published bounds hold, and the replay's scheduler keeps its books."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from .conftest import shared

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
fidelity = importlib.import_module("fidelity_vllm")
replaying = importlib.import_module("fidelity_replay")

# Bounds on the errors of means, percent: what docs/results/fidelity_vllm.md reports, and a little.
BOUNDS = {"TTFT": 4.0, "TPOT": 1.0, "E2E": 2.2}


@pytest.mark.parametrize("index", range(3))
def test_runs_are_met(index: int) -> None:
    root = shared("ground_truth")
    outcome = fidelity.study(root, fidelity.RUNS[index])
    for metric, bound in BOUNDS.items():
        assert abs(fidelity.error_percent(outcome, metric, "mean")) < bound, metric


def test_the_definitions_reproduce_the_published_column() -> None:
    root = shared("ground_truth")
    outcome = fidelity.study(root, fidelity.RUNS[2])
    # llmservingsim_validation_summary.txt of the Qwen3 run, column vLLM, ms.
    for metric, mean, p50, p99 in (
        ("TTFT", 1086.0, 138.8, 9587.9),
        ("TPOT", 47.3, 48.9, 53.3),
        ("E2E", 32344.6, 31462.3, 43901.1),
    ):
        for name, value in (("mean", mean), ("p50", p50), ("p99", p99)):
            assert round(1e3 * fidelity.statistic(outcome.measured[metric], name), 1) == value


@pytest.mark.parametrize("blocks", [40, 60, 1000])
def test_the_replay_loses_no_block_and_no_token(blocks: int) -> None:
    config = replaying.EngineConfig(max_num_seqs=8, max_num_batched_tokens=64, num_blocks=blocks)
    requests = [replaying.Request(i, 0.01 * i, 20 + 7 * (i % 9), 5 + 11 * (i % 5)) for i in range(40)]
    produced = 0

    def observe(start: float, end: float, batches: list[tuple[int, int, list[int], list[int]]]) -> None:
        nonlocal produced
        decodes, _, new, _ = batches[0]
        assert end > start
        assert decodes + sum(new) <= 64
        assert decodes + len(new) <= 8
        produced += decodes

    served = replaying.replay(requests, config, lambda batches: 0.01, 1, observe)
    for request in served:
        assert request.known == request.outputs
        assert request.arrival_s <= request.queued_s < request.first_s <= request.last_s
        assert request.blocks == []
    # Each first token comes from a prefill; so does the token after each preemption.
    assert produced >= sum(r.outputs - 1 - r.preempted for r in served)
    assert (sum(r.preempted for r in served) > 0) == (blocks == 40)


def test_asynchronous_scheduling_takes_two_steps_to_the_first_token() -> None:
    """A request seen when step N - 1 ends is computed in step N + 1: N is already running."""
    config = replaying.EngineConfig(max_num_seqs=8, max_num_batched_tokens=64, num_blocks=100)
    requests = [replaying.Request(0, 0.0, 16, 50), replaying.Request(1, 0.1005, 16, 2)]
    served = replaying.replay(requests, config, lambda batches: 0.01)
    late = served[1]
    assert late.queued_s == pytest.approx(0.11)
    assert late.first_s - late.queued_s == pytest.approx(0.02)
    # The first one found the engine idle: its own step only.
    assert served[0].first_s == pytest.approx(0.01)
    assert served[0].last_s - served[0].first_s == pytest.approx(0.49)
