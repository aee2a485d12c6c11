"""The simulator against what is known in closed form."""

from __future__ import annotations

import numpy as np
import pytest

from penstock.core.types import Role, Slo
from penstock.perf.step import LinearStepModel
from penstock.policy.parts import Beliefs, Policy
from penstock.sim.cluster import ClusterSpec, InstanceSpec
from penstock.sim.result import SimResult
from penstock.sim.run import simulate
from penstock.workload.trace import Trace
from tests.sim.support import Turns, trace_of

MEAN_TOKENS = 100_000


def one_server_queue(n: int, rho: float, exponential: bool, seed: int) -> tuple[Trace, SimResult]:
    """One prefill instance that takes one prompt at a time: a single-server queue with mean service time 1 s."""
    rng = np.random.default_rng(seed)
    arrival = np.cumsum(rng.exponential(1 / rho, n))
    prompt = np.ceil(rng.exponential(MEAN_TOKENS, n)).astype(np.int64) if exponential else np.full(n, MEAN_TOKENS)
    trace = Trace(arrival - arrival[0], prompt, np.ones(n, np.int64), np.zeros(n, np.int16))
    model = LinearStepModel(0.0, per_prefill_s=1 / MEAN_TOKENS)
    spec = InstanceSpec(Role.PREFILL, model, 10**6, 16, max_num_seqs=1, max_num_batched_tokens=10**8)
    policy = Policy("queue", Turns(Role.PREFILL), Turns(Role.DECODE))
    return trace, simulate(trace, ClusterSpec((spec,), 1.0), policy, Beliefs(model, 1.0, 1e9), Slo())


def waits(trace: Trace, result: SimResult) -> np.ndarray:
    return result.requests.prefill_start_s - trace.arrival_s


@pytest.mark.parametrize("exponential", [True, False])
def test_every_wait_obeys_lindley(exponential: bool) -> None:
    """W(i+1) = max(0, W(i) + S(i) - A(i+1)), request by request (Lindley 1952)."""
    trace, result = one_server_queue(5000, 0.8, exponential, seed=1)
    service = trace.prompt_tokens / MEAN_TOKENS
    expected = np.zeros(len(trace))
    for i in range(1, len(trace)):
        gap = trace.arrival_s[i] - trace.arrival_s[i - 1]
        expected[i] = max(0.0, expected[i - 1] + service[i - 1] - gap)
    np.testing.assert_allclose(waits(trace, result), expected, atol=1e-7)


@pytest.mark.parametrize("rho", [0.5, 0.8])
@pytest.mark.parametrize("exponential", [True, False], ids=["M/M/1", "M/D/1"])
def test_mean_wait(exponential: bool, rho: float) -> None:
    """Pollaczek-Khinchine: rho / (1 - rho) for M/M/1 and half of it for M/D/1, in units of the service time.

    The mean over several long runs: at rho = 0.8 one M/M/1 run of 100,000 requests has a standard error of 5 %.
    """
    seeds = (12 if exponential else 8) if rho > 0.5 else 3
    runs = [waits(*one_server_queue(100_000, rho, exponential, seed)).mean() for seed in range(seeds)]
    theory = rho / (1 - rho) * (1.0 if exponential else 0.5)
    assert np.mean(runs) == pytest.approx(theory, rel=0.02)


def test_fcfs_cascade_of_the_wait_paper() -> None:
    """Prompt 1, two iterations a request, memory 12, four arrivals an iteration (WAIT, arXiv 2504.11320, toy).

    A fluid schedule completes 4 an iteration. First-come-first-served, started with 6 requests at stage 0 and 3 at
    stage 1, admits too many, evicts, and completes 3 to 3.5.
    """
    iterations = 400
    arrival: list[float] = [0.0] * 3 + [0.25] * 6
    for k in range(iterations):
        arrival += [0.5 + k + 0.001 * j for j in range(4)]
    n = len(arrival)
    trace = trace_of(arrival, [1] * n, [2] * n)
    model = LinearStepModel(1.0)
    spec = InstanceSpec(
        Role.MIXED, model, 12, block_size=1, max_num_seqs=64, max_num_batched_tokens=64, restart_evicted=True
    )
    policy = Policy("fcfs", Turns(Role.MIXED))
    result = simulate(trace, ClusterSpec((spec,), 1.0), policy, Beliefs(model, 1.0, 1e9), Slo())
    finish = result.requests.finish_s
    completions = ((finish > 20) & (finish <= iterations)).sum() / (iterations - 20)
    assert 3.0 <= completions <= 3.5
