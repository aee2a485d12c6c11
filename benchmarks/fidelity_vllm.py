"""Replay three published vLLM runs with step models made from operator profiles alone, and report the errors.

``python benchmarks/fidelity_vllm.py [--shared ../shared] [--out docs/results/fidelity_vllm.md]``

The replay is ``fidelity_replay.replay``; to test another engine model, give :func:`study` a function of the same
signature. Only the runs' arrivals, lengths and engine configuration go in; nothing is fitted to their timings.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fidelity_engine import simulated
from fidelity_replay import EngineConfig, Request, replay
from penstock.perf.hardware import hardware_spec
from penstock.perf.kv import kv_capacity
from penstock.perf.models import model_spec
from penstock.perf.operator_profile import load_operator_profile
from penstock.perf.operators import OperatorStepModel
from penstock.perf.transfer import collective_link

STEP_GAP_S = 160e-6
"""Gap between two steps of vLLM V1 with asynchronous scheduling and captured graphs: 150 to 170 us (measured by the
author of vLLM pull request 11133, batch 256). The one constant that is neither in a profile nor in a catalogue."""

STATISTICS = ("mean", "p50", "p99")
Series = NDArray[np.float64]
Replay = Callable[[list[Request], EngineConfig, OperatorStepModel, int], list[Request]]


@dataclass(frozen=True)
class Run:
    """One published run: where it lies, and the catalogue names of its card and model."""

    folder: str
    profile: str
    hardware: str
    model: str


RUNS = (
    Run("RTX4090/Llama-3.1-8B", "RTX4090/meta-llama/Llama-3.1-8B", "rtx-4090", "llama-3.1-8b"),
    Run("RTXPRO6000/Llama-3.1-8B", "RTXPRO6000/meta-llama/Llama-3.1-8B", "rtx-pro-6000", "llama-3.1-8b"),
    Run(
        "RTXPRO6000/Qwen3-30B-A3B-Instruct-2507",
        "RTXPRO6000/Qwen/Qwen3-30B-A3B-Instruct-2507",
        "rtx-pro-6000",
        "qwen3-30b-a3b",
    ),
)


@dataclass(frozen=True)
class Outcome:
    """Metric name -> one value a request, in seconds: measured, and replayed; the published simulator's errors in %."""

    run: Run
    measured: dict[str, Series]
    replayed: dict[str, Series]
    published: dict[str, dict[str, float]]
    preemptions: int


def metrics(queued: Series, first: Series, last: Series, outputs: Series) -> dict[str, Series]:
    """TTFT, TPOT and E2E in seconds from the engine's own clock (both count from ``queued_ts``).

    This definition reproduces the vLLM column of the published summaries to the last digit.
    """
    return {"TTFT": first - queued, "TPOT": (last - first) / (outputs - 1), "E2E": last - queued}


def statistic(values: Series, name: str) -> float:
    """Mean or percentile (linear interpolation), in the unit of ``values``."""
    return float(values.mean() if name == "mean" else np.percentile(values, float(name[1:])))


def error_percent(outcome: Outcome, metric: str, name: str) -> float:
    """Signed error of the replay, percent of the measured value."""
    return 100.0 * (statistic(outcome.replayed[metric], name) / statistic(outcome.measured[metric], name) - 1.0)


def engine_of(meta: dict[str, dict[str, int]], run: Run) -> tuple[EngineConfig, int]:
    """The engine's limits from ``meta.json`` and its data-parallel ranks; KV blocks are estimated if not recorded."""
    engine = meta["engine_kwargs"]
    ranks = engine["data_parallel_size"]
    blocks = (
        meta.get("kv_cache", {}).get("num_gpu_blocks")
        or kv_capacity(model_spec(run.model), hardware_spec(run.hardware), ep=ranks).blocks
    )
    return EngineConfig(engine["max_num_seqs"], engine["max_num_batched_tokens"], blocks), ranks


def step_model_of(
    root: Path, run: Run, config: EngineConfig, ranks: int, gap_s: float = STEP_GAP_S, skew: bool | None = None
) -> OperatorStepModel:
    """The step model of a run, from its operator profile and the catalogues."""
    rate, latency = collective_link(hardware_spec(run.hardware))
    return load_operator_profile(
        root / "perf" / run.profile / "bf16" / "tp1",
        model_spec(run.model),
        ep=ranks,
        exchange_Bps=rate,
        exchange_latency_s=latency,
        max_num_seqs=config.max_num_seqs,
        skew=skew,
        overhead_s=gap_s,
    )


def stepwise(requests: list[Request], config: EngineConfig, model: OperatorStepModel, ranks: int) -> list[Request]:
    """The default :data:`Replay`: the step-by-step scheduler of ``fidelity_replay``."""
    return replay(requests, config, model.lockstep_s, ranks)


def study(
    root: Path, run: Run, gap_s: float = STEP_GAP_S, skew: bool | None = None, engine: Replay = stepwise
) -> Outcome:
    """Replay one run and set it beside what was measured. ``root`` is the ground-truth folder."""
    folder = root / run.folder
    rows = [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]
    rows.sort(key=lambda row: row["arrival_time"])
    config, ranks = engine_of(json.loads((folder / "meta.json").read_text()), run)
    start = rows[0]["arrival_time"]
    requests = [
        Request(i, row["arrival_time"] - start, row["input_toks"], row["output_toks"]) for i, row in enumerate(rows)
    ]
    served = engine(requests, config, step_model_of(root, run, config, ranks, gap_s, skew), ranks)
    columns = ("queued_ts", "first_token_ts", "last_token_ts", "output_toks")
    measured = metrics(*(np.array([row[c] for row in rows], dtype=np.float64) for c in columns))
    replayed = metrics(
        *(
            np.array(c, dtype=np.float64)
            for c in zip(*((r.queued_s, r.first_s, r.last_s, r.outputs) for r in served), strict=True)
        )
    )
    return Outcome(run, measured, replayed, published_errors(folder), sum(r.preempted for r in served))


def published_errors(folder: Path) -> dict[str, dict[str, float]]:
    """Errors in percent of the simulator that came with the runs, from its summary."""
    names = {"TTFT": "TTFT", "TPOT": "TPOT", "Latency": "E2E"}
    found: dict[str, dict[str, float]] = {}
    for line in (folder / "llmservingsim_validation_summary.txt").read_text().splitlines():
        cells = line.split()
        if len(cells) == 5 and cells[0] in names:
            which = {"Mean": "mean", "Median": "p50"}.get(cells[1], cells[1].lower())
            found.setdefault(names[cells[0]], {})[which] = float(cells[4].rstrip("%"))
    return found


def table(outcome: Outcome) -> list[str]:
    """Markdown rows of one run, values in milliseconds."""
    lines = ["| metric | vLLM, ms | Penstock, ms | error | published simulator |", "|---|---:|---:|---:|---:|"]
    for metric in outcome.measured:
        for name in STATISTICS:
            real = 1e3 * statistic(outcome.measured[metric], name)
            ours = 1e3 * statistic(outcome.replayed[metric], name)
            theirs = outcome.published.get(metric, {}).get(name, float("nan"))
            error = error_percent(outcome, metric, name)
            lines.append(f"| {metric} {name} | {real:,.1f} | {ours:,.1f} | {error:+.1f} % | {theirs:+.1f} % |")
    return lines


def mean_errors(outcome: Outcome) -> str:
    """The three errors of means, for a row of a table."""
    return " | ".join(f"{error_percent(outcome, metric, 'mean'):+.1f} %" for metric in outcome.measured)


def main() -> None:
    """Print or write the tables between the markers of the result page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    here = Path(__file__).resolve().parents[1]
    parser.add_argument("--shared", type=Path, default=here.parent / "shared")
    parser.add_argument("--out", type=Path, help="result page whose generated part is replaced")
    args = parser.parse_args()
    root = args.shared / "ground_truth"
    lines: list[str] = []
    outcomes = [study(root, run) for run in RUNS]
    for outcome in outcomes:
        lines += [f"### {outcome.run.folder}", "", *table(outcome), ""]
    lines += ["### The simulator's own engine on the same runs (errors of the means)", ""]
    lines += ["| run | engine | TTFT | TPOT | E2E | preemptions |", "|---|---|---:|---:|---:|---:|"]
    for run, outcome in zip(RUNS, outcomes, strict=True):
        own = study(root, run, engine=simulated)
        lines.append(f"| {run.folder} | replay | {mean_errors(outcome)} | {outcome.preemptions} |")
        lines.append(f"| | `penstock.sim` | {mean_errors(own)} | {own.preemptions} |")
    lines += ["", "### What each term contributes (errors of the means)", ""]
    lines += ["| run | variant | TTFT | TPOT | E2E |", "|---|---|---:|---:|---:|"]
    for run, outcome in zip(RUNS, outcomes, strict=True):
        lines.append(f"| {run.folder} | as above | {mean_errors(outcome)} |")
        lines.append(f"| | no gap between steps | {mean_errors(study(root, run, gap_s=0.0))} |")
        lines.append(f"| | no skew | {mean_errors(study(root, run, skew=False))} |")
        lines.append(f"| | skew | {mean_errors(study(root, run, skew=True))} |")
    text = "\n".join(lines)
    if args.out is None:
        print(text)
        return
    page = args.out.read_text()
    head, _, rest = page.partition("<!-- generated -->\n")
    tail = rest.partition("<!-- end -->")[2]
    args.out.write_text(f"{head}<!-- generated -->\n{text}\n<!-- end -->{tail}")


if __name__ == "__main__":
    main()
