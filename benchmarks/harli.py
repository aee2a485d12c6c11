"""Fine-tuning beside decode, against its baselines: the numbers of ``docs/results/harli.md``.

``python benchmarks/harli.py`` prints one table: decode attainment and fine-tuning throughput of ``harli`` with its
SMs divided adaptively, once for all, and not at all, on bursty traces. The static split is tuned in hindsight on the
very trace it is judged on: the smallest share of decode that keeps attainment within a point of decode alone.
``python benchmarks/harli.py predictor`` prints the errors of the latency predictor on points that it has not seen.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np

from penstock.experiment.build import run
from penstock.experiment.setup import ClusterSetup, Setup, Target, WorkloadSetup
from penstock.perf.hardware import hardware_spec
from penstock.perf.models import model_spec
from penstock.perf.roofline import RooflineStepModel
from penstock.perf.tuning import CoRun, Profiler
from penstock.policy.corun import CoRunPredictor, profile
from penstock.report.metrics import summarize
from penstock.report.schema import RunMetrics

SHARES = tuple(round(0.1 + 0.05 * i, 2) for i in range(18))
SEEDS = (1, 2)
POINT = 0.01
BURSTS = "{0}@40x0.5,{0}@20x2.0"


@dataclass(frozen=True)
class Setting:
    """Hardware, lengths, mean requests/s, TPOT target (s), prefill instances, KV blocks (None: all that fit)."""

    hardware: str
    lengths: str
    rate: float
    tpot_s: float
    prefill: int
    kv_blocks: int | None = None
    decode: int = 2

    def title(self) -> str:
        """As the table shows it."""
        memory = "" if self.kv_blocks is None else f", {self.kv_blocks} blocks"
        return f"{self.hardware}, {self.lengths}, {self.rate:g}/s, TPOT {1e3 * self.tpot_s:g} ms{memory}"


SETTINGS = (
    Setting("a100-80g", "azure-conv", 4.0, 0.05, 2),
    Setting("a100-80g", "azure-conv", 12.0, 0.05, 3),
    Setting("a100-80g", "azure-conv", 24.0, 0.05, 5),
    Setting("a100-80g", "azure-conv", 24.0, 0.05, 5, 12_000),
    Setting("a100-80g", "sharegpt", 24.0, 0.05, 2),
    Setting("h100", "azure-conv", 24.0, 0.025, 3),
    Setting("h100", "azure-conv", 40.0, 0.025, 4),
)


def measure(setting: Setting, seed: int, split: str, share: float = 0.5) -> RunMetrics:
    """One run of two minutes of arrivals."""
    setup = Setup(
        policy="harli",
        options={"split": split, "share": share},
        workload=WorkloadSetup(synthetic=BURSTS.format(setting.lengths), rate_rps=setting.rate, duration_s=120.0),
        cluster=ClusterSetup(
            "llama-3.1-8b",
            setting.hardware,
            prefill=setting.prefill,
            decode=setting.decode,
            kv_blocks=setting.kv_blocks,
        ),
        slo=Target(5.0, setting.tpot_s),
    )
    return summarize(run(setup, seed, sample=False), setup.slo.slo())


def tuned_static(setting: Setting, seed: int, least: float) -> tuple[float, RunMetrics]:
    """The smallest share whose TPOT attainment is at least ``least``, by bisection, and its run."""
    low, high = 0, len(SHARES) - 1
    found = SHARES[high], measure(setting, seed, "static", SHARES[high])
    while low < high:
        middle = (low + high) // 2
        tried = measure(setting, seed, "static", SHARES[middle])
        if tried.tpot_attainment >= least:
            high, found = middle, (SHARES[middle], tried)
        else:
            low = middle + 1
    return found


def row(setting: Setting, seed: int) -> tuple[float, float]:
    """Print one line; the ratios over the tuned static split and over idle-only slicing."""
    alone = measure(setting, seed, "off")
    harli = measure(setting, seed, "adaptive")
    idle = measure(setting, seed, "idle")
    share, static = tuned_static(setting, seed, alone.tpot_attainment - POINT)
    rates = [run.finetune_tokens_per_s or 0.0 for run in (harli, static, idle)]
    ratios = rates[0] / max(rates[1], 1.0), rates[0] / max(rates[2], 1.0)
    shown = " | ".join(f"{100 * run.tpot_attainment:.2f}" for run in (alone, harli, static))
    p99 = " / ".join(f"{1e3 * (run.tpot_s.p99 or 0.0):.1f}" for run in (alone, harli, static))
    print(
        f"| {setting.title()} | {seed} | {shown} | {p99} | {share:.2f} | "
        + " | ".join(f"{rate:,.0f}" for rate in rates)
        + f" | {ratios[0]:.2f} |",
        flush=True,
    )
    return ratios


def compare(settings: tuple[Setting, ...], seeds: tuple[int, ...]) -> None:
    """The table."""
    print(
        "| setting | seed | TPOT met, alone % | harli % | static % | TPOT p99 of the three, ms | static share "
        "| harli tok/s | static tok/s | idle tok/s | harli over static |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
    )
    ratios = [row(setting, seed)[0] for setting in settings for seed in seeds]
    print(f"\nharli over the tuned static split: mean {np.mean(ratios):.2f}, least {min(ratios):.2f}, "
          f"most {max(ratios):.2f}")  # fmt: skip


def predictor(points: int = 3000, noise: float = 0.02) -> None:
    """Errors on random batches, contexts and pairs, against noisy measurements."""
    print("| hardware | mean error % | optimistic at P99 % | most optimistic % | stage 1 mean error % |")
    print("|---|--:|--:|--:|--:|")
    for name in ("a100-80g", "h100"):
        truth = CoRun(RooflineStepModel(model_spec("llama-3.1-8b"), hardware_spec(name), 1), 16)
        found = CoRunPredictor(profile(Profiler(truth), 256))
        rng = np.random.default_rng(7)
        errors: list[float] = []
        solo: list[float] = []
        while len(errors) < points:
            batch = int(rng.integers(1, 257))
            context = batch * int(np.exp(rng.uniform(np.log(128), np.log(12_000))))
            if context > 400_000:
                continue
            i = int(rng.integers(len(found.pairs)))
            pair = found.pairs[i]
            seconds = truth.decode_s(pair.sms, pair.sequences, batch, context) * np.exp(rng.normal(0.0, noise))
            errors.append(found.seconds(batch, context)[i] / seconds - 1.0)
            solo.append(found.solo.seconds(batch, context) / truth.whole.step_s(batch, context, [], []) - 1.0)
        shown = (np.abs(errors).mean(), -np.quantile(errors, 0.01), -min(errors), np.abs(solo).mean())
        print(f"| {name} | " + " | ".join(f"{100 * x:.1f}" for x in shown) + " |")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="?", default="compare", choices=("compare", "predictor"))
    parser.add_argument("--settings", default="", help="numbers of settings, from 0; all where absent")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    given = parser.parse_args()
    if given.what == "predictor":
        predictor()
        return
    picked = [int(x) for x in given.settings.split(",") if x] or range(len(SETTINGS))
    compare(tuple(SETTINGS[i] for i in picked), tuple(int(x) for x in given.seeds.split(",")))


if __name__ == "__main__":
    main()
