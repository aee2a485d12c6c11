"""Queues that know lengths against first come, first served, near and above saturation.

Usage: python benchmarks/length_order.py {orders,share,guard,pools} [--seeds 3] [--requests 1000] [--rates 28,31,34]

``orders``: FCFS, SJF and TRAIL with exact, noisy and no predictions. ``share``: TRAIL's C. ``guard``: the longest waits
with the starvation guard. ``pools``: the same orders under ``least-kv`` on prefill and decode instances.

TRAIL (arXiv 2410.01035) has Llama-3-8B on one A100-80G and Alpaca requests; the lengths here are log-normal in its
range, and the batch is held at 64 so that it saturates. ``docs/results/length_order.md`` explains and reports.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import numpy as np

from penstock.core.types import Role, Slo
from penstock.experiment.repeat import fan_out
from penstock.perf.hardware import hardware_spec
from penstock.perf.kv import kv_bytes_per_token, kv_capacity
from penstock.perf.models import model_spec
from penstock.perf.roofline import RooflineStepModel
from penstock.policy.options import OptionValue
from penstock.policy.parts import Beliefs
from penstock.policy.registry import build_policy
from penstock.predict.simulated import LengthOracle, NoisyOracle
from penstock.sim.cluster import ClusterSpec, InstanceSpec
from penstock.sim.run import simulate
from penstock.workload.arrivals import gamma_arrivals
from penstock.workload.trace import Trace

MODEL, CARD, BATCH = "llama-3.1-8b", "a100-80g", 64
PROMPTS, OUTPUT_MEDIAN, OUTPUT_SIGMA, OUTPUT_MOST = (20, 80), 160.0, 0.8, 512
CHAT_SIGMA = 0.31
"""Spread of ln(predicted / true) whose mean relative error is 25 %, as probes on chat models reach."""
Options = dict[str, OptionValue]


class Case(NamedTuple):
    """One run; ``predictor`` is exact, noisy or none. ``pools``: one prefill and two decode instances."""

    policy: str
    options: Options
    predictor: str
    rate_rps: float
    seed: int
    requests: int
    pools: bool = False


class Figures(NamedTuple):
    """Seconds: mean and P99 latency (arrival to last token), mean and greatest TTFT; evictions; prompt tokens."""

    latency: float
    latency_p99: float
    ttft: float
    ttft_max: float
    evictions: float
    computed: float


def trace(rate_rps: float, seed: int, n: int) -> Trace:
    """Poisson arrivals, short prompts, log-normal outputs, cut at 512."""
    arrivals, lengths = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
    output = np.exp(lengths.normal(np.log(OUTPUT_MEDIAN), OUTPUT_SIGMA, n))
    return Trace(
        gamma_arrivals(n, rate_rps, 1.0, arrivals),
        lengths.integers(*PROMPTS, n, endpoint=True),
        np.clip(output, 2, OUTPUT_MOST).astype(np.int64),
        np.zeros(n, np.int16),
        source="Alpaca-like",
    )


def figures(case: Case) -> Figures:
    """Run a case."""
    model, card = model_spec(MODEL), hardware_spec(CARD)
    step = RooflineStepModel(model, card)
    room = kv_capacity(model, card)
    kv = float(kv_bytes_per_token(model, "bf16"))
    roles = (Role.PREFILL, Role.DECODE, Role.DECODE) if case.pools else (Role.MIXED,)
    specs = tuple(InstanceSpec(role, step, room.blocks, room.block_size, BATCH, 2048) for role in roles)
    beliefs = Beliefs(step, kv, 25e9, 1e-3, 2048)
    guess = {"exact": LengthOracle(), "noisy": NoisyOracle(case.seed, CHAT_SIGMA), "none": None}[case.predictor]
    policy = build_policy(case.policy, beliefs, Slo(), **case.options)
    asked = trace(case.rate_rps, case.seed, case.requests)
    r = simulate(asked, ClusterSpec(specs, kv), policy, beliefs, Slo(), lengths=guess)
    latency = r.requests.finish_s - asked.arrival_s
    ttft = r.requests.first_token_s - asked.arrival_s
    return Figures(
        float(latency.mean()),
        float(np.quantile(latency, 0.99)),
        float(ttft.mean()),
        float(ttft.max()),
        float(r.requests.preemptions.sum()),
        float(r.instances.prefill_tokens.sum()),
    )


Row = tuple[str, str, Options, str]
"""Label, preset, options, predictor."""

ORDERS: list[Row] = [
    ("FCFS", "mixed", {}, "none"),
    ("sjf, exact", "sjf", {}, "exact"),
    ("sjf, 25 % error", "sjf", {}, "noisy"),
    ("sjf, history", "sjf", {}, "none"),
    ("trail, exact", "trail", {}, "exact"),
    ("trail, 25 % error", "trail", {}, "noisy"),
]
SHARES: list[Row] = [(f"trail, C = {c:g}", "trail", {"c": c}, "noisy") for c in (0.0, 0.2, 0.5, 0.8, 1.0)]
GUARDS: list[Row] = [
    ("FCFS", "mixed", {}, "none"),
    ("trail", "trail", {}, "noisy"),
    ("trail, max_passes 200", "trail", {"max_passes": 200.0}, "noisy"),
    ("trail, max_passes 50", "trail", {"max_passes": 50.0}, "noisy"),
    ("trail, max_age 10 s", "trail", {"max_age": 10.0}, "noisy"),
]
POOLS: list[Row] = [(f"least-kv, {o}", "least-kv", {"order": o}, "noisy") for o in ("fcfs", "sjf", "trail")]


def show(rows: list[Row], rates: list[float], seeds: int, requests: int, jobs: int, pools: bool) -> None:
    """A table a rate; the ratio is that of the first row's mean latency and TTFT to this row's."""
    for rate in rates:
        print(f"{rate:g} requests/s")
        print("                          latency   x   P99    TTFT     x    max   evictions  prompt tokens computed")
        cases = [
            (Case(policy, options, guess, rate, seed, requests, pools),)
            for _, policy, options, guess in rows
            for seed in range(seeds)
        ]
        found = iter(fan_out(figures, cases, jobs))
        first: Figures | None = None
        for label, *_ in rows:
            f = Figures(*np.mean([next(found) for _ in range(seeds)], axis=0))
            first = first or f
            print(
                f"  {label:22} {f.latency:8.2f} {first.latency / f.latency:5.2f} {f.latency_p99:6.2f} {f.ttft:7.3f}"
                f" {first.ttft / f.ttft:6.2f} {f.ttft_max:6.2f} {f.evictions:9.0f} {f.computed:12.0f}",
                flush=True,
            )


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = {"orders": ORDERS, "share": SHARES, "guard": GUARDS, "pools": POOLS}
    parser.add_argument("what", choices=tuple(tables))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--rates", type=lambda text: [float(x) for x in text.split(",")], default=[28.0, 31.0, 34.0])
    parser.add_argument("--jobs", type=int, default=2)
    a = parser.parse_args()
    show(tables[a.what], a.rates, a.seeds, a.requests, a.jobs, a.what == "pools")


if __name__ == "__main__":
    main()
