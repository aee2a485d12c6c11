"""PolyServe against fixed tiers, one pool at the tightest TPOT, and least load: goodput, load gradient, ablations.

Usage: python benchmarks/polyserve.py {goodput,mixed,gradient,tests} [--seeds 1] [--jobs 2] [--requests 6000]
       [--shares 1,1,1,1]

Four classes (TPOT 20, 30, 50 and 100 ms, TTFT 2 s) of conversations: lengths drawn from the azure-conv profile, prompts
x 2.5 and outputs x 4. Qwen3-32B on 2 H100 an instance; 16 decode servers behind 14 prefill ones, or 16 replicas.
Goodput is the highest rate at which 90 % of the requests meet their SLO, over all and in every class
(``docs/results/polyserve.md`` explains and reports).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from penstock.core.types import Slo
from penstock.experiment.build import build_beliefs, build_cluster
from penstock.experiment.goodput import highest_rate
from penstock.experiment.repeat import fan_out
from penstock.experiment.setup import ClusterSetup, Setup
from penstock.policy.parts import Beliefs, Policy
from penstock.policy.polyserve import Router
from penstock.policy.registry import build_policy
from penstock.report.metrics import Verdicts
from penstock.sim.cluster import ClusterSpec, Scenario
from penstock.sim.result import SimResult
from penstock.sim.run import simulate
from penstock.workload.synthetic import synthesize, with_classes
from penstock.workload.trace import Trace
from polyserve_baselines import best_rate, best_split, bound_rps, fixed_mixed_tiers, fixed_tiers, slos_by_class

GOAL, TOLERANCE = 0.9, 0.02
SERVERS, PREFILLS = 16, 14
TPOTS, TTFT_S = (0.02, 0.03, 0.05, 0.1), 2.0
SLOS = slos_by_class(TPOTS, TTFT_S)
LONGER = (2.5, 4.0)
MODEL, HARDWARE, TP = "qwen3-32b", "h100", 2


class Case(NamedTuple):
    """What runs: a row's label, its shares of classes, its number of requests and its seed."""

    label: str
    shares: tuple[float, ...]
    requests: int
    seed: int
    mixed: bool


class Run(NamedTuple):
    """Attainment over all requests and in the worst class, of TTFT and of TPOT; the mean of servers with requests."""

    overall: float
    worst: float
    ttft: float
    tpot: float
    busy: float


def trace_of(case: Case, rate_rps: float) -> Trace:
    """The requests: equal seeds give equal requests at every rate."""
    plain = synthesize("azure-conv", case.requests, rate_rps, seed=case.seed)
    prompt, output = (
        np.maximum(np.rint(column * factor), 1).astype(np.int64)
        for column, factor in zip((plain.prompt_tokens, plain.output_tokens), LONGER, strict=True)
    )
    shares = dict(zip(SLOS, case.shares, strict=True))
    longer = replace(plain, prompt_tokens=prompt, output_tokens=output)
    return with_classes(longer, shares, np.random.default_rng([case.seed, 9]))


@cache
def cluster_of(mixed: bool) -> tuple[ClusterSpec, Beliefs]:
    """The cluster, and beliefs equal to the truth."""
    prefills, decodes, both = (0, 0, SERVERS) if mixed else (PREFILLS, SERVERS, 0)
    setup = Setup(
        policy="mixed" if mixed else "static",
        cluster=ClusterSetup(
            model=MODEL,
            hardware=HARDWARE,
            tp=TP,
            max_num_seqs=512,
            prefill=prefills,
            decode=decodes,
            mixed=both,
        ),
    )
    cluster = build_cluster(setup)
    return cluster, build_beliefs(setup, cluster)


@cache
def rates_of(mixed: bool) -> tuple[float, ...]:
    """Best rate of one server for each class, requests/s."""
    cluster, _ = cluster_of(mixed)
    trace = trace_of(Case("", (1.0,) * len(TPOTS), 20_000, 0, mixed), 1.0)
    spec = cluster.instances[-1]
    return tuple(
        best_rate(spec.step_model, spec.capacity_tokens, tpot, trace.prompt_tokens, trace.output_tokens, mixed)
        for tpot in TPOTS
    )


def split_of(case: Case) -> list[tuple[float, int]]:
    """Servers of each tier, for who knows the mix and the bound's rates."""
    return list(zip(TPOTS, best_split(rates_of(case.mixed), case.shares, SERVERS), strict=True))


def two_tiers(case: Case) -> list[tuple[float, int]]:
    """The tightest class alone, the others together: their best rates are the same where KV capacity binds."""
    rates, shares = rates_of(case.mixed), case.shares
    joint = sum(shares[1:]) / sum(share / rate for share, rate in zip(shares[1:], rates[1:], strict=True))
    return list(zip(TPOTS, best_split([rates[0], joint], [shares[0], sum(shares[1:])], SERVERS), strict=False))


EQUAL = [(tpot, SERVERS // len(TPOTS)) for tpot in TPOTS]
DISAGGREGATED: dict[str, Callable[[Beliefs, Case], Policy]] = {
    "polyserve": lambda b, case: build("polyserve", b),
    "fixed tiers, equal, random": lambda b, case: fixed_tiers(b, EQUAL, "random"),
    "fixed tiers, best split, random": lambda b, case: fixed_tiers(b, split_of(case), "random"),
    "fixed tiers, best split, in turn": lambda b, case: fixed_tiers(b, split_of(case), "turn"),
    "fixed tiers, best split, fewest": lambda b, case: fixed_tiers(b, split_of(case), "fewest"),
    "two fixed tiers, best split, fewest": lambda b, case: fixed_tiers(b, two_tiers(case), "fewest"),
    "one pool at the tightest": lambda b, case: build("polyserve", b, merge=1e9, routing="least"),
    "least KV": lambda b, case: build("least-kv", b),
    "fewest requests": lambda b, case: build("static", b),
    "polyserve, least loaded": lambda b, case: build("polyserve", b, routing="least"),
    "polyserve, margin 5 %": lambda b, case: build("polyserve", b, margin=0.05),
    "polyserve, margin 10 %": lambda b, case: build("polyserve", b, margin=0.1),
    "polyserve, looser tiers merged": lambda b, case: build("polyserve", b, merge=4.0),
    "polyserve, no promotion": lambda b, case: build("polyserve", b, promotion="off"),
    "polyserve, no reclaim": lambda b, case: build("polyserve", b, reclaim="off"),
    "polyserve, no ttft test": lambda b, case: build("polyserve", b, **{"ttft-test": "off"}),
    "polyserve, no second-token test": lambda b, case: build("polyserve", b, **{"second-test": "off"}),
    "polyserve, no steady test": lambda b, case: build("polyserve", b, **{"steady-test": "off"}),
}
MIXED: dict[str, Callable[[Beliefs, Case], Policy]] = {
    "polyserve-mixed": lambda b, case: build("polyserve-mixed", b),
    "fixed tiers, best split, in turn": lambda b, case: fixed_mixed_tiers(b, split_of(case), "turn", False),
    "fixed tiers, best split, fewest": lambda b, case: fixed_mixed_tiers(b, split_of(case), "fewest", False),
    "the same with dynamic chunks": lambda b, case: fixed_mixed_tiers(b, split_of(case), "fewest", True),
    "one pool at the tightest": lambda b, case: build("polyserve-mixed", b, merge=1e9, routing="least"),
    "least tokens": lambda b, case: build("mixed", b),
    "lmetric": lambda b, case: build("lmetric", b),
    "lmetric, bound 20 ms": lambda b, case: build("lmetric", b, tpot=0.02),
}


def build(name: str, beliefs: Beliefs, **options: float | str) -> Policy:
    """A preset; its general SLO is not looked at, since every class has its own."""
    return build_policy(name, beliefs, Slo(TTFT_S, TPOTS[0]), **options)


def run_case(case: Case, rate_rps: float, sample_s: float | None = None) -> tuple[SimResult, Policy]:
    """One simulation."""
    cluster, beliefs = cluster_of(case.mixed)
    policy = (MIXED if case.mixed else DISAGGREGATED)[case.label](beliefs, case)
    scenario = Scenario(seed=case.seed, sample_s=sample_s)
    trace = trace_of(case, rate_rps)
    return simulate(trace, cluster, policy, beliefs, list(SLOS.values()), scenario), policy


def once(case: Case, rate_rps: float) -> Run:
    """Attainment of one simulation."""
    result, _ = run_case(case, rate_rps)
    v = Verdicts(result, SLOS)
    classes = [float(v.met[result.trace.slo_class == k].mean()) for k in range(len(TPOTS))]
    busy = float((result.instances.busy_s[-SERVERS:] / result.simulated_s).mean())
    return Run(float(v.met.mean()), min(classes), float(v.ttft_met.mean()), float(v.tpot_met.mean()), busy)


def search(case: Case) -> tuple[float, float]:
    """Goodput over all requests, and in every class, requests/s."""
    runs: dict[float, Run] = {}

    def at(rate: float) -> Run:
        if rate not in runs:
            runs[rate] = once(case, rate)
        return runs[rate]

    bound = bound_rps(rates_of(case.mixed), case.shares, SERVERS)

    def highest(k: int) -> float:
        return highest_rate(lambda rate: at(rate)[k], 0.8 * bound, GOAL, TOLERANCE, widest=32.0).rate_rps or 0.0

    worst = highest(1)
    return highest(0), worst


def goodputs(labels: list[str], a: argparse.Namespace, mixed: bool) -> None:
    """Print the table."""
    cases = [Case(label, a.shares, a.requests, seed, mixed) for label in labels for seed in range(a.seeds)]
    found = np.array(fan_out(search, [(case,) for case in cases], a.jobs)).reshape(len(labels), a.seeds, 2)
    bound = bound_rps(rates_of(mixed), a.shares, SERVERS)
    rates = ", ".join(f"{rate:.2f} at {tpot * 1e3:g} ms" for rate, tpot in zip(rates_of(mixed), TPOTS, strict=True))
    print(f"bound {bound:.1f} requests/s; best rates of one server {rates}; best split {split_of(cases[0])}\n")
    print("| policy | goodput, every class | share of bound | goodput, overall | share of bound |")
    print("|---|---|---|---|---|")
    for label, seeds in zip(labels, found, strict=True):
        overall, worst = seeds.mean(axis=0)
        print(f"| {label} | {worst:.1f} | {worst / bound:.0%} | {overall:.1f} | {overall / bound:.0%} |")


def gradient(a: argparse.Namespace) -> None:
    """Print mean decodes per server, sorted, and how many servers idle, at half of the bound."""
    rate = 0.5 * bound_rps(rates_of(False), a.shares, SERVERS)
    print("| policy | mean decodes a server, sorted by load at each moment | idle | taken / given back | met |")
    print("|---|---|---|---|---|")
    for label in ("polyserve", "polyserve, least loaded", "least KV"):
        result, policy = run_case(Case(label, a.shares, a.requests, 0, False), rate, 0.5)
        t = result.timeline
        assert t is not None
        steady = (t.time_s > 0.3 * result.trace.duration_s) & (t.time_s < result.trace.duration_s)
        rows: Any = -np.sort(-t.running[steady][:, -SERVERS:], axis=1)
        loads = " ".join(f"{x:.0f}" for x in rows.mean(axis=0))
        router: object = policy.decode
        tiers = router.tiers if isinstance(router, Router) else None
        changes = f"{tiers.taken} / {tiers.given}" if tiers is not None else "-"
        met = Verdicts(result, SLOS).met.mean()
        print(f"| {label} | {loads} | {(rows == 0).sum(axis=1).mean():.1f} | {changes} | {met:.1%} |")


def refusals(a: argparse.Namespace) -> None:
    """Print what refuses, at 0.9 of the bound."""
    rate = 0.9 * bound_rps(rates_of(False), a.shares, SERVERS)
    result, policy = run_case(Case("polyserve", a.shares, a.requests, 0, False), rate)
    router: object = policy.decode
    assert isinstance(router, Router)
    print(f"\nat {rate:.1f} requests/s: refusals {router.tests.refusals}, guests {router.guests}")
    print(f"met {Verdicts(result, SLOS).met.mean():.1%}, preemptions {int(result.requests.preemptions.sum())}")


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("goodput", "mixed", "gradient", "tests"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--requests", type=int, default=6000)
    parser.add_argument("--shares", default="1,1,1,1", help="of the classes, tightest first")
    a = parser.parse_args()
    weights = [float(x) for x in a.shares.split(",")]
    a.shares = tuple(weight / sum(weights) for weight in weights)
    if a.part == "gradient":
        gradient(a)
    elif a.part == "mixed":
        goodputs(list(MIXED), a, True)
    elif a.part == "tests":
        goodputs(["polyserve", *[label for label in DISAGGREGATED if label.startswith("polyserve,")]], a, False)
        refusals(a)
    else:
        goodputs([label for label in DISAGGREGATED if not label.startswith("polyserve,")], a, False)


if __name__ == "__main__":  # by its name, so that other processes find what they are to run
    from polyserve import main as main_by_name

    main_by_name()
