"""DuetServe's divided GPU against mixed batches and fixed parts: requests/s at equal time between tokens.

Usage: python benchmarks/duet.py {rates,targets,truths} [--requests N] [--seed 0] [--only NAME ...] [--target S ...]

One H100 with Qwen3-8B serves whole requests. The answer of ``rates`` is the highest rate at which 99 % of all gaps
between tokens stay within the target and 90 % of the requests get their first token within ``--ttft`` seconds; found by
bisection to 2 %, all rates with the same requests. The truth has HBM contention, the policy's belief has not.
``targets`` shows the gaps at that rate and far above it, beside what decode alone takes; ``truths`` spoils the truth.
``docs/results/duet.md`` explains and reports.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace as with_fields
from typing import NamedTuple

import numpy as np

from penstock.experiment.build import build, build_cluster
from penstock.experiment.goodput import highest_rate
from penstock.experiment.setup import ClusterSetup, Setup, Target, WorkloadSetup
from penstock.experiment.traffic import build_trace, slos
from penstock.perf.sm_share import SATURATION
from penstock.perf.step import StepModel
from penstock.report.quantiles import GapStatistics
from penstock.sim.cluster import ClusterSpec, Scenario
from penstock.sim.run import simulate

TOLERANCE = 0.02
BUDGETS = (384, 512, 768, 1024, 1280, 1536, 2048, 3072, 4096, 8192)
SHARES = (0.1, 0.2, 0.3)
WORKLOADS = {
    "conversation": "azure-conv",
    "code": "azure-code",
    "chat": "sharegpt",
    "long prompts": "4000-20000/100-600",
    "phases": "3000-9000/20-60@10x1,200-800/200-600@10x2",
}
PUBLISHED: dict[str, float | str] = {"join": "free", "margin": 1.0}
Spoil = Callable[[ClusterSpec], ClusterSpec]


class Mode(NamedTuple):
    """A line of a table: a policy, its options, and the batch budget of the engine."""

    label: str
    policy: str
    options: dict[str, float | str]
    budget: int = 8192


class Figures(NamedTuple):
    """Of one run: P99 and longest gap between tokens, and P90 TTFT."""

    p99_s: float
    longest_s: float
    ttft90_s: float


class DecodeAlone(StepModel):
    """Prompts cost nothing: what the decodes of a load take by themselves."""

    def __init__(self, base: StepModel) -> None:
        self.base = base

    def step_s(self, decodes: int, context: int, chunk_new: list[int], chunk_past: list[int]) -> float:
        """See :class:`StepModel`. A step without decodes takes a moment, since time must pass."""
        return max(self.base.step_s(decodes, context, [], []), 1e-4)

    def decode_affine(self, decodes: int, context: int) -> tuple[float, float, float]:
        """See :class:`StepModel`."""
        return self.base.decode_affine(decodes, context)


def setup_of(mode: Mode, workload: str, target_s: float, args: argparse.Namespace) -> Setup:
    """The experiment of one line."""
    return Setup(
        policy=mode.policy,
        options=mode.options,
        workload=WorkloadSetup(synthetic=workload, requests=args.requests, rate_rps=1.0),
        cluster=ClusterSetup(
            model="qwen3-8b", hardware="h100", prefill=0, decode=0, mixed=1, max_num_batched_tokens=mode.budget
        ),
        slo=Target(ttft_s=args.ttft, tpot_s=target_s),
        seed=args.seed,
    )


def measure(setup: Setup, spoil: Spoil | None = None) -> Figures:
    """One run; ``spoil`` changes the true cluster after the policy has got its beliefs."""
    cluster = build_cluster(setup)
    policy, beliefs = build(setup, cluster)
    trace = build_trace(setup, setup.seed)
    truth = cluster if spoil is None else spoil(cluster)
    result = simulate(trace, truth, policy, beliefs, list(slos(setup, trace).values()), Scenario(seed=setup.seed))
    gaps = GapStatistics(result.gaps)
    ttft = result.requests.first_token_s - trace.arrival_s
    p99_s, longest_s = gaps.quantile(0.99), gaps.max_s
    assert p99_s is not None and longest_s is not None
    return Figures(p99_s, longest_s, float(np.quantile(ttft, 0.9)))


def holds(setup: Setup, rate: float, spoil: Spoil | None = None) -> bool:
    """Are both targets met at this rate?"""
    figures = measure(setup.at_rate(rate), spoil)
    slo = setup.slo.slo()
    return figures.p99_s <= slo.tpot_s and figures.ttft90_s <= slo.ttft_s


def best_rate(setup: Setup, start_rps: float, spoil: Spoil | None = None) -> float:
    """The highest rate at which both targets are met; 0 if there is none."""
    found = highest_rate(
        lambda rate: float(holds(setup, rate, spoil)), start_rps, goal=1.0, tolerance=TOLERANCE, widest=64.0
    )
    return found.rate_rps or 0.0


def tuned(workload: str, target_s: float, args: argparse.Namespace, start_rps: float) -> tuple[Mode, float]:
    """Mixed batches with the budget that reaches the highest rate, the default included."""
    best, rate = Mode("", "mixed", {}), 0.0
    for budget in BUDGETS:
        mode = Mode(f"mixed, {budget} tokens", "mixed", {}, budget)
        setup = setup_of(mode, workload, target_s, args)
        if rate == 0.0 or holds(setup, rate * (1.0 + TOLERANCE)):
            found = best_rate(setup, rate or start_rps)
            if found > rate:
                best, rate = mode, found
    return best, rate


def rates(args: argparse.Namespace) -> None:
    """Highest rates of all modes, for each workload and target."""
    print(
        "| workload | TBT | mixed, 8192 | mixed, tuned | static 0.1 | 0.2 | 0.3 | as published | duet | duet / tuned |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, workload in chosen(args):
        for target_s in args.target:
            best, base = tuned(workload, target_s, args, 10.0)
            modes = [Mode("mixed", "mixed", {})]
            modes += [Mode(f"static {share}", "duet-static", {"decode-share": share}) for share in SHARES]
            modes += [Mode("published", "duet", dict(PUBLISHED)), Mode("duet", "duet", {})]
            found = [best_rate(setup_of(mode, workload, target_s, args), base or 10.0) for mode in modes]
            cells = [f"{rate:.2f}" if rate else "-" for rate in found]
            cells.insert(1, f"{base:.2f} ({best.budget})")
            ratio = f"**{found[-1] / base:.2f}**" if base else "-"
            print(f"| {name} | {target_s * 1e3:.0f} ms | " + " | ".join(cells) + f" | {ratio} |", flush=True)


def targets(args: argparse.Namespace) -> None:
    """Gaps at the highest rate and at 1.5 times it, beside decode alone."""

    def alone(cluster: ClusterSpec) -> ClusterSpec:
        specs = [with_fields(spec, step_model=DecodeAlone(spec.step_model)) for spec in cluster.instances]
        return with_fields(cluster, instances=tuple(specs))

    print("| workload | TBT | rate, req/s | P99 TBT | longest | decode alone, P99 | target kept |")
    print("|---|---|---|---|---|---|---|")
    duet, plain = Mode("duet", "duet", {}), Mode("mixed", "mixed", {})
    for name, workload in chosen(args):
        for target_s in args.target:
            setup = setup_of(duet, workload, target_s, args)
            highest = best_rate(setup, 10.0)
            for factor in (0.5, 1.0, 1.5):
                rate = factor * (highest or 10.0)
                ours = measure(setup.at_rate(rate))
                floor = measure(setup_of(plain, workload, target_s, args).at_rate(rate), alone)
                verdict = "yes" if ours.p99_s <= target_s else "no" if floor.p99_s <= target_s else "none could"
                print(
                    f"| {name} | {target_s * 1e3:.0f} ms | {rate:.1f} | {ours.p99_s * 1e3:.1f} ms "
                    f"| {ours.longest_s * 1e3:.1f} ms | {floor.p99_s * 1e3:.1f} ms | {verdict} |",
                    flush=True,
                )


def truths(args: argparse.Namespace) -> None:
    """The same with truths that the belief does not know."""

    def spoiled(saturation: float = SATURATION, together: float = 1.0) -> Spoil:
        def spoil(cluster: ClusterSpec) -> ClusterSpec:
            specs = [
                with_fields(spec, sm_saturation=saturation, shared_bandwidth=together) for spec in cluster.instances
            ]
            return with_fields(cluster, instances=tuple(specs))

        return spoil

    cases: list[tuple[str, Spoil | None, dict[str, float | str]]] = [
        ("no contention", spoiled(together=2.0), {}),
        ("contention (as above)", None, {}),
        ("both reach 80 % of the bandwidth together", spoiled(together=0.8), {}),
        ("bandwidth saturates at 50 % of the SMs", spoiled(0.5), {}),
        ("the same, and the belief knows", spoiled(0.5), {"saturation": 0.5}),
        ("both spoiled", spoiled(0.5, 0.8), {}),
    ]
    print("| workload | TBT | truth | duet, req/s | / tuned mixed | P99 TBT there |")
    print("|---|---|---|---|---|---|")
    for name, workload in chosen(args):
        for target_s in args.target:
            _, base = tuned(workload, target_s, args, 10.0)
            for label, spoil, options in cases:
                setup = setup_of(Mode("duet", "duet", options), workload, target_s, args)
                rate = best_rate(setup, base or 10.0, spoil)
                at = f"{measure(setup.at_rate(rate), spoil).p99_s * 1e3:.1f} ms" if rate else "-"
                ratio = f"{rate / base:.2f}" if base else "-"
                print(f"| {name} | {target_s * 1e3:.0f} ms | {label} | {rate:.2f} | {ratio} | {at} |", flush=True)


def chosen(args: argparse.Namespace) -> list[tuple[str, str]]:
    """The workloads asked for."""
    return [(name, WORKLOADS[name]) for name in args.only]


def main() -> None:
    """Parse the command line and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("rates", "targets", "truths"))
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ttft", type=float, default=2.0)
    parser.add_argument("--only", nargs="*", choices=tuple(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--target", type=float, nargs="*", default=[0.05, 0.1])
    args = parser.parse_args()
    {"rates": rates, "targets": targets, "truths": truths}[args.table](args)


if __name__ == "__main__":
    main()
