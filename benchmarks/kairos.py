"""Kairos at its published shape: one prefill and one decode instance, a long-context mix, rates across the knee.

Usage: python benchmarks/kairos.py {rates,parts,gaps,steps} [--seeds 3] [--rates 4,4.5,...] [--jobs 2]

``rates``: attainment by rate against FCFS. ``parts``: the two mechanisms and their readings apart. ``gaps``: what a
client sees with and without a pacing buffer. ``steps``: the step times behind it.

The paper (arXiv 2605.02329) has MiniMax-M2.5 on 4 + 4 H200, TTFT 8 s, TPOT 50 ms and 1,000 requests of a trace that is
not public: the lengths here are ours. ``docs/results/kairos.md`` explains and reports.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import numpy as np

from penstock.core.types import Role, Slo
from penstock.experiment.repeat import fan_out
from penstock.perf.hardware import hardware_spec
from penstock.perf.kv import activation_reserve_bytes, kv_bytes_per_token, kv_capacity
from penstock.perf.models import ModelSpec
from penstock.perf.roofline import RooflineStepModel
from penstock.perf.transfer import link_between
from penstock.policy.engine import Batching, Composition, EngineKit, EngineParts, Job, Situation
from penstock.policy.options import OptionValue
from penstock.policy.parts import Beliefs
from penstock.policy.registry import build_policy
from penstock.report.metrics import summarize
from penstock.report.pacing import stalls
from penstock.sim.cluster import ClusterSpec, InstanceSpec
from penstock.sim.result import SimResult
from penstock.sim.run import simulate
from penstock.workload.arrivals import gamma_arrivals
from penstock.workload.trace import Trace

# Shapes of MiniMaxAI/MiniMax-M2.5's config.json: 229 B parameters, 10 B active, 254 kB of KV a token.
MODEL = ModelSpec(
    "minimax-m2.5",
    layers=62,
    hidden=3072,
    heads=48,
    kv_heads=8,
    head_dim=128,
    intermediate=1536,
    vocab=200064,
    weight_dtype="fp8",
    experts=256,
    experts_per_token=8,
    expert_intermediate=1536,
)
TP, SLO, REQUESTS = 4, Slo(ttft_s=8.0, tpot_s=0.05), 1000
RATES = (2.0, 3.0, 3.5, 4.0, 4.25, 4.5, 5.0)
PROMPT_MEDIAN, PROMPT_SIGMA, PROMPT_MOST = 4000.0, 1.3, 96_000
OUTPUT_MEDIAN, OUTPUT_SIGMA, OUTPUT_MOST = 500.0, 1.0, 8_000
Options = dict[str, OptionValue]


class Case(NamedTuple):
    """One run."""

    policy: str
    options: Options
    rate_rps: float
    seed: int


class Figures(NamedTuple):
    """Shares within the SLO, per cent, and tokens/s of the median request after its first token."""

    both: float
    ttft: float
    tpot: float
    speed: float


def trace(rate_rps: float, seed: int) -> Trace:
    """Poisson arrivals; prompts and outputs log-normal, independent, with a long tail of prompts."""
    arrivals, lengths = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
    prompt = np.exp(lengths.normal(np.log(PROMPT_MEDIAN), PROMPT_SIGMA, REQUESTS))
    output = np.exp(lengths.normal(np.log(OUTPUT_MEDIAN), OUTPUT_SIGMA, REQUESTS))
    return Trace(
        gamma_arrivals(REQUESTS, rate_rps, 1.0, arrivals),
        np.clip(prompt, 64, PROMPT_MOST).astype(np.int64),
        np.clip(output, 2, OUTPUT_MOST).astype(np.int64),
        np.zeros(REQUESTS, np.int16),
        source="long-context mix",
    )


def cluster() -> tuple[ClusterSpec, Beliefs]:
    """One prefill and one decode instance of four H200 each; the policy believes the truth."""
    hardware = hardware_spec("h200")
    step = RooflineStepModel(MODEL, hardware, TP)
    room = kv_capacity(MODEL, hardware, TP, reserve_bytes=activation_reserve_bytes(MODEL, TP, 8192, 256))
    link = link_between(hardware, hardware, TP)
    specs = [
        InstanceSpec(role, step, room.blocks, room.block_size, link_bytes_per_s=link.bandwidth_Bps)
        for role in (Role.PREFILL, Role.DECODE)
    ]
    per_token = float(kv_bytes_per_token(MODEL, "bf16"))
    spec = ClusterSpec(tuple(specs), per_token, link.latency_s)
    return spec, Beliefs(step, per_token, link.bandwidth_Bps, link.latency_s)


def figures(case: Case) -> Figures:
    """Run a case."""
    spec, beliefs = cluster()
    policy = build_policy(case.policy, beliefs, SLO, **case.options)
    return reduced(simulate(trace(case.rate_rps, case.seed), spec, policy, beliefs, SLO))


def reduced(result: SimResult) -> Figures:
    """The figures of a run."""
    m = summarize(result, SLO)
    median = m.tpot_s.p50
    return Figures(
        100 * m.attainment, 100 * m.ttft_attainment, 100 * m.tpot_attainment, 1 / median if median else float("nan")
    )


def means(cases: list[list[Case]], jobs: int) -> list[Figures]:
    """The mean over the seeds of each row of cases."""
    flat = [(case,) for row in cases for case in row]
    found = iter(fan_out(figures, flat, jobs))
    return [Figures(*np.mean([next(found) for _ in row], axis=0)) for row in cases]


def show_rates(rates: list[float], seeds: int, jobs: int) -> None:
    """Kairos against FCFS with the same placement, by rate."""
    print(f"{'req/s':>6} | FCFS both ttft tpot  tok/s | Kairos both ttft tpot  tok/s | gain (points)")
    rows = [[Case(p, {}, r, s) for s in range(seeds)] for r in rates for p in ("least-kv", "kairos")]
    found = means(rows, jobs)
    for i, rate in enumerate(rates):
        a, b = found[2 * i], found[2 * i + 1]
        print(
            f"{rate:6.2f} | {a.both:9.1f} {a.ttft:5.1f} {a.tpot:5.1f} {a.speed:5.1f} |"
            f" {b.both:10.1f} {b.ttft:5.1f} {b.tpot:5.1f} {b.speed:5.1f} | {b.both - a.both:+.1f}"
        )


PARTS: dict[str, tuple[str, Options]] = {
    "FCFS": ("least-kv", {}),
    "shortest prompt first": ("least-kv", {"order": "sjf"}),
    "slack x length": ("kairos", {"subset": "off"}),
    "slack x length, late as rest": ("kairos", {"subset": "off", "late": "same"}),
    "slack / length": ("kairos", {"subset": "off", "order": "per-token"}),
    "slack / length, late as rest": ("kairos", {"subset": "off", "order": "per-token", "late": "same"}),
    "slack": ("kairos", {"subset": "off", "order": "laxity"}),
    "slack, late as rest": ("kairos", {"subset": "off", "order": "laxity", "late": "same"}),
    "arrival, late last": ("kairos", {"subset": "off", "order": "arrival"}),
    "decode subset only": ("kairos", {"order": "off"}),
    "kairos": ("kairos", {}),
    "kairos, fastest subset": ("kairos", {"subset": "fastest"}),
    "the same, 2 s in reserve": ("kairos", {"subset": "fastest", "reserve": 2.0}),
}


def show_parts(rates: list[float], seeds: int, jobs: int) -> None:
    """The mechanisms apart."""
    for rate in rates:
        print(f"{rate:g} requests/s              both  ttft  tpot  tok/s")
        found = means([[Case(p, o, rate, s) for s in range(seeds)] for p, o in PARTS.values()], jobs)
        for label, f in zip(PARTS, found, strict=True):
            print(f"  {label:28} {f.both:5.1f} {f.ttft:5.1f} {f.tpot:5.1f} {f.speed:5.1f}")


class Watched(Batching):
    """Another batching part, noting when each request's tokens came."""

    def __init__(self, inner: Batching | None, times_s: dict[int, list[float]]) -> None:
        self.inner = inner
        self.times_s = times_s

    def compose(self, decodes: list[Job], waiting: list[Job], situation: Situation) -> Composition:
        """See :class:`Batching`."""
        for job in decodes:
            seen = self.times_s.setdefault(job.request, [job.first_token_s])
            while len(seen) < job.generated():
                seen.append(situation.now_s)
        return Composition(decodes) if self.inner is None else self.inner.compose(decodes, waiting, situation)


class WatchedKit(EngineKit):
    """Another kit, watched."""

    def __init__(self, inner: EngineKit | None, times_s: dict[int, list[float]]) -> None:
        self.inner = inner
        self.times_s = times_s

    def parts(self, instance: int, role: Role) -> EngineParts:
        """See :class:`EngineKit`."""
        found = EngineParts() if self.inner is None else self.inner.parts(instance, role)
        if role == Role.DECODE:
            found.batching = Watched(found.batching, self.times_s)
        return found


def show_gaps(rates: list[float]) -> None:
    """Gaps between tokens as they come, and behind a buffer that shows one each TPOT."""
    print("req/s policy    P99 gap, ms   gaps > 50 ms, %   stalls behind the buffer, %   longest stall, ms")
    spec, beliefs = cluster()
    for rate in rates:
        for name in ("least-kv", "kairos"):
            times_s: dict[int, list[float]] = {}
            policy = build_policy(name, beliefs, SLO)
            policy.engine = WatchedKit(policy.engine, times_s)
            simulate(trace(rate, 0), spec, policy, beliefs, SLO)
            raw = np.concatenate([np.diff(t) for t in times_s.values()])
            late = np.concatenate([stalls(np.array(t), SLO.tpot_s) for t in times_s.values()])
            print(
                f"{rate:5.2f} {name:9} {1e3 * np.quantile(raw, 0.99):10.1f} {100 * np.mean(raw > SLO.tpot_s):14.2f}"
                f" {100 * np.mean(late > 0.0):22.2f} {1e3 * late.max():22.1f}"
            )


def show_steps() -> None:
    """Step times by batch and length, and the room for KV."""
    spec, beliefs = cluster()
    print("room for", spec.instances[1].capacity_tokens, "tokens")
    for batch in (1, 8, 16, 32, 64, 128):
        line = [f"{n // 1024}K {1e3 * beliefs.decode_step_s(batch, batch * n):.1f} ms" for n in (8192, 32768, 131072)]
        print(f"decode, batch {batch:3}:", ", ".join(line))
    for n in (1024, 8192, 32768, PROMPT_MOST, 131072):
        print(f"prefill of {n:6} tokens: {beliefs.prefill_s(n):.2f} s")
    t = trace(1.0, 0)
    for name, column in (("prompt", t.prompt_tokens), ("output", t.output_tokens)):
        print(f"{name}: mean {column.mean():.0f}, P50/P90/P99 {np.quantile(column, [0.5, 0.9, 0.99]).astype(int)}")


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("rates", "parts", "gaps", "steps"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=lambda text: [float(x) for x in text.split(",")], default=list(RATES))
    parser.add_argument("--jobs", type=int, default=2)
    a = parser.parse_args()
    if a.what == "rates":
        show_rates(a.rates, a.seeds, a.jobs)
    elif a.what == "parts":
        show_parts(a.rates, a.seeds, a.jobs)
    elif a.what == "gaps":
        show_gaps(a.rates)
    else:
        show_steps()


if __name__ == "__main__":
    main()
