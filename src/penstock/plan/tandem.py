"""The queues that the closed form assumes, in the simulator: measured figures instead of a step model.

Prefill takes prompts one at a time at the measured throughput; decode steps take what the ladder says for their
batch; handing over takes no time (the overhead of TTFT stands for it).
"""

from __future__ import annotations

from typing import cast

import numpy as np

from penstock.core.types import Role, Slo
from penstock.perf.step import LinearStepModel, StepModel
from penstock.plan.closed_form import Case
from penstock.plan.ladder import Ladder
from penstock.plan.machine import Benchmark
from penstock.policy.latency import PrefillFit
from penstock.policy.parts import Beliefs, Choice, Policy, PrefillPlacement
from penstock.policy.placement import FewestRequests, LeastPrefillWork
from penstock.policy.view import ClusterView, RequestRecord
from penstock.sim.cluster import ClusterSpec, InstanceSpec
from penstock.sim.result import SimResult
from penstock.sim.run import simulate
from penstock.workload.arrivals import gamma_arrivals
from penstock.workload.trace import Trace

UNBOUNDED = 10**9
"""Tokens and blocks of an instance that neither memory nor the scheduler limits."""
MOST_RUNNING = 100_000


class LadderStepModel(StepModel):
    """Decode steps by batch, linear between the rungs, the first and last segments continued beyond them.

    Only a simulation may leave the ladder: it must go on when a batch overflows, and the target is missed there.
    """

    def __init__(self, ladder: Ladder) -> None:
        self.batch = np.array(ladder.batch)
        self.tpot = np.array(ladder.tpot_s)
        self._known: dict[int, float] = {}

    def step_s(self, decodes: int, context: int, chunk_new: list[int], chunk_past: list[int]) -> float:
        """See :class:`StepModel`. Prompts cost nothing: a decode instance of this model gets none."""
        if decodes == 0:
            return 0.0
        known = self._known.get(decodes)
        if known is None:
            known = self._known[decodes] = self._at(decodes)
        return known

    def decode_affine(self, decodes: int, context: int) -> tuple[float, float, float]:
        """See :class:`StepModel`. The ladder was measured at one context."""
        return self.step_s(decodes, context, [], []), 0.0, float("inf")

    def _at(self, decodes: int) -> float:
        i = int(np.clip(np.searchsorted(self.batch, decodes), 1, len(self.batch) - 1))
        slope = (self.tpot[i] - self.tpot[i - 1]) / (self.batch[i] - self.batch[i - 1])
        # Never below half of the lowest rung: a steep first segment would cross zero.
        return max(float(self.tpot[i] + slope * (decodes - self.batch[i])), float(self.tpot[0]) / 2)


class RandomPrefill(PrefillPlacement):
    """Any prefill instance with equal probability: splits Poisson arrivals into independent Poisson streams."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng([seed, 7])

    def place(self, request: RequestRecord, view: ClusterView, now_s: float) -> Choice:
        """See :class:`PrefillPlacement`."""
        rows = view.prefills
        return Choice(int(rows[int(self._rng.integers(len(rows)))]) if len(rows) else -1, len(rows) > 0)


def benchmark_trace(case: Case, rate_rps: float, seed: int, requests: int) -> Trace:
    """``requests`` drawn at a rate: prompts exponential for ``mm1``, equal for ``md1``, else those of the case."""
    arrivals, lengths = (np.random.default_rng([seed, stream]) for stream in (0, 1))
    arrival = gamma_arrivals(requests, rate_rps, case.arrival_cv, arrivals)
    rows = lengths.integers(0, len(case.prompts), requests)
    prompts, outputs = case.prompts[rows], case.outputs[rows]
    if case.queue == "mm1":
        prompts = lengths.exponential(case.isl, requests)
    elif case.queue == "md1":
        prompts = np.full(requests, case.isl)
    return Trace(
        arrival,
        np.maximum(np.rint(prompts), 1).astype(np.int64),
        np.maximum(np.rint(outputs), 1).astype(np.int64),
        np.zeros(requests, np.int16),
        source=f"{case.queue}, {rate_rps:g} requests/s, seed {seed}",
    )


def simulate_benchmark(case: Case, p: int, d: int, rate_rps: float, seed: int, requests: int) -> SimResult:
    """``p`` prefill and ``d`` decode instances with the measured figures of the case's benchmark."""
    bench = cast(Benchmark, case.machine)
    prefill = LinearStepModel(0.0, per_prefill_s=1 / bench.prefill_tps)
    decode = LadderStepModel(bench.ladder)
    one = InstanceSpec(Role.PREFILL, prefill, UNBOUNDED, 1, 1, UNBOUNDED, 1e18, prefix_caching=False)
    many = InstanceSpec(Role.DECODE, decode, UNBOUNDED, 1, MOST_RUNNING, UNBOUNDED, 1e18, prefix_caching=False)
    cluster = ClusterSpec((one,) * p + (many,) * d, kv_bytes_per_token=1.0, link_latency_s=0.0)
    beliefs = Beliefs(prefill, 1.0, 1e18)
    place = LeastPrefillWork(PrefillFit(beliefs)) if case.queue == "pooled" else RandomPrefill(seed)
    policy = Policy("tandem", place, FewestRequests())
    trace = benchmark_trace(case, rate_rps, seed, requests)
    return simulate(trace, cluster, policy, beliefs, Slo())
