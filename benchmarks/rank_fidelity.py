"""How fast and how true ``penstock rank`` is: wall time, pruning, and every goodput against token-level stepping.

    python benchmarks/rank_fidelity.py --traces /path/to/traces [--requests 4000] [--jobs 2] [--stepping 2000]

For each Azure trace (without ``--traces``: the built-in profile of that name): the ranking of 8 A100-80G for
Llama-3.1-8B as the command makes it, timed; the same without pruning, to see that nothing that counts was lost; then
the goodput of every arrangement with leaps and with each step taken, on the first ``--stepping`` requests: largest
difference, and Spearman's correlation of the two orders.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import penstock
from penstock.experiment.goodput import goodput
from penstock.experiment.setup import Setup, Target, WorkloadSetup, replace
from penstock.rank.search import SEARCHED, Ranking, rank
from penstock.rank.space import Space
from penstock.rank.spread import OverCores

SPACE = Space({"a100-80g": 8})
CASES = (("conv", Target(1.0, 0.05)), ("conv", Target(1.0, 0.02)), ("code", Target(2.0, 0.05)))
PRICES = {"a100-80g": 1.3}


def base_of(kind: str, target: Target, traces: Path | None, requests: int) -> Setup:
    """The experiment of one case."""
    file = None if traces is None else str(traces / f"azure_{kind}_2023.csv")
    return Setup(workload=WorkloadSetup(trace=file, synthetic=f"azure-{kind}", requests=requests), slo=target)


def line_of(ranking: Ranking) -> str:
    """The winner, the best of the other kind, and how many were searched."""
    first = ranking.winner()
    other = ranking.most(not first.arrangement.disaggregated)
    text = f"{first.name} {first.rate_rps:.2f}/s"
    if other is not None:
        text += f", then {other.name} {other.rate_rps:.2f}/s ({other.binding})"
    return f"{text}; {len(ranking.searched())} of {len(ranking.candidates)} searched"


def compare(setup: Setup, ranking: Ranking, spread: OverCores) -> tuple[float, float, int, float]:
    """(largest relative difference, Spearman's rho, arrangements, seconds of stepping) of leaps against steps."""
    from scipy.stats import spearmanr

    known = [c for c in ranking.candidates if c.status == SEARCHED]
    setups = [ranking.setup_of(setup, c) for c in known]
    leaps = [x.rate_rps or 0.0 for x in spread(goodput, [(one, 0) for one in setups])]
    start = time.perf_counter()
    steps = [x.rate_rps or 0.0 for x in spread(goodput, [(replace(one, stepping=True), 0) for one in setups])]
    took = time.perf_counter() - start
    worst = max(abs(a - b) / b for a, b in zip(leaps, steps, strict=True) if b > 0)
    by_leap, by_step = ([rate / c.gpus for rate, c in zip(rates, known, strict=True)] for rates in (leaps, steps))
    return worst, float(spearmanr(by_leap, by_step).statistic), len(known), took


def main() -> None:
    """Run all cases and print a line a figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path)
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--stepping", type=int, default=2000)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    spread = OverCores(args.jobs)
    print(f"penstock {penstock.__version__} ({penstock.FORM}), {args.jobs} processes")
    for kind, target in CASES:
        setup = base_of(kind, target, args.traces, args.requests)
        start = time.perf_counter()
        ranking = rank(setup, SPACE, [0], spread, prices=PRICES)
        took = time.perf_counter() - start
        print(f"azure {kind}, TTFT {target.ttft_s} s, TPOT {target.tpot_s} s: {took:.1f} s; {line_of(ranking)}")
        start = time.perf_counter()
        full = rank(setup, SPACE, [0], spread, prices=PRICES, prune=False)
        same = [c.name for c in ranking.candidates[:5]] == [c.name for c in full.candidates[:5]]
        print(f"  without pruning {time.perf_counter() - start:.1f} s; the first five are the same: {same}")
        short = base_of(kind, target, args.traces, args.stepping)
        worst, rho, count, slow_s = compare(short, full, spread)
        print(
            f"  {count} arrangements, {args.stepping} requests, against every step taken ({slow_s:.0f} s): "
            f"goodputs differ by at most {worst:.2%}, Spearman {rho:.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
