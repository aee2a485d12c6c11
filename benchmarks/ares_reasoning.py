"""ARES against its baselines on long-tailed outputs: the numbers of ``docs/results/ares.md``.

``grid`` runs every policy at every rate and seed of a setting, with common random numbers, and prints one table a rate
and the goodputs; ``sweep`` tries horizon, decay and the rest on the training seeds; ``chart`` draws goodputs as SVG.

Only requests that arrive between 25 % and 80 % of a run's requests are judged: before, the cluster fills up; after,
it drains.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from penstock.core.types import Role
from penstock.experiment.build import build_cluster, run
from penstock.experiment.repeat import fan_out
from penstock.experiment.setup import ClusterSetup, Setup, Target, WorkloadSetup
from penstock.policy.registry import parse_settings
from penstock.report.metrics import Verdicts
from penstock.report.repeat import interval

POLICIES = ("static", "round-robin", "least-kv", "llumnix", "ares-none", "ares-noisy", "ares-oracle")
JUDGED = (0.25, 0.8)
DECODE = 6
TEST_SEEDS, TRAINING_SEEDS = (11, 12, 13, 14), (1, 2, 3)


@dataclass(frozen=True)
class Setting:
    """KV blocks of 16 tokens (None: what 80 GB leave), TPOT target, lengths, requests a run, rates/s, prefills."""

    kv_blocks: int | None
    tpot_s: float
    lengths: str
    requests: int
    rates: tuple[float, ...]
    prefill: int = 2


SETTINGS = {
    "64k": Setting(4096, 0.0125, "reasoning", 1000, (0.1, 0.14, 0.18, 0.22, 0.26, 0.3, 0.34, 0.38, 0.42, 0.46)),
    "128k": Setting(
        8192, 0.0125, "reasoning", 1500, (0.22, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.82)
    ),
    "256k": Setting(16384, 0.0125, "reasoning", 2000, (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)),
    "h100": Setting(None, 0.0125, "reasoning", 2500, (0.8, 0.9, 1.0, 1.1, 1.2, 1.3)),
    "sharegpt": Setting(None, 0.0125, "sharegpt", 10000, (440.0, 490.0, 540.0, 600.0)),
    "sharegpt-6p": Setting(None, 0.0095, "sharegpt", 10000, (440.0, 470.0, 500.0, 530.0, 560.0), 6),
}


def make_setup(setting: Setting, policy: str, rate: float, options: dict[str, float | str]) -> Setup:
    """Qwen2.5-7B on H100, six decode instances."""
    return Setup(
        policy=policy,
        options=options,
        workload=WorkloadSetup(synthetic=setting.lengths, requests=setting.requests, rate_rps=rate),
        cluster=ClusterSetup("qwen2.5-7b", "h100", prefill=setting.prefill, decode=DECODE, kv_blocks=setting.kv_blocks),
        slo=Target(5.0, setting.tpot_s),
    )


def point(name: str, policy: str, options: dict[str, float | str], rate: float, seed: int) -> dict[str, Any]:
    """One run, reduced to the figures of the tables; seconds, and counts per 1,000 judged requests."""
    setup = make_setup(SETTINGS[name], policy, rate, options)
    result = run(setup, seed)
    verdicts, n, timeline = Verdicts(result, setup.slo.slo()), len(result.trace), result.timeline
    assert timeline is not None
    first, end = int(n * JUDGED[0]), int(n * JUDGED[1])
    rows = slice(first, end)
    tpot = np.where(verdicts.finished[rows], np.nan_to_num(verdicts.tpot_s[rows]), np.inf)
    arrived = result.trace.arrival_s
    inside = (timeline.time_s >= arrived[first]) & (timeline.time_s <= arrived[end - 1])
    held = timeline.resident_tokens[inside][:, timeline.role[0] == Role.DECODE].astype(float)
    per_thousand = 1000.0 / (end - first)
    return {
        "setting": name, "policy": policy, "options": options, "rate": rate, "seed": seed,
        "met": float(verdicts.met[rows].mean()),
        "p50": float(np.quantile(tpot, 0.5, method="lower")),
        "p99": float(np.quantile(tpot, 0.99, method="lower")),
        "ttft99": float(np.nanquantile(verdicts.ttft_s[rows], 0.99)),
        "preempted": float(result.requests.preemptions[rows].sum()) * per_thousand,
        "migrated": float(result.requests.migrations[rows].sum()) * per_thousand,
        "cv": float(np.mean(held.std(axis=1) / np.maximum(held.mean(axis=1), 1.0))),
        "full": float(held.sum(axis=1).mean()) / (DECODE * 16 * build_cluster(setup).instances[-1].capacity_blocks),
    }  # fmt: skip


def crossing(rows: list[dict[str, Any]], good: Callable[[dict[str, Any]], float]) -> float:
    """Rate at which ``good`` of a seed's rows first turns negative, between grid rates by interpolation."""
    rows = sorted(rows, key=lambda row: row["rate"])
    if good(rows[0]) < 0:
        return math.nan
    for low, high in pairwise(rows):
        if good(high) < 0:
            share = good(low) / (good(low) - good(high))
            return float(low["rate"] + share * (high["rate"] - low["rate"]))
    return math.nan


def _above(goal: float, row: dict[str, Any]) -> float:
    return float(row["met"]) - goal


def print_goodputs(rows: list[dict[str, Any]], title: str, good: Callable[[dict[str, Any]], float]) -> None:
    """The highest rate with ``good(row) >= 0``; ratios are taken seed by seed. nan: not within the grid."""
    print(f"\n{title}\n\n| policy | requests/s | over round-robin | over static |\n|---|--:|--:|--:|")
    names, seeds = dict.fromkeys(r["policy"] for r in rows), sorted({r["seed"] for r in rows})
    found = {p: [crossing([r for r in rows if (r["policy"], r["seed"]) == (p, s)], good) for s in seeds] for p in names}
    for name, values in found.items():
        nothing = [math.nan] * len(values)
        pairs = [zip(values, found.get(p, nothing), strict=True) for p in ("round-robin", "static")]
        over = [pm([a / b for a, b in pair], 2) for pair in pairs]
        print(f"| {name} | {pm(values, 3)} | {over[0]} | {over[1]} |")


def pm(values: list[float], digits: int, scale: float = 1.0) -> str:
    """Mean and half width of the 95 % interval over seeds."""
    found = interval([value * scale for value in values])
    return f"{found.mean:.{digits}f} ± {found.half_width or 0.0:.{digits}f}"


def print_grid(rows: list[dict[str, Any]]) -> None:
    """One table a rate, then goodputs and their ratio to round-robin and static, seed by seed."""
    names = list(dict.fromkeys(r["policy"] for r in rows))
    for rate in sorted({r["rate"] for r in rows}):
        print(f"\nrate {rate:g}/s\n\n| policy | SLO met % | P50 TPOT ms | P99 TPOT ms |", end="")
        print(" preempt. | migr. | CV | KV full % |\n|---|--:|--:|--:|--:|--:|--:|--:|")
        for name in names:
            r = [row for row in rows if row["policy"] == name and row["rate"] == rate]
            if not r:
                continue
            column = {key: [float(row[key]) for row in r] for key in r[0] if isinstance(r[0][key], float)}
            cells = [name, pm(column["met"], 1, 100), pm(column["p50"], 2, 1e3), pm(column["p99"], 1, 1e3)]
            cells += [f"{np.mean(column[k]):.0f}" for k in ("preempted", "migrated")]
            cells += [f"{np.mean(column['cv']):.3f}", f"{np.mean(column['full']) * 100:.0f}"]
            print("| " + " | ".join(cells) + " |")
    for goal in (0.9, 0.99):
        print_goodputs(rows, f"goodput, {goal:.0%} of requests", partial(_above, goal))


def sweep_variants() -> list[tuple[str, dict[str, float | str]]]:
    """Horizon x decay for each predictor, then one option at a time around the defaults."""
    found: list[tuple[str, dict[str, float | str]]] = [("least-kv", {}), ("ares-none", {"horizon": 0.0})]
    for horizon in (512.0, 2048.0, 8192.0):
        found.append(("ares-none", {"horizon": horizon}))
        found += [(p, {"horizon": horizon, "decay": d}) for p in ("ares-noisy", "ares-oracle") for d in (0.0, 0.5, 0.9)]
    for key, values in (("interval", (0.1, 2.0, 10.0)), ("margin", (0.02, 0.1)), ("reserve", (0.0, 0.15)),
                        ("most_moves", (1.0,)), ("least_gain", (0.1,))):  # fmt: skip
        found += [("ares-noisy", {key: value}) for value in values]
    return found


def print_sweep(rows: list[dict[str, Any]]) -> None:
    """One line a variant, averaged over the training seeds."""
    rates = sorted({r["rate"] for r in rows})
    print("| variant | " + " | ".join(f"{r:g}/s: SLO met %, P99 TPOT ms, preempt., migr." for r in rates) + " |")
    print("|---|" + "---|" * len(rates))
    for variant in dict.fromkeys(json.dumps([r["policy"], r["options"]]) for r in rows):
        mine = [r for r in rows if json.dumps([r["policy"], r["options"]]) == variant]
        name, options = json.loads(variant)
        cells = []
        for rate in rates:
            at = [r for r in mine if r["rate"] == rate]
            met, p99, lost, moved = (np.mean([r[key] for r in at]) for key in ("met", "p99", "preempted", "migrated"))
            cells.append(f"{met * 100:.1f}, {p99 * 1e3:.0f}, {lost:.0f}, {moved:.0f}")
        print(f"| {name} {' '.join(f'{k}={v:g}' for k, v in options.items())} | " + " | ".join(cells) + " |")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Attainment over rate, one line a policy, as a small SVG."""
    rates, names = sorted({r["rate"] for r in rows}), list(dict.fromkeys(r["policy"] for r in rows))
    colours = ("#888", "#c33", "#e90", "#96c", "#39c", "#063", "#0a0")
    out = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 520 300" font-family="sans-serif" font-size="11">',
           '<rect width="520" height="300" fill="#fff"/>']  # fmt: skip

    def x(rate: Any) -> Any:
        return 50 + 340 * (rate - rates[0]) / (rates[-1] - rates[0])

    for share in (0.0, 0.25, 0.5, 0.75, 0.9, 1.0):
        y = 260 - 230 * share
        out.append(f'<path d="M50 {y:g}H390" stroke="#ddd"/>')
        out.append(f'<text x="45" y="{y + 4:g}" text-anchor="end">{share:.0%}</text>')
    out += [f'<text x="{x(r):.0f}" y="275" text-anchor="middle">{r:g}</text>' for r in rates[:: len(rates) // 4]]
    out.append('<text x="220" y="292" text-anchor="middle">requests/s</text><text x="50" y="20">SLO met</text>')
    for name, colour, y in zip(names, colours, range(40, 400, 18), strict=False):
        met = {r: [row["met"] for row in rows if (row["policy"], row["rate"]) == (name, r)] for r in rates}
        line = " L".join(f"{x(r):.1f} {260 - 230 * np.mean(m):.1f}" for r, m in met.items() if m)
        out.append(f'<path d="M{line}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        out.append(f'<path d="M400 {y}h20" stroke="{colour}" stroke-width="2"/><text x="426" y="{y + 4}">{name}</text>')
    path.write_text("\n".join([*out, "</svg>"]) + "\n")


def main() -> None:
    """Run, print, keep the rows as JSON, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("grid", "sweep"))
    parser.add_argument("setting", choices=tuple(SETTINGS))
    parser.add_argument("--policies", nargs="+", default=POLICIES)
    parser.add_argument("--set", nargs="+", default=[], help="options, as llumnix.interval=0.5")
    parser.add_argument("--rates", type=float, nargs="+", help="instead of the setting's")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--from", dest="kept", type=Path, help="print from rows kept earlier, run nothing")
    parser.add_argument("--json", type=Path, help="keep one row a run here")
    parser.add_argument("--svg", type=Path, help="draw attainment over rate here")
    a = parser.parse_args()
    rates = a.rates or SETTINGS[a.setting].rates
    seeds = a.seeds or (TRAINING_SEEDS if a.what == "sweep" else TEST_SEEDS)
    settings = parse_settings(a.set)
    variants = sweep_variants() if a.what == "sweep" else [(name, settings.get(name, {})) for name in a.policies]
    tasks = [(a.setting, name, options, rate, seed) for name, options in variants for rate in rates for seed in seeds]
    if a.kept:
        rows = [json.loads(line) for line in a.kept.read_text().splitlines()]
    else:
        rows = fan_out(point, tasks, a.jobs)
    if a.json:
        a.json.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    (print_sweep if a.what == "sweep" else print_grid)(rows)
    if a.svg:
        draw(rows, a.svg)


if __name__ == "__main__":
    main()
