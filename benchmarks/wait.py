"""WAIT and Nested WAIT against first come, first served, where memory is about what the fluid model asks for.

Usage: python benchmarks/wait.py {near,nested,serve} [--seconds 30] [--seeds 2] [--jobs 2]

``near``: two types at 1,000 requests/s each; capacity from M* to 1.3 M*. ``nested``: lengths unknown; does the memory
bound hold, and what does throughput do as the horizon grows? ``serve``: a roofline engine with real lengths and rates,
where thresholds come from counted traffic. ``docs/results/wait.md`` explains and reports.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from penstock.experiment.build import run, with_policy
from penstock.experiment.repeat import fan_out
from penstock.experiment.setup import ClusterSetup, Setup, WorkloadSetup
from penstock.plan.fluid import Flow, StepCost, solve, whole_thresholds
from penstock.plan.fluid_check import Outcome, observe
from penstock.plan.nested import Segments, batch_tokens, bound
from penstock.plan.nested import whole_thresholds as nested_thresholds
from penstock.policy.engine import Batching
from penstock.policy.wait import CappedFcfs, WaitBatching
from penstock.policy.wait_nested import NestedWaitBatching
from penstock.policy.wait_traffic import gate
from penstock.report.metrics import summarize

FLOWS = (Flow(10, 10, 1000.0), Flow(10, 20, 1000.0))
COST = StepCost(0.010, 1e-6)
SHARES = (1.0, 1.085, 1.13, 1.3)
WARM_UP_S = 5.0
DELTA = 0.05
SEGMENTS = Segments(10, (10.0, 20.0), (1000.0, 1000.0))
# The same at a tenth of the rates and ten times the step, so that many runs are cheap.
SMALL = Segments(10, (10.0, 20.0), (100.0, 100.0))
SLOW = StepCost(0.100, 1e-5)


def wait_part(thresholds: tuple[int, ...], waits: bool = True) -> Batching:
    """WAIT with fixed thresholds for ``FLOWS``."""
    kinds = zip(FLOWS, thresholds, strict=True)
    return WaitBatching({k: gate(n, flow.stages()) for k, (flow, n) in enumerate(kinds)}, waits)


def running(thresholds: tuple[int, ...]) -> float:
    """Requests that thresholds let run at once."""
    return sum(n * flow.stages() for n, flow in zip(thresholds, FLOWS, strict=True))


def thresholds_within(capacity: float) -> tuple[int, ...]:
    """The smallest that keep up with a margin, or without one, or the largest that fit."""
    for margin in (0.03, 0.0):
        found = whole_thresholds(FLOWS, COST, margin)
        if sum(n * flow.held() for n, flow in zip(found, FLOWS, strict=True)) <= capacity:
            return found
    most = int(capacity // sum(flow.held() for flow in FLOWS))
    return (most, most)


def near_one(policy: str, share: float, seconds: float, seed: int) -> Outcome:
    """One run of ``near``."""
    capacity = int(share * solve(FLOWS, COST).memory_tokens)
    own = thresholds_within(capacity)
    parts: dict[str, Callable[[], Batching] | None] = {
        "wait": lambda: wait_part(own),
        "no-wait": lambda: wait_part(own, waits=False),
        "fcfs, same cap": lambda: CappedFcfs(running(own)),
        "fcfs": None,
    }
    return observe(FLOWS, COST, capacity, parts[policy], seconds, seed, WARM_UP_S)


def near(seconds: float, seeds: int, jobs: int, policies: list[str]) -> None:
    """Throughput, latency and evictions by capacity."""
    cells = [(policy, share) for share in SHARES for policy in policies]
    tasks = [(policy, share, seconds, seed) for policy, share in cells for seed in range(seeds)]
    found = fan_out(near_one, tasks, jobs)
    print("| C / M* | policy | throughput | latency, s | TTFT, s | peak KV | evictions/s |")
    print("|---|---|---|---|---|---|---|")
    for i, (policy, share) in enumerate(cells):
        rows = found[i * seeds : (i + 1) * seeds]
        mean = [sum(getattr(row, name) for row in rows) / seeds for name in ("throughput", "latency_s", "ttft_s")]
        peak, evicted = max(row.peak_tokens for row in rows), sum(row.evictions for row in rows) / seeds / seconds
        print(f"| {share:g} | {policy} | {100 * mean[0]:.1f} % | {mean[1]:.3f} | {mean[2]:.3f} | {peak:,} "
              f"| {evicted:.1f} |", flush=True)  # fmt: skip


def nested_part(thresholds: tuple[int, ...]) -> Batching:
    """Nested WAIT with fixed thresholds."""
    stages = SEGMENTS.stages()
    return NestedWaitBatching(
        [int(end) for end in SEGMENTS.ends], [gate(n, d) for n, d in zip(thresholds, stages, strict=True)]
    )


def nested_one(capacity: int, seconds: float, seed: int) -> Outcome:
    """One run of ``nested``."""
    own = nested_thresholds(SMALL, SLOW)
    return observe(SMALL.flows(), SLOW, capacity, lambda: nested_part(own), seconds, seed)


def nested(seconds: float, seeds: int, jobs: int) -> None:
    """Does the bound hold, and does throughput come up to the fluid's?"""
    own = nested_thresholds(SMALL, SLOW)
    batch = batch_tokens(SMALL, own)
    print(f"thresholds {own}, batch {batch:,.0f} KV tokens")
    print("| horizon, s | bound | peak KV, worst run | runs with evictions | throughput | latency, s |")
    print("|---|---|---|---|---|---|")
    for length in (seconds / 8, seconds / 4, seconds / 2, seconds):
        need = bound(SMALL, SLOW, own, length, DELTA).memory_tokens
        rows = fan_out(nested_one, [(int(need), length, seed) for seed in range(seeds)], jobs)
        print(f"| {length:g} | {need:,.0f} | {max(row.peak_tokens for row in rows):,} "
              f"| {sum(row.evictions > 0 for row in rows)} of {seeds} "
              f"| {100 * sum(row.throughput for row in rows) / seeds:.2f} % "
              f"| {sum(row.latency_s for row in rows) / seeds:.2f} |", flush=True)  # fmt: skip


def serve_one(policy: str, batching: str, cap: float, rate: float, requests: int) -> list[float]:
    """One run of ``serve``: attainment, P90 TTFT, mean TPOT, preemptions."""
    setup = Setup(
        workload=WorkloadSetup(synthetic="sharegpt", rate_rps=rate, requests=requests),
        cluster=ClusterSetup(model="llama-2-7b", hardware="a100-80g", mixed=1, kv_blocks=2048),
    )
    options: dict[str, float | str] = {} if policy == "mixed" else {"batching": batching, "cap": cap}
    result = run(with_policy(setup, policy, options), sample=False)
    figures = summarize(result, setup.slo.slo())
    latencies = [figures.ttft_s.p90 or math.nan, figures.tpot_s.mean or math.nan]
    return [figures.attainment, *latencies, float(result.instances.preemptions.sum())]


def serve(requests: int, jobs: int) -> None:
    """Thresholds from counted traffic on a small roofline engine, against plain replicas and the same cap."""
    cells = [("mixed", "", 0.0), ("wait", "wait", 0.0), ("wait", "fcfs", 0.0), ("nested-wait", "wait", 0.0)]
    cells += [(p, b, cap) for cap in (40.0, 80.0, 120.0) for p, b in (("nested-wait", "wait"), ("wait", "fcfs"))]
    print("| policy | cap | requests/s | attainment | P90 TTFT, s | mean TPOT, s | preemptions |")
    print("|---|---|---|---|---|---|---|")
    for rate in (4.0, 8.0, 12.0):
        found = fan_out(serve_one, [(*cell, rate, requests) for cell in cells], jobs)
        for (policy, batching, cap), row in zip(cells, found, strict=True):
            name = "fcfs" if batching == "fcfs" else policy
            print(f"| {name} | {cap:g} | {rate:g} | {100 * row[0]:.1f} % | {row[1]:.2f} | {row[2]:.4f} "
                  f"| {row[3]:.0f} |", flush=True)  # fmt: skip


def main() -> None:
    """Run one of the three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("near", "nested", "serve"))
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--policies", default="wait,no-wait,fcfs; same cap,fcfs", help="of near; with commas")
    given = parser.parse_args()
    if given.what == "near":
        names = [name.replace(";", ",") for name in given.policies.split(",")]
        near(given.seconds, given.seeds, given.jobs, names)
    elif given.what == "nested":
        nested(given.seconds, given.seeds, given.jobs)
    else:
        serve(given.requests, given.jobs)


if __name__ == "__main__":
    main()
