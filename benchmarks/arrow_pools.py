"""Arrow's adaptive pools against static splits: goodput, ablations, sensitivity, and the roles over time as SVG.

Usage: python benchmarks/arrow_pools.py {code,phases,rates,targets,sweep,draw} [--trace azure_code_2023.csv]
       [--seeds 3] [--jobs 2] [--images docs/results/img]

Eight instances that start as 4 prefill + 4 decode. Goodput is the highest rate that keeps 90 % of the requests within
their SLO (Arrow v2, arXiv 2505.11916, section 6); on the three-phase trace, whose first phase sends 16 of 21 requests,
also the highest rate that keeps 90 % within it in every phase (ours). ``docs/results/arrow.md`` explains and reports.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import t as student

from arrow_picture import draw
from penstock.experiment.build import run
from penstock.experiment.goodput import highest_rate
from penstock.experiment.repeat import fan_out
from penstock.experiment.setup import ClusterSetup, Setup, Target, WorkloadSetup, replace
from penstock.report.metrics import Verdicts
from penstock.workload.trace import Trace

GOAL, TOLERANCE, SIZE = 0.9, 0.02, 8
PHASE_S = 300.0
THREE_PHASE = Setup(
    policy="arrow",
    workload=WorkloadSetup(synthetic="three-phase", duration_s=3 * PHASE_S, rate_rps=1.0),
    cluster=ClusterSetup(model="llama-3.1-8b", hardware="h100", prefill=4, decode=4),
    slo=Target(ttft_s=3.0, tpot_s=0.008),
)
CODE = Setup(
    policy="arrow",
    workload=WorkloadSetup(rate_rps=8.0),
    cluster=ClusterSetup(model="qwen3-32b", hardware="h100", tp=2, prefill=4, decode=4),
    slo=Target(ttft_s=10.0, tpot_s=0.125),
)
Options = dict[str, float | str]


class Row(NamedTuple):
    """A line of a table: what it is called, and what runs."""

    label: str
    setup: Setup


class Run(NamedTuple):
    """Attainment over all requests, in the worst phase, of TTFT and of TPOT; flips."""

    overall: float
    worst: float
    ttft: float
    tpot: float
    flips: int


class Found(NamedTuple):
    """Goodput over all requests and in every phase, requests/s, and the flips of the runs there."""

    overall: float
    worst: float
    flips: int
    worst_flips: int


def variant(setup: Setup, label: str, policy: str, options: Options | None = None, prefill: int = 4) -> Row:
    """The setup under another policy, split and options."""
    cluster = replace(setup.cluster, prefill=prefill, decode=SIZE - prefill)
    return Row(label, replace(setup, policy=policy, options=options or {}, cluster=cluster))


def policies(setup: Setup) -> list[Row]:
    """What is compared."""
    splits = [variant(setup, f"static {k}P{SIZE - k}D", "static", prefill=k) for k in range(1, SIZE)]
    return [
        *splits,
        variant(setup, "least-kv 4P4D", "least-kv"),
        variant(setup, "arrow, roles frozen", "arrow", {"flips": "off"}),
        variant(setup, "arrow", "arrow"),
        variant(setup, "arrow, all candidates", "arrow", {"candidates": "all"}),
        variant(setup, "arrow, all candidates, frozen", "arrow", {"candidates": "all", "flips": "off"}),
        variant(setup, "xllm", "xllm"),
    ]


def phase_of(trace: Trace) -> Any:
    """Phase (0, 1, 2) of each request of the three-phase trace, told by its lengths; int64[n]."""
    return np.where(trace.prompt_tokens >= 8000, 0, np.where(trace.output_tokens >= 2000, 1, 2))


def once(setup: Setup, seed: int) -> Run:
    """One run."""
    result = run(setup, seed, sample=False)
    v = Verdicts(result, setup.slo.slo())
    overall = worst = float(v.met.mean())
    if setup.workload.trace is None:
        phase = phase_of(result.trace)
        worst = min(float(v.met[phase == k].mean()) for k in range(3))
    return Run(overall, worst, float(v.ttft_met.mean()), float(v.tpot_met.mean()), len(result.flips.time_s))


def search(setup: Setup, seed: int) -> Found:
    """Both goodputs by bisection; every rate sees the same requests, closer together."""
    runs: dict[float, Run] = {}

    def at(rate: float) -> Run:
        if rate not in runs:
            runs[rate] = once(setup.at_rate(rate), seed)
        return runs[rate]

    start = setup.workload.rate_rps or 1.0
    overall = highest_rate(lambda rate: at(rate).overall, start, GOAL, TOLERANCE).rate_rps
    worst = highest_rate(lambda rate: at(rate).worst, start, GOAL, TOLERANCE).rate_rps
    flips = [at(rate).flips if rate else 0 for rate in (overall, worst)]
    return Found(overall or 0.0, worst or 0.0, *flips)


def interval(values: Sequence[float]) -> str:
    """Mean and half width of its 95 % interval (Student)."""
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return f"{mean:.2f}"
    return f"{mean:.2f} ± {student.ppf(0.975, n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n):.2f}"


def compare(rows: list[Row], seeds: int, jobs: int, phased: bool, base: str = "static 4P4D") -> None:
    """Print the table of goodputs; ratios are means of the ratios of equal seeds."""
    tasks = [(row.setup, seed) for row in rows for seed in range(seeds)]
    found = fan_out(search, tasks, jobs)
    table = {row.label: found[i * seeds : (i + 1) * seeds] for i, row in enumerate(rows)}
    own = table.get(base, found[:seeds])

    def cells(mine: list[Found], field: str) -> str:
        values, against = ([getattr(f, field) for f in some] for some in (mine, own))
        ratio = interval([v / a if a else math.nan for v, a in zip(values, against, strict=True)])
        flips = np.mean([f.worst_flips if field == "worst" else f.flips for f in mine])
        return f" {interval(values)} | {ratio} | {flips:.0f} |"

    fields = ("overall", "worst") if phased else ("overall",)
    print("| policy |" + "".join(f" goodput ({f}), req/s | x {base} | flips |" for f in fields))
    print("|---|" + "---|---|---|" * len(fields))
    for label, mine in table.items():
        print(f"| {label} |" + "".join(cells(mine, field) for field in fields))


def rates(rows: list[Row], at: Sequence[float], seeds: int, jobs: int) -> None:
    """Print attainment (mean over seeds) at given rates: overall, or worst phase too where there are phases."""
    tasks = [(row.setup.at_rate(rate), seed) for row in rows for rate in at for seed in range(seeds)]
    found = iter(fan_out(once, tasks, jobs))
    print("| policy |" + "".join(f" {rate:g} |" for rate in at))
    print("|---|" + "---|" * len(at))
    for row in rows:
        cells = []
        for _ in at:
            overall, worst, ttft, tpot, _ = np.mean([next(found) for _ in range(seeds)], axis=0)
            more = f", worst {worst:.0%}" if row.setup.workload.trace is None else ""
            cells.append(f" {overall:.1%} ({ttft:.0%} / {tpot:.0%}{more}) |")
        print(f"| {row.label} |" + "".join(cells))


def sweep(setup: Setup) -> list[Row]:
    """One option of arrow at a time."""
    grid: dict[str, Sequence[float]] = {
        "expand": (0.6, 2.0),
        "shrink": (0.1, 0.3, 0.7, 0.9),
        "cooldown": (0.0, 2.0, 30.0),
        "sustained": (1.0, 10.0),
        "interval": (0.25, 5.0),
    }
    rows = [variant(setup, "defaults", "arrow")]
    return rows + [variant(setup, f"{k} {v:g}", "arrow", {k: v}) for k, values in grid.items() for v in values]


def draw_both(images: Path, code: Setup) -> None:
    """The two pictures of ``docs/results/arrow.md``."""
    twice = replace(THREE_PHASE, workload=replace(THREE_PHASE.workload, duration_s=6 * PHASE_S, rate_rps=0.95))
    names = ("long prompts, 16x", "long outputs, 1x", "chat, 4x") * 2
    marks = [(PHASE_S * i, name) for i, name in enumerate(names)]
    title = "Arrow, three-phase trace twice at 0.95 requests/s (slowest phase), Llama-3.1-8B, 8 x H100"
    draw(images / "arrow_three_phase.svg", title, twice, marks, 15.0)
    title = "Arrow, Azure Code 2023 at 35 requests/s, Qwen3-32B, 8 x 2 H100"
    draw(images / "arrow_azure_code.svg", title, code.at_rate(35.0), (), 5.0)


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("code", "phases", "rates", "targets", "sweep", "draw"))
    parser.add_argument("--trace", default="azure_code_2023.csv", help="Azure LLM inference trace 2023, code")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--images", type=Path, default=Path("docs/results/img"))
    a = parser.parse_args()
    code = replace(CODE, workload=replace(CODE.workload, trace=a.trace))
    poisson = replace(code, workload=replace(code.workload, cv=1.0))
    few = ("static 4P4D", "static 5P3D", "static 6P2D", "static 7P1D", "arrow", "xllm")
    some_code = [row for row in policies(code) if row.label in few]
    if a.part == "code":
        compare(policies(code), 1, a.jobs, False)
        for hardware, tp in (("h200", 1), ("a100-80g", 2), ("a100-80g", 4)):
            print(f"\n{hardware} x {tp}:\n")
            other = replace(code, cluster=replace(code.cluster, hardware=hardware, tp=tp))
            compare([row for row in policies(other) if row.label in few], 1, a.jobs, False)
        print("\nPoisson arrivals:\n")
        compare([row for row in policies(poisson) if row.label in few], a.seeds, a.jobs, False)
    elif a.part == "phases":
        compare(policies(THREE_PHASE), a.seeds, a.jobs, True)
    elif a.part == "rates":
        rates(some_code, (10, 16, 20, 30, 40, 45), 1, a.jobs)
        rates([row for row in policies(THREE_PHASE) if row.label in few], (0.6, 0.8, 0.95, 1.1), a.seeds, a.jobs)
    elif a.part == "targets":
        for tpot_s in (0.0075, 0.009, 0.012, 0.05):
            print(f"\nTPOT {tpot_s:g} s:\n")
            setup = replace(THREE_PHASE, slo=Target(THREE_PHASE.slo.ttft_s, tpot_s))
            compare([row for row in policies(setup) if row.label in few], a.seeds, a.jobs, True)
    elif a.part == "sweep":
        compare(sweep(THREE_PHASE), a.seeds, a.jobs, True, "defaults")
        compare(sweep(code), 1, a.jobs, False, "defaults")
    else:
        draw_both(a.images, code)


if __name__ == "__main__":
    main()
