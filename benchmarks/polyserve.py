"""PolyServe against fixed tiers, one pool at the tightest TPOT, and least load: goodput, load gradient, ablations.

Usage: python benchmarks/polyserve.py {goodput,mixed,gradient,tests} [--seeds 1] [--jobs 1] [--requests 12000]
       [--tpots 20,30,50,100] [--mix steady|swing] [--slo-form mean|deadline] [--only ROWS]

Four classes (TPOT ``--tpots`` in ms, TTFT 2 s) of conversations: lengths drawn from the azure-conv profile, prompts
x 2.5 and outputs x 4. Qwen3-32B on 2 H100 an instance; 16 decode servers behind 14 prefill ones, or 16 replicas.
``steady``: equal shares all the time. ``swing``: 10, 20, 30 and 40 % of the four and the other way round, in turn,
100 s each, so that the mean is that of ``steady``. Goodput is the highest rate at which 90 % of the requests meet
their SLO, over all and in every class (``docs/results/polyserve.md`` explains and reports).
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
from penstock.rank.bounds import Load, decode_s
from penstock.rank.clairvoyant import spread_lines
from penstock.rank.lines import lines_below
from penstock.report.metrics import Verdicts
from penstock.sim.cluster import ClusterSpec, Scenario
from penstock.sim.result import SimResult
from penstock.sim.run import simulate
from penstock.workload.synthetic import synthesize, with_classes
from penstock.workload.trace import Trace
from polyserve_baselines import best_rate, best_split, bound_rps, fixed_mixed_tiers, fixed_tiers, slos_by_class

GOAL, TOLERANCE = 0.9, 0.02
HIGHEST = 1.25
"""No rate from this many times the tiers' bound on is tried: runs are slow there, and nothing gets near it."""
SERVERS, PREFILLS = 16, 14
TTFT_S = 2.0
LONGER = (2.5, 4.0)
MODEL, HARDWARE, TP = "qwen3-32b", "h100", 2
EQUAL_SHARES = (0.25, 0.25, 0.25, 0.25)
SWING = ((0.1, 0.2, 0.3, 0.4), (0.4, 0.3, 0.2, 0.1))
PHASE_S = 100.0


class Case(NamedTuple):
    """What runs: a row's label, TPOT of the classes, number of requests, seed; see the module for the others."""

    label: str
    tpots: tuple[float, ...]
    requests: int
    seed: int
    mixed: bool
    swing: bool
    deadlines: bool

    def slos(self) -> dict[str, Slo]:
        """The targets of each class."""
        return slos_by_class(self.tpots, TTFT_S)

    def mixes(self) -> tuple[tuple[float, ...], ...]:
        """Shares of the classes, in turn."""
        return SWING if self.swing else (EQUAL_SHARES,)


class Run(NamedTuple):
    """Attainment over all requests and in the worst class."""

    overall: float
    worst: float


def trace_of(case: Case, rate_rps: float) -> Trace:
    """The requests: equal seeds give equal requests at every rate, but for their classes under ``swing``."""
    plain = synthesize("azure-conv", case.requests, rate_rps, seed=case.seed)
    prompt, output = (
        np.maximum(np.rint(column * factor), 1).astype(np.int64)
        for column, factor in zip((plain.prompt_tokens, plain.output_tokens), LONGER, strict=True)
    )
    rng = np.random.default_rng([case.seed, 9])
    equal = dict(zip(case.slos(), EQUAL_SHARES, strict=True))
    longer = with_classes(replace(plain, prompt_tokens=prompt, output_tokens=output), equal, rng)
    if not case.swing:
        return longer
    drawn, phase = rng.random(case.requests), phase_of(longer)
    rows = [np.searchsorted(np.cumsum(mix)[:-1], drawn, side="right") for mix in SWING]
    return replace(longer, slo_class=np.where(phase % 2 == 0, *rows).astype(np.int16))


def phase_of(trace: Trace) -> Any:
    """Number of the phase in which each request arrives."""
    return (trace.arrival_s // PHASE_S).astype(np.int64)


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
def rates_of(mixed: bool, tpots: tuple[float, ...]) -> tuple[float, ...]:
    """Best rate of one server for each class, requests/s."""
    cluster, _ = cluster_of(mixed)
    trace = trace_of(Case("", tpots, 20_000, 0, mixed, False, False), 1.0)
    spec = cluster.instances[-1]
    return tuple(
        best_rate(spec.step_model, spec.capacity_tokens, tpot, trace.prompt_tokens, trace.output_tokens, mixed)
        for tpot in tpots
    )


def tiers_bound(case: Case) -> float:
    """Rate at which tiers of any real size, resized at once when the mix changes, keep up with every phase."""
    return min(bound_rps(rates_of(case.mixed, case.tpots), mix, SERVERS) for mix in case.mixes())


@cache
def clairvoyant_bound(case: Case) -> float:
    """Goodput over all requests that no policy passes in traffic that goes on: that of ``penstock.rank.clairvoyant``.

    It knows all lengths and gives the dearest tenth up. Here it is about these servers only: disaggregated, those
    that decode, since the others are there in plenty.
    """
    cluster, _ = cluster_of(case.mixed)
    spec = cluster.instances[-1]
    base = lines_below(spec)
    lines = base + tuple(spread_lines(base, spec, False))

    def most(rate: float) -> float:
        trace = trace_of(case, rate)
        n = len(trace.arrival_s)
        prompts, after = trace.prompt_tokens.astype(np.float64), trace.output_tokens - np.float64(1.0)
        tpot, ttft, none = np.array(case.tpots)[trace.slo_class], np.full(n, TTFT_S), np.zeros(n)
        span = float(trace.arrival_s[-1] - trace.arrival_s[0])
        load = Load(prompts, prompts, after, ttft, tpot, span, False, case.deadlines)
        uses = [decode_s(line, load, none) + (line.prompts_s(prompts) if case.mixed else 0.0) for line in lines]
        phase = phase_of(trace) if case.swing else np.zeros(n, np.int64)
        met = 0
        for k in np.unique(phase).tolist():
            mine = phase == k
            seconds = SERVERS * span * float(mine.sum()) / n
            met += min(int(np.searchsorted(np.cumsum(np.sort(use[mine])), seconds, side="right")) for use in uses)
        return met / n

    return highest_rate(most, tiers_bound(case), GOAL, 0.002, widest=64.0).rate_rps or 0.0


def split_of(case: Case) -> list[tuple[float, int]]:
    """Servers of each tier, for who knows the mean mix and the bound's rates."""
    return list(zip(case.tpots, best_split(rates_of(case.mixed, case.tpots), EQUAL_SHARES, SERVERS), strict=True))


def two_tiers(case: Case) -> list[tuple[float, int]]:
    """The tightest class alone, the others together, at the tightest target of these."""
    rates = rates_of(case.mixed, case.tpots)
    pair = best_split(rates[:2], [EQUAL_SHARES[0], sum(EQUAL_SHARES[1:])], SERVERS)
    return list(zip(case.tpots, pair, strict=False))


DISAGGREGATED: dict[str, Callable[[Beliefs, Case], Policy]] = {
    "polyserve": lambda b, case: build("polyserve", b),
    "fixed tiers, best split, random": lambda b, case: fixed_tiers(b, split_of(case), "random"),
    "fixed tiers, best split, in turn": lambda b, case: fixed_tiers(b, split_of(case), "turn"),
    "fixed tiers, best split, fewest": lambda b, case: fixed_tiers(b, split_of(case), "fewest"),
    "two fixed tiers, best split, fewest": lambda b, case: fixed_tiers(b, two_tiers(case), "fewest"),
    "one pool at the tightest": lambda b, case: build("polyserve", b, merge=1e9, routing="least"),
    "least KV": lambda b, case: build("least-kv", b),
    "fewest requests": lambda b, case: build("static", b),
    "polyserve, least loaded": lambda b, case: build("polyserve", b, routing="least"),
    "polyserve, no margin": lambda b, case: build("polyserve", b, margin=0.0),
    "polyserve, margin 6 %": lambda b, case: build("polyserve", b, margin=0.06),
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
    return build_policy(name, beliefs, Slo(TTFT_S, 0.02), **options)


def run_case(case: Case, rate_rps: float, sample_s: float | None = None) -> tuple[SimResult, Policy]:
    """One simulation."""
    cluster, beliefs = cluster_of(case.mixed)
    policy = (MIXED if case.mixed else DISAGGREGATED)[case.label](beliefs, case)
    scenario = Scenario(seed=case.seed, sample_s=sample_s, deadlines=case.deadlines)
    trace = trace_of(case, rate_rps)
    return simulate(trace, cluster, policy, beliefs, list(case.slos().values()), scenario), policy


def once(case: Case, rate_rps: float) -> Run:
    """Attainment of one simulation."""
    result, _ = run_case(case, rate_rps)
    v = Verdicts(result, case.slos())
    classes = [float(v.met[result.trace.slo_class == k].mean()) for k in range(len(case.tpots))]
    return Run(float(v.met.mean()), min(classes))


def search(case: Case) -> tuple[float, float]:
    """Goodput over all requests, and in every class, requests/s."""
    runs: dict[float, Run] = {}

    def at(rate: float) -> Run:
        if rate not in runs:
            runs[rate] = once(case, rate)
        return runs[rate]

    start, above = 0.8 * tiers_bound(case), HIGHEST * tiers_bound(case)

    def highest(k: int) -> float:
        found = highest_rate(lambda rate: at(rate)[k], start, GOAL, TOLERANCE, widest=32.0, above_rps=above)
        return found.rate_rps or 0.0

    worst = highest(1)
    return highest(0), worst


def goodputs(labels: list[str], a: argparse.Namespace, mixed: bool) -> None:
    """Print the table."""
    cases = [case_of(label, a, mixed, seed) for label in labels for seed in range(a.seeds)]
    tiers, clairvoyant = tiers_bound(cases[0]), clairvoyant_bound(cases[0]._replace(label=""))
    rates = rates_of(mixed, a.tpots)
    shown = ", ".join(f"{rate:.2f} at {tpot * 1e3:g} ms" for rate, tpot in zip(rates, a.tpots, strict=True))
    print(f"bound of tiers {tiers:.1f} requests/s, clairvoyant {clairvoyant:.1f}; best rates of one server {shown}; ")
    print(f"best split {split_of(cases[0])}, two tiers {two_tiers(cases[0])}\n")
    print("| policy | goodput, every class | of tiers' bound | goodput, overall | of tiers' bound | of clairvoyant |")
    print("|---|--:|--:|--:|--:|--:|")
    for label in labels:
        mine = [case for case in cases if case.label == label]
        overall, worst = np.array(fan_out(search, [(case,) for case in mine], a.jobs)).mean(axis=0)
        print(
            f"| {label} | {worst:.1f} | {worst / tiers:.0%} | {overall:.1f} | {overall / tiers:.0%} "
            f"| {overall / clairvoyant:.0%} |",
            flush=True,
        )


def case_of(label: str, a: argparse.Namespace, mixed: bool = False, seed: int = 0) -> Case:
    """A row's case."""
    return Case(label, a.tpots, a.requests, seed, mixed, a.mix == "swing", a.slo_form == "deadline")


def gradient(a: argparse.Namespace) -> None:
    """Print mean decodes per server, sorted, and how many servers idle, at half of the bound."""
    rate = 0.5 * tiers_bound(case_of("", a))
    print("| policy | mean decodes a server, sorted by load at each moment | idle | taken / given back | met |")
    print("|---|---|---|---|---|")
    for label in ("polyserve", "polyserve, least loaded", "least KV"):
        result, policy = run_case(case_of(label, a), rate, 0.5)
        t = result.timeline
        assert t is not None
        steady = (t.time_s > 0.3 * result.trace.duration_s) & (t.time_s < result.trace.duration_s)
        rows: Any = -np.sort(-t.running[steady][:, -SERVERS:], axis=1)
        loads = " ".join(f"{x:.0f}" for x in rows.mean(axis=0))
        router: object = policy.decode
        tiers = router.tiers if isinstance(router, Router) else None
        changes = f"{tiers.taken} / {tiers.given}" if tiers is not None else "-"
        met = Verdicts(result, case_of(label, a).slos()).met.mean()
        print(f"| {label} | {loads} | {(rows == 0).sum(axis=1).mean():.1f} | {changes} | {met:.1%} |")


def refusals(a: argparse.Namespace) -> None:
    """Print what refuses, at 0.9 of the bound."""
    case = case_of("polyserve", a)
    rate = 0.9 * tiers_bound(case)
    result, policy = run_case(case, rate)
    router: object = policy.decode
    assert isinstance(router, Router)
    print(f"\nat {rate:.1f} requests/s: refusals {router.tests.refusals}, guests {router.guests}")
    print(f"met {Verdicts(result, case.slos()).met.mean():.1%}, preemptions {int(result.requests.preemptions.sum())}")


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("goodput", "mixed", "gradient", "tests"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--requests", type=int, default=12_000)
    parser.add_argument("--tpots", default="20,30,50,100", help="of the four classes, ms, tightest first")
    parser.add_argument("--mix", choices=("steady", "swing"), default="steady")
    parser.add_argument("--slo-form", choices=("mean", "deadline"), default="mean")
    parser.add_argument("--only", default="", help="rows whose label begins with one of these, separated by ;")
    a = parser.parse_args()
    a.tpots = tuple(float(x) / 1e3 for x in a.tpots.split(","))
    wanted = tuple(a.only.split(";")) if a.only else ("",)
    if a.part == "gradient":
        gradient(a)
    elif a.part == "mixed":
        goodputs([label for label in MIXED if label.startswith(wanted)], a, True)
    elif a.part == "tests":
        goodputs(["polyserve", *[label for label in DISAGGREGATED if label.startswith("polyserve,")]], a, False)
        refusals(a)
    else:
        rows = [label for label in DISAGGREGATED if not label.startswith("polyserve,")]
        goodputs([label for label in rows if label.startswith(wanted)], a, False)


if __name__ == "__main__":  # by its name, so that other processes find what they are to run
    from polyserve import main as main_by_name

    main_by_name()
