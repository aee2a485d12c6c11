"""Which resource binds: a run's misses explained by what the cluster was short of, in one sentence."""

from __future__ import annotations

import math

import msgspec

from penstock.experiment.build import build_cluster
from penstock.experiment.floors import Floors, floors
from penstock.experiment.setup import Setup
from penstock.experiment.traffic import slos
from penstock.report.columns import percent, seconds
from penstock.report.metrics import ClassMetrics, InstanceMetrics, RunMetrics
from penstock.sim.cluster import ClusterSpec
from penstock.workload.trace import Trace

GOAL = 0.9
BUSY = 0.8
"""An instance that is busy for this share of the run has no capacity to spare."""
LINK_BUSY = 0.7
"""A link that carries bytes for this share of the run: transfers queue on it."""
TRANSFER_SHARE = 0.1
"""With a smaller share of the wait for decode, it is not the transfer that takes long."""
COMFORT = 0.99
"""With this attainment nothing is said to bind."""
FULL = 0.98
"""A KV cache whose peak use was this share was full."""


class Diagnosis(msgspec.Struct, frozen=True):
    """What limited a run.

    ``binding`` is ``nothing``, ``prefill compute``, ``prefill memory bandwidth``, ``decode compute``, ``decode memory
    bandwidth``, ``KV capacity``, ``link``, ``queueing``, ``interference`` or ``admission``. ``missed`` is the target
    missed most (``TTFT``, ``TPOT``) of class ``slo_class``; ``target_s`` its value, ``p90_s`` what was reached,
    ``over`` the ratio of the two (above 1: missed by that factor; None where nothing finished). ``text`` says it in a
    sentence.
    """

    binding: str
    text: str
    attainment: float
    slo_class: str
    missed: str | None
    target_s: float | None
    p90_s: float | None
    over: float | None
    floors: Floors


def explain(setup: Setup, trace: Trace, run: RunMetrics, goal: float = GOAL) -> Diagnosis:
    """Why the run missed its SLO, or how much room it has. Judges the class with the lowest attainment."""
    name, worst = min(
        run.classes.items(), key=lambda item: math.inf if item[1].attainment is None else item[1].attainment
    )
    cluster = build_cluster(setup)
    f = floors(cluster, trace)
    slo = slos(setup, trace)[name]
    misses = run.misses
    refused = misses.rejected + misses.unfinished
    by_ttft, by_tpot = misses.ttft + misses.both, misses.tpot + misses.both
    missed: str | None = None
    target: float | None = None
    p90: float | None = None
    if refused > max(by_ttft, by_tpot) and run.attainment < COMFORT:
        binding, why = _refused(run)
    elif run.attainment >= COMFORT:
        binding, why = "nothing", ""
    elif by_ttft >= by_tpot:
        missed, target, p90 = "TTFT", slo.ttft_s, worst.ttft_s.p90
        binding, why = _link(run, cluster, f) or _ttft(run, f, slo.ttft_s)
    else:
        missed, target, p90 = "TPOT", slo.tpot_s, worst.tpot_s.p90
        binding, why = _link(run, cluster, f) or _tpot(run, worst, f, slo.tpot_s)
    over = p90 / target if p90 is not None and target is not None and math.isfinite(target) else None
    met = run.attainment >= goal
    if binding == "nothing":
        text = "Nothing binds: " + _room(worst, slo.ttft_s, slo.tpot_s)
    else:
        text = f"{binding[0].upper()}{binding[1:]} binds{' first' if met else ''}: {why}"
        if missed and target is not None and p90 is not None and over is not None:
            text = f"P90 {missed} {seconds(p90)} is {_by(over)} the target of {seconds(target)}. {text}"
    return Diagnosis(binding, text, run.attainment, name, missed, target, p90, over, f)


def _by(over: float) -> str:
    return f"{over:.3g} times" if over >= 1.1 else f"{abs(over - 1):.0%} {'above' if over > 1 else 'below'}"


def _room(worst: ClassMetrics, ttft_s: float, tpot_s: float) -> str:
    parts = []
    for label, spread, limit in (("TTFT", worst.ttft_s, ttft_s), ("TPOT", worst.tpot_s, tpot_s)):
        if spread.p99 is not None and math.isfinite(limit):
            parts.append(f"P99 {label} is {percent(spread.p99 / limit)} of its target")
    return (", ".join(parts) or "there is no target") + "."


def _refused(run: RunMetrics) -> tuple[str, str]:
    if run.misses.unfinished >= run.misses.rejected:
        return "queueing", f"{run.misses.unfinished:,} requests were unfinished at the end."
    reason, count = max(run.reject_reasons.items(), key=lambda item: item[1], default=("rejected", run.rejected))
    binding = "KV capacity" if "not fit" in reason else "admission"
    return binding, f"{count:,} requests were rejected ({reason})."


def _link(run: RunMetrics, cluster: ClusterSpec, f: Floors) -> tuple[str, str] | None:
    """A link that was busy all the time, whatever it made others wait for."""
    span = max(run.simulated_seconds, 1e-9)
    pairs = zip(run.instances, cluster.instances, strict=True)
    busy = max(max(i.bytes_in, i.bytes_out) / (spec.link_bytes_per_s * span) for i, spec in pairs)
    if busy < LINK_BUSY:
        return None
    return (
        "link",
        f"the busiest link carries KV {percent(min(busy, 1.0))} of the time, P90 wait for decode "
        f"{seconds(run.decode_wait_s.p90 or 0.0)} ({seconds(f.transfer_p50_s)} on an idle link); use faster links.",
    )


def _ttft(run: RunMetrics, f: Floors, target_s: float) -> tuple[str, str]:
    short = "compute" if f.prefill_bound == "compute" else f.prefill_bound
    if f.ttft_p90_s > target_s:
        return (
            f"prefill {short}",
            f"a prompt of {f.prompt_p90:,} tokens (P90) alone takes {seconds(f.ttft_p90_s)}, at any load; "
            "use faster prefill hardware or more tensor parallelism.",
        )
    prefills = [i for i in run.instances if i.role != "decode"]
    busy, full = _busiest(prefills), _fullest(prefills)
    if full >= FULL and busy < BUSY:
        return (
            "KV capacity",
            f"prefill instances ran out of KV blocks ({percent(full)} at the peak) while their KV waited for decode; "
            "add decode instances or memory.",
        )
    if busy >= BUSY or prefills[0].role == "mixed":
        what = "mixed" if prefills[0].role == "mixed" else "prefill"
        return (
            f"prefill {short}",
            f"{what} instances are busy {percent(busy)} of the time and requests queue {_p90(run)} (P90); "
            f"add {what} instances, or send less.",
        )
    return (
        "queueing",
        f"requests queue {_p90(run)} (P90) though the busiest prefill instance works only {percent(busy)} of the time: "
        "bursts; add prefill instances, or place by queue length.",
    )


def _tpot(run: RunMetrics, worst: ClassMetrics, f: Floors, target_s: float) -> tuple[str, str]:
    decodes = [i for i in run.instances if i.role != "prefill"]
    pace = f"decode {f.decode_bound}"
    if f.tpot_p50_s > target_s:
        return (
            pace,
            f"one request alone takes {seconds(f.tpot_p50_s)} a token; use faster memory or tensor parallelism.",
        )
    wait = run.decode_wait_s.p90 or 0.0
    lasts = (worst.e2e_s.p50 or 0.0) - (worst.ttft_s.p50 or 0.0)
    full, preemptions = _fullest(decodes), run.preemptions or 0
    if full >= FULL and (preemptions > 0 or wait > 5 * f.transfer_p50_s):
        return (
            "KV capacity",
            f"decode instances were full ({percent(full)} of the blocks at the peak), {preemptions:,} preemptions, "
            f"P90 wait for decode {seconds(wait)}; add decode instances or memory.",
        )
    if wait > 0.3 * max(lasts, 1e-9) and wait > 0.002:
        if f.transfer_p50_s < TRANSFER_SHARE * wait:  # nor is a link busy: they wait for slots or blocks
            return (
                "queueing",
                f"requests wait {seconds(wait)} (P90) for a place in a decode batch (the KV transfer alone takes "
                f"{seconds(f.transfer_p50_s)}); add decode instances, or raise --max-num-seqs.",
            )
        return (
            "link",
            f"the KV transfer takes {seconds(wait)} (P90; {seconds(f.transfer_p50_s)} on an idle link); "
            "use a faster link, or fewer transfers at once.",
        )
    itl, gap = run.itl_s.p50 or 0.0, run.itl_s.p99 or 0.0
    if decodes[0].role == "mixed" and gap > 2 * itl:
        return (
            "interference",
            f"prefill steps between decode steps stretch P99 ITL to {seconds(gap)} (P50 {seconds(itl)}); "
            "disaggregate, or lower --max-num-batched-tokens.",
        )
    return (
        pace,
        f"decode steps take {seconds(itl)} (P50 ITL) with the batches of this load, {seconds(f.tpot_p50_s)} alone; "
        "add decode instances, or send less.",
    )


def _p90(run: RunMetrics) -> str:
    return seconds(run.queueing_s.p90 or 0.0)


def _busiest(instances: list[InstanceMetrics]) -> float:
    return max((i.busy_share for i in instances), default=0.0)


def _fullest(instances: list[InstanceMetrics]) -> float:
    return max((i.peak_kv_share or 0.0 for i in instances), default=0.0)
