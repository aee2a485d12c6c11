"""VoltanaLLM against static clocks over request rates: the numbers and the plot of ``docs/results/voltana.md``.

2P2D of A100-80G with Llama-3.1-8B on ShareGPT lengths, as the paper's; decode steps have tiles of 128 requests. All
variants share placements (but where a variant is about one), trace and seeds. Energy is compared only where a variant
attains within ``CLOSE`` of the static highest clock and that one is worth running (``WORTH``).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from penstock.experiment.build import build, build_cluster
from penstock.experiment.repeat import fan_out
from penstock.experiment.setup import ClusterSetup, Setup, Target, TruthSetup, WorkloadSetup
from penstock.experiment.traffic import build_trace, slos
from penstock.report.metrics import summarize
from penstock.sim.cluster import Scenario
from penstock.sim.run import simulate

CLOSE, WORTH = 0.02, 0.9
SEEDS = (11, 12, 13)
RATES = (20.0, 30.0, 40.0, 45.0, 50.0, 52.5, 55.0, 57.5, 60.0, 62.5, 65.0)
BASE: dict[str, float | str] = {"prefill": "shortest-queue"}
Options = dict[str, float | str]
CURVE: dict[str, Options] = {"1410": {"clock": "max"}, "voltana": {"margin": -0.3}, "1005": {"clock": "low"}}
MARGINS: dict[str, Options] = {
    "1410": {"clock": "max"},
    **{f"margin {m:+g}": {"margin": m} for m in (-0.3, -0.2, -0.1, 0.0, 0.35)},
}
PARTS: dict[str, Options] = {
    "1410": {"clock": "max"},
    **{d: {"margin": -0.3, "decode": d} for d in ("fadr", "tile-aware", "fewest-requests", "round-robin")},
    "five clocks": {"margin": -0.3, "levels": "all"},
    "random prefill": {"margin": -0.3, "prefill": "random"},
    "1410, random prefill": {"clock": "max", "prefill": "random"},
}
WHAT = {"curve": CURVE, "margins": MARGINS, "parts": PARTS}
FEW = (40.0, 50.0, 55.0, 60.0)


def point(name: str, options: Options, rate: float, seed: int, tile: int, activity: float) -> dict[str, Any]:
    """One run of 120 s of arrivals, reduced to joules and shares."""
    setup = Setup(
        policy="voltana",
        options=BASE | options,
        workload=WorkloadSetup(synthetic="sharegpt", requests=int(rate * 120), rate_rps=rate),
        cluster=ClusterSetup("llama-3.1-8b", "a100-80g", prefill=2, decode=2, max_num_seqs=1024),
        slo=Target(0.8, 0.045),
        truth=TruthSetup(batch_tile=tile),
        seed=seed,
    )
    cluster = build_cluster(setup)
    if activity >= 0:
        specs = []
        for spec in cluster.instances:
            assert spec.power is not None
            power = dataclasses.replace(spec.power, decode_activity=activity)
            specs.append(dataclasses.replace(spec, power=power))
        cluster = dataclasses.replace(cluster, instances=tuple(specs))
    policy, beliefs = build(setup, cluster)
    trace = build_trace(setup, seed)
    targets = list(slos(setup, trace).values())
    found = summarize(simulate(trace, cluster, policy, beliefs, targets, Scenario(seed=seed)), setup.slo.slo())
    assert found.energy_j is not None and found.joules_per_token is not None
    low = [i.clock_busy_s or {} for i in found.instances]
    busy = sum(sum(clocks.values()) for clocks in low)
    return {
        "variant": name, "rate": rate, "seed": seed, "energy_j": found.energy_j, "idle_j": found.idle_j,
        "per_token": found.joules_per_token, "met": found.attainment, "ttft": found.ttft_attainment,
        "tpot": found.tpot_attainment, "span_s": found.simulated_seconds,
        "low": sum(clocks.get("1005", 0.0) for clocks in low) / busy,
    }  # fmt: skip


def mean(rows: list[dict[str, Any]], variant: str, rate: float, key: str) -> float:
    """Mean of a column over the seeds."""
    return float(np.mean([r[key] for r in rows if (r["variant"], r["rate"]) == (variant, rate)]))


def saving(rows: list[dict[str, Any]], variant: str, rate: float) -> str:
    """Energy saved against the highest clock in percent, if attainment is equal; else a dash."""
    base, ours = mean(rows, "1410", rate, "met"), mean(rows, variant, rate, "met")
    if base < WORTH or ours < base - CLOSE:
        return "–"
    return f"{100 * (1 - mean(rows, variant, rate, 'energy_j') / mean(rows, '1410', rate, 'energy_j')):.1f}"


def print_rows(rows: list[dict[str, Any]]) -> None:
    """One row a rate and variant."""
    variants = list(dict.fromkeys(r["variant"] for r in rows))
    print("| req/s | variant | energy kJ | J/token | saved % | SLO met % | TTFT % | TPOT % | steps at 1005 MHz % |")
    print("|--:|---|--:|--:|--:|--:|--:|--:|--:|")
    for rate in sorted({r["rate"] for r in rows}):
        for variant in variants:
            shares = [f"{100 * mean(rows, variant, rate, key):.1f}" for key in ("met", "ttft", "tpot")]
            energy = f"{mean(rows, variant, rate, 'energy_j') / 1e3:.1f} | {mean(rows, variant, rate, 'per_token'):.4f}"
            low = f"{100 * mean(rows, variant, rate, 'low'):.0f}"
            saved = "" if variant == "1410" else saving(rows, variant, rate)
            print(f"| {rate:g} | {variant} | {energy} | {saved} | {' | '.join(shares)} | {low} |")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Energy and attainment over the rate, one line a variant, as SVG."""
    rates, names = sorted({r["rate"] for r in rows}), list(dict.fromkeys(r["variant"] for r in rows))
    colours = ("#707780", "#009a70", "#c33")
    top = 1.1 * max(mean(rows, n, r, "energy_j") for n in names for r in rates)
    out = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 300" font-family="sans-serif" font-size="11">',
           '<rect width="760" height="300" fill="#fff"/>']  # fmt: skip
    for left, key, title, most, grid in (
        (60, "energy_j", "energy of the run, kJ", top, [top * i / 5 for i in range(6)]),
        (420, "met", "requests that meet TTFT and TPOT", 1.0, [0.0, 0.25, 0.5, 0.75, 1.0]),
    ):

        def x(rate: float, left: int = left) -> float:
            return float(left + 280 * (rate - rates[0]) / (rates[-1] - rates[0]))

        def y(value: float, most: float = most) -> float:
            return 250 - 200 * value / most

        for value in grid:
            label = f"{value / 1e3:.0f}" if key == "energy_j" else f"{value:.0%}"
            out.append(f'<path d="M{left} {y(value):.1f}h280" stroke="#ddd"/>')
            out.append(f'<text x="{left - 5}" y="{y(value) + 4:.1f}" text-anchor="end">{label}</text>')
        out += [f'<text x="{x(r):.0f}" y="266" text-anchor="middle">{r:g}</text>' for r in rates[::2]]
        out.append(f'<text x="{left + 140}" y="284" text-anchor="middle">requests/s</text>')
        out.append(f'<text x="{left}" y="36">{title}</text>')
        for name, colour in zip(names, colours, strict=False):
            line = " L".join(f"{x(r):.1f} {y(mean(rows, name, r, key)):.1f}" for r in rates)
            out.append(f'<path d="M{line}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
    for i, (name, colour) in enumerate(zip(names, colours, strict=False)):
        label = f"{name} MHz, static" if name.isdigit() else name
        out.append(f'<path d="M{60 + 160 * i} 14h20" stroke="{colour}" stroke-width="2"/>')
        out.append(f'<text x="{86 + 160 * i}" y="18">{label}</text>')
    path.write_text("\n".join([*out, "</svg>"]) + "\n")


def main() -> None:
    """Run, print, keep the rows as JSON, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=tuple(WHAT))
    parser.add_argument("--rates", type=float, nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--tile", type=int, default=128, help="0: a smooth roofline")
    parser.add_argument("--decode-activity", type=float, default=-1.0, help="of the power model, instead of its own")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path, help="keep one row a run here")
    parser.add_argument("--from", dest="kept", type=Path, help="print from rows kept earlier, run nothing")
    parser.add_argument("--svg", type=Path, help="draw energy and attainment over rate here")
    a = parser.parse_args()
    rates = a.rates or (RATES if a.what == "curve" else FEW)
    tasks = [(n, o, r, s, a.tile, a.decode_activity) for n, o in WHAT[a.what].items() for r in rates for s in a.seeds]
    rows = [json.loads(line) for line in a.kept.read_text().splitlines()] if a.kept else fan_out(point, tasks, a.jobs)
    if a.json:
        a.json.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    print_rows(rows)
    if a.svg:
        draw(rows, a.svg)


if __name__ == "__main__":
    main()
