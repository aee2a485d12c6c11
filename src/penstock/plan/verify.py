"""The answer, simulated: does a split hold both targets at the demand, and up to which rate?

With a step model, the simulator runs the whole cluster under one of the product's policies. With benchmark figures it
runs the queues that the formula assumes: each prefill instance one prompt at a time (exponential service for
``mm1``), decode steps as slow as the ladder says. Every rate and every split sees the same requests (common random
numbers).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec
import numpy as np

from penstock.core.types import Slo
from penstock.experiment.build import run
from penstock.experiment.goodput import highest_rate
from penstock.experiment.repeat import Done, fan_out
from penstock.experiment.setup import Setup, replace
from penstock.plan.closed_form import Answer, Case
from penstock.plan.tandem import simulate_benchmark
from penstock.report.metrics import Verdicts
from penstock.report.repeat import Interval, interval
from penstock.sim.result import SimResult

WARM_UP = 0.25
"""Requests that arrive in this share of the run, from its start, are not judged: the batches fill up meanwhile."""
TOLERANCE = 0.01
WIDEST = 8.0
GENTLE = 4
"""The search doubles the fourth power of the rate: steps of 19 %, because runs far beyond capacity take long."""
LIVES = 6.0
"""A run lasts so many times the longest request, so that batches have filled up before most are judged."""
MOST_REQUESTS = 30_000


class Latency(msgspec.Struct, frozen=True):
    """TTFT and TPOT (mean or percentile over the judged requests), seconds; inf for requests that did not finish."""

    ttft_s: float
    tpot_s: float


class Goal(msgspec.Struct, frozen=True):
    """What a run is judged by: the demand, both targets, and how they are meant (see :class:`Case`).

    Apart from the case, because compiled step models do not survive the trip to another process.
    """

    rate_rps: float
    ttft_s: float
    tpot_s: float
    percentile: float | None
    overhead_s: float


class Check(msgspec.Struct, frozen=True):
    """One split: what the formulas say, and what the simulator says (intervals over seeds, 95 %).

    Capacities in requests/s; ``ratio`` is predicted over simulated capacity. ``ttft_s`` and ``tpot_s`` are simulated
    at the demand, None where they grow without end; ``predicted_`` ones are the formulas' (None: unstable, or outside
    the ladder).
    """

    prefill: int
    decode: int
    predicted_rps: float
    simulated_rps: Interval
    ratio: float | None
    predicted_ttft_s: float | None
    ttft_s: Interval | None
    predicted_tpot_s: float | None
    tpot_s: Interval | None
    holds: bool
    missed: str


def splits(prefill: int, decode: int) -> list[tuple[int, int]]:
    """The split and its neighbours, one instance more or fewer of either kind, none without instances."""
    near = [
        (prefill, decode),
        (prefill + 1, decode),
        (prefill, decode + 1),
        (prefill - 1, decode),
        (prefill, decode - 1),
    ]
    return [(p, d) for p, d in near if p >= 1 and d >= 1]


def verify(
    case: Case,
    answer: Answer,
    chosen: list[tuple[int, int]],
    setup: Setup | None,
    seeds: list[int],
    requests: int,
    jobs: int = 0,
    done: Done | None = None,
) -> list[Check]:
    """Simulate each split of ``chosen``: a search for its capacity per seed, and a run at the demand.

    Parameters
    ----------
    setup : Setup or None
        The cluster of a step model (its numbers of instances and rate are replaced); None for a benchmark.
    requests : int
        Of each run, where they are drawn.
    """
    goal = Goal(case.rate_rps, case.ttft_s, case.tpot_s, case.percentile, case.overhead_s)
    world = case if setup is None else setup
    tasks = [(world, goal, p, d, seed, requests, answer.capacity_rps(p, d)) for p, d in chosen for seed in seeds]
    found = fan_out(_measure, tasks, jobs, done)
    checks = []
    for i, (p, d) in enumerate(chosen):
        checks.append(_check(case, answer, p, d, found[i * len(seeds) : (i + 1) * len(seeds)]))
    return checks


def _check(case: Case, answer: Answer, p: int, d: int, runs: list[tuple[float, Latency, str]]) -> Check:
    predicted = answer.capacity_rps(p, d)
    simulated = interval([rate for rate, _, _ in runs])
    at = [latency for _, latency, _ in runs]
    ttft = case.ttft_at(case.rate_rps, p)
    tpot = case.tpot_at(case.rate_rps, d)
    return Check(
        p,
        d,
        predicted,
        simulated,
        predicted / simulated.mean if simulated.mean > 0 else None,
        ttft if math.isfinite(ttft) else None,
        _finite([x.ttft_s for x in at]),
        tpot,
        _finite([x.tpot_s for x in at]),
        all(x.ttft_s <= case.ttft_s and x.tpot_s <= case.tpot_s for x in at),
        max((missed for _, _, missed in runs), key=[missed for _, _, missed in runs].count),
    )


def _finite(values: list[float]) -> Interval | None:
    return interval(values) if all(math.isfinite(x) for x in values) else None


def _measure(
    source: Case | Setup, goal: Goal, p: int, d: int, seed: int, requests: int, start_rps: float
) -> tuple[float, Latency, str]:
    """Capacity of one split and seed, the latencies at the demand, and the target missed just above the capacity."""
    world = simulator(source, p, d, seed, requests)
    seen: dict[float, Latency] = {}

    def rate_of(x: float) -> float:
        return start_rps * float(x ** (1 / GENTLE))

    def holds(x: float) -> float:
        seen[x] = latency_of(world(rate_of(x)), goal)
        return float(seen[x].ttft_s <= goal.ttft_s and seen[x].tpot_s <= goal.tpot_s)

    search = highest_rate(holds, 1.0, 1.0, (1 + TOLERANCE) ** GENTLE - 1, WIDEST**GENTLE)
    at_demand = latency_of(world(goal.rate_rps), goal)
    missed = "none"
    if search.above_rps is not None:
        above = seen[search.above_rps]
        missed = "TTFT" if above.ttft_s / goal.ttft_s >= above.tpot_s / goal.tpot_s else "TPOT"
    return 0.0 if search.rate_rps is None else rate_of(search.rate_rps), at_demand, missed


def simulator(source: Case | Setup, p: int, d: int, seed: int, requests: int) -> Callable[[float], SimResult]:
    """A function from a rate (requests/s) to a finished simulation of ``p`` prefill and ``d`` decode instances.

    ``source`` is the case of a benchmark, or the setup of a step model's cluster.
    """
    if isinstance(source, Case):
        return lambda rate_rps: simulate_benchmark(source, p, d, rate_rps, seed, requests)
    setup, w, c = source, source.workload, source.cluster
    there = replace(
        setup,
        workload=replace(w, requests=requests if w.requests is None and w.trace is None else w.requests),
        cluster=replace(c, prefill=p, decode=d, mixed=0),
    )
    return lambda rate_rps: run(there.at_rate(rate_rps), seed, sample=False)


def latency_of(result: SimResult, goal: Goal) -> Latency:
    """Mean (or percentile) of TTFT, with the goal's overhead, and of TPOT. A request that did not finish counts as inf.

    Judged are the requests that arrive after ``WARM_UP`` of the run.
    """
    v = Verdicts(result, Slo())
    arrival = result.trace.arrival_s
    judged = arrival >= WARM_UP * arrival[-1]
    ttft = np.where(np.isnan(v.ttft_s), np.inf, v.ttft_s)[judged]
    tpot = np.where(v.finished, v.tpot_s, np.inf)[judged]
    tpot = tpot[~np.isnan(tpot)]  # of one token: has none
    q = goal.percentile

    def of(values: np.ndarray) -> float:
        if not len(values):
            return 0.0
        if q is None:
            return float(values.mean())
        return float(np.quantile(values, q / 100, method="higher"))

    return Latency(of(ttft) + goal.overhead_s, of(tpot))


def requests_for(case: Case, capacity_rps: float, at_least: int) -> int:
    """Requests of a run that lasts ``LIVES`` of the longest request at the planned capacity, within bounds."""
    longest_s = float(case.outputs.max()) * min(case.tpot_s, case.decode.ladder.tpot_s[-1])
    return int(min(max(at_least, LIVES * longest_s * capacity_rps), MOST_REQUESTS))
