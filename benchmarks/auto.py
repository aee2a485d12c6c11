"""What each part of ``auto`` is worth: its goodput without the part, per workload of the league.

    python benchmarks/auto.py ablation --seed 1
    python benchmarks/auto.py search --seed 0 --set room=0.9,room=1.1,pace=0.9
    python benchmarks/auto.py chunks --seed 1          # beside plain vLLM replicas with a tuned chunk
    python benchmarks/auto.py errors --seed 1          # wrong beliefs and noisy steps, at 70 % of the bound

Runs a quarter of the league's requests unless ``--whole``. Rates in requests/s; in brackets the ratio to ``auto``.
"""

from __future__ import annotations

import argparse

from penstock.experiment.build import run, with_policy
from penstock.experiment.goodput import highest_rate
from penstock.experiment.repeat import fan_out
from penstock.experiment.setup import Setup, replace
from penstock.experiment.traffic import slos
from penstock.league.entries import base_setup, chosen_entries
from penstock.rank.clairvoyant import Fluid
from penstock.report.metrics import Verdicts

GOAL = 0.9
PARTS: dict[str, dict[str, float | str]] = {
    "auto": {},
    "first come, first served": {"sort": 0.0},
    "no margin for the lag": {"deviations": 0.0},
    "the late use all room": {"late_room": 1.0},
    "chunks of any size": {"pace": 0.0},
    "nothing sent ahead": {"ahead": 0.0},
    "admission by room now only": {"horizon": 0.0},
    "no admission by outlook": {"room": 100.0},
    "no preference among tenants": {"tiers": 0.0},
    "no rescheduling": {"rescheduling": 0.0},
    "moves without pressure": {"pressure": 0.0},
}


CHUNKS = (256, 384, 512, 1024, 2048)


def goodput_of(setup: Setup, policy: str, options: dict[str, float | str], start_rps: float, tolerance: float) -> float:
    """The goodput of a policy with these options, requests/s; 0 where the lowest rate tried misses the goal."""

    def attainment(rate: float) -> float:
        return attainment_of(setup.at_rate(rate), policy, options)

    return highest_rate(attainment, start_rps, GOAL, tolerance, widest=16.0).rate_rps or 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ablation", "search", "chunks", "errors"))
    parser.add_argument("--workloads", default="", help="names with commas; all where not given")
    parser.add_argument("--set", default="", help="settings to search, as room=0.9,room=1.1")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=0)
    parser.add_argument("--tolerance", type=float, default=0.03)
    parser.add_argument("--whole", action="store_true", help="all of the league's requests")
    a = parser.parse_args()
    names = a.workloads.split(",") if a.workloads else None
    setups = [entry.setup(base_setup(seed=a.seed), not a.whole) for entry in chosen_entries(names, None, False)]
    bounds = fan_out(bound_of, [(setup,) for setup in setups], a.jobs)
    if a.what == "errors":
        errors(setups, bounds, a.jobs)
        return
    rows: dict[str, dict[str, float | str]] = dict(PARTS)
    if a.what == "search":
        rows = {"auto": {}} | {one: dict([one.split("=", 1)]) for one in a.set.split(",") if one}
    cells: list[tuple[Setup, str, dict[str, float | str], float, float]] = [
        (setup, "auto", options, 0.8 * bound, a.tolerance)
        for options in rows.values()
        for setup, bound in zip(setups, bounds, strict=True)
    ]
    if a.what == "chunks":
        labels = ["auto", *(f"`mixed`, chunk {chunk}" for chunk in CHUNKS)]
        rows = {label: {} for label in labels}
        cells = cells[: len(setups)] + [
            (with_chunk(setup, chunk), "mixed", {}, 0.5 * bound, a.tolerance)
            for chunk in CHUNKS
            for setup, bound in zip(setups, bounds, strict=True)
        ]
    found = fan_out(goodput_of, cells, a.jobs)
    print("| | " + " | ".join(str(setup.workload.synthetic) for setup in setups) + " |")
    print("|---|" + "---:|" * len(setups))
    print("| bound | " + " | ".join(f"{bound:.3g}" for bound in bounds) + " |")
    whole = found[: len(setups)]
    for k, label in enumerate(rows):
        mine = found[k * len(setups) : (k + 1) * len(setups)]
        texts = [f"{x:.3g} ({x / max(w, 1e-9):.2f})" for x, w in zip(mine, whole, strict=True)]
        print(f"| {label} | " + " | ".join(texts) + " |")


def with_chunk(setup: Setup, chunk: int) -> Setup:
    """The same with another ``--max-num-batched-tokens``."""
    return replace(setup, cluster=replace(setup.cluster, max_num_batched_tokens=chunk))


ERRORS = ((1.0, 0.0), (0.8, 0.0), (0.9, 0.0), (1.1, 0.0), (1.25, 0.0), (1.0, 0.1), (1.0, 0.3))
"""Believed over true step time, and the deviation of the logarithm of a step's."""


def errors(setups: list[Setup], bounds: list[float], jobs: int) -> None:
    """Attainment at 70 % of the bound, with and without the learnt margin."""
    cells: list[tuple[Setup, str, dict[str, float | str]]] = []
    both: tuple[dict[str, float | str], ...] = ({}, {"misses": 0.0})
    for options in both:
        for error, noise in ERRORS:
            for setup, bound in zip(setups, bounds, strict=True):
                belief, truth = replace(setup.belief, error=error), replace(setup.truth, noise=noise)
                cells.append((replace(setup, belief=belief, truth=truth).at_rate(0.7 * bound), "auto", options))
    found = fan_out(attainment_of, cells, jobs)
    print("| believed / true | noise | " + " | ".join(str(setup.workload.synthetic) for setup in setups) + " |")
    print("|---:|---:|" + "---:|" * len(setups))
    n = len(setups)
    for k, (error, noise) in enumerate(ERRORS):
        learnt, plain = found[k * n : (k + 1) * n], found[(k + len(ERRORS)) * n : (k + len(ERRORS) + 1) * n]
        texts = [f"{100 * x:.1f} ({100 * y:.1f})" for x, y in zip(learnt, plain, strict=True)]
        print(f"| {error:g} | {noise:g} | " + " | ".join(texts) + " |")


def attainment_of(setup: Setup, policy: str, options: dict[str, float | str]) -> float:
    """The share of requests that meet their SLO."""
    mine = with_policy(setup, policy, options)
    result = run(mine, sample=False)
    return float(Verdicts(result, slos(mine, result.trace)).met.mean())


def bound_of(setup: Setup) -> float:
    """The clairvoyant bound, requests/s."""
    return Fluid(setup).bound(GOAL).any_rps


if __name__ == "__main__":  # by its name, so that other processes find what they are to run
    from auto import main as main_by_name

    main_by_name()
