"""How fast the simulator is: requests per second, growth with requests and with lengths, memory, and against stepping.

Run: ``python benchmarks/simulate_speed.py``. Every figure is the median of several runs of the event loop
alone (``wall_s``); ratios are within this run, because machines differ. Each case runs in a process of its own, so
that its peak memory is its own.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from penstock.core.types import Role, Slo
from penstock.perf.hardware import hardware_spec
from penstock.perf.kv import kv_bytes_per_token, kv_capacity
from penstock.perf.models import model_spec
from penstock.perf.roofline import RooflineStepModel
from penstock.policy.parts import Beliefs
from penstock.policy.registry import build_policy
from penstock.sim.cluster import ClusterSpec, InstanceSpec, Scenario
from penstock.sim.run import simulate
from penstock.workload.read import read_trace
from penstock.workload.synthetic import synthesize
from penstock.workload.trace import Trace

AZURE = Path(__file__).resolve().parents[2] / "shared" / "traces" / "azure_conv_2023.csv"
PEER_S = 4.6
"""Simulation seconds of the fastest peer for the Azure conversation trace on 2P2D, on a two-core machine like ours."""


def measure(trace: Trace, runs: int, policy: str = "least-kv", stepping: bool = False) -> dict[str, float]:
    """Median wall seconds of ``runs`` simulations of 2P2D, Llama-3.1-8B on A100-80G, KV over 25 GB/s."""
    model, card = model_spec("llama-3.1-8b"), hardware_spec("a100-80g")
    step, per_token = RooflineStepModel(model, card), kv_bytes_per_token(model)
    blocks = kv_capacity(model, card).blocks
    roles = [Role.PREFILL] * 2 + [Role.DECODE] * 2
    cluster = ClusterSpec(tuple(InstanceSpec(r, step, blocks) for r in roles), per_token)
    beliefs = Beliefs(step, per_token, 25e9)
    slo = Slo(1.0, 0.05)
    walls, events = [], 0
    for _ in range(runs):
        result = simulate(trace, cluster, build_policy(policy, beliefs, slo), beliefs, slo, Scenario(stepping=stepping))
        assert (result.requests.outcome == 1).all(), "every request must finish"
        walls.append(result.wall_s)
        events = result.events
    return {
        "requests": len(trace),
        "wall_s": statistics.median(walls),
        "events": events,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def longer(trace: Trace, factor: int) -> Trace:
    """The same requests with outputs ``factor`` times as long, arriving ``factor`` times as slowly: the same load."""
    return replace(trace, output_tokens=trace.output_tokens * factor, arrival_s=trace.arrival_s * factor)


CASES: dict[str, Callable[[], dict[str, float]]] = {
    "azure-file": lambda: measure(read_trace(str(AZURE)), 5),
    "azure-file-stepping": lambda: measure(read_trace(str(AZURE)).head(2000), 1, stepping=True),
    "azure-file-leaping": lambda: measure(read_trace(str(AZURE)).head(2000), 3),
    "10000": lambda: measure(synthesize("azure-conv", 10_000, 5.0, seed=1), 3),
    "100000": lambda: measure(synthesize("azure-conv", 100_000, 5.0, seed=1), 3),
    "1000000": lambda: measure(synthesize("azure-conv", 1_000_000, 5.0, seed=1), 1),
    "outputs-x1": lambda: measure(synthesize("azure-conv", 20_000, 5.0, seed=1), 3),
    "outputs-x10": lambda: measure(longer(synthesize("azure-conv", 20_000, 5.0, seed=1), 10), 3),
}


def run_case(name: str, interpreted: bool = False) -> dict[str, float]:
    """Measure one case in a fresh process."""
    environment = {**os.environ, **({"PENSTOCK_INTERPRETED": "1"} if interpreted else {})}
    out = subprocess.run(
        [sys.executable, __file__, "--case", name], capture_output=True, text=True, check=True, env=environment
    )
    figures: dict[str, float] = json.loads(out.stdout)
    return figures


def line(label: str, figures: dict[str, float], note: str = "") -> None:
    """Print one row."""
    rate = figures["requests"] / figures["wall_s"]
    print(
        f"{label:34} {figures['requests']:>9,.0f} requests {figures['wall_s']:>8.3f} s {rate:>9,.0f}/s "
        f"{figures['events'] / figures['requests']:>5.1f} events each {figures['peak_mib']:>6,.0f} MiB  {note}"
    )


def main() -> None:
    """Run all cases and print the table."""
    if sys.argv[1:2] == ["--case"]:
        print(json.dumps(CASES[sys.argv[2]]()))
        return
    import penstock

    print(f"2P2D, Llama-3.1-8B on A100-80G, least-kv, {penstock.FORM} core; event loop only, one core")
    if AZURE.exists():
        azure = run_case("azure-file")
        line("Azure conversation trace", azure, f"{PEER_S / azure['wall_s']:.1f} times the fastest peer's {PEER_S} s")
        slow = run_case("azure-file", interpreted=True)
        line("  the same, interpreted", slow, f"{slow['wall_s'] / azure['wall_s']:.1f} times as long")
        leap, step = run_case("azure-file-leaping"), run_case("azure-file-stepping")
        line("  first 2,000, leaping", leap)
        line("  first 2,000, every step taken", step, f"{step['wall_s'] / leap['wall_s']:.1f} times as long")
    sizes = {n: run_case(n) for n in ("10000", "100000", "1000000")}
    base = sizes["10000"]["wall_s"] / sizes["10000"]["requests"]
    for name, figures in sizes.items():
        note = f"{figures['wall_s'] / figures['requests'] / base:.2f} times the cost per request of 10,000"
        line(f"azure-conv profile, {int(name):,}", figures, note)
    short, tall = run_case("outputs-x1"), run_case("outputs-x10")
    line("outputs x 1", short)
    line("outputs x 10 (rate / 10)", tall, f"{tall['wall_s'] / short['wall_s']:.2f} times as long")


if __name__ == "__main__":
    main()
