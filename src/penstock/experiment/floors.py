"""What no load can beat: prefill of a prompt alone, a decode step of one request; and targets below that."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np

from penstock.core.errors import PenstockError
from penstock.core.types import Role
from penstock.experiment.build import build_cluster
from penstock.experiment.setup import Setup, replace
from penstock.experiment.traffic import build_trace, slos
from penstock.report.columns import seconds
from penstock.sim.cluster import ClusterSpec, InstanceSpec
from penstock.workload.trace import Trace

SPARED = 0.1
"""Requests of one token have no TPOT; with this share of others or less, a TPOT target can still be met by 90 %."""
OTHER_TPS = (2, 4, 8)
OTHER_HARDWARE = ("h100", "h200", "b200")
"""Where a remedy is looked for, in this order."""


class Floors(msgspec.Struct, frozen=True):
    """Latencies of a request that has the cluster to itself, seconds.

    TTFT: prefill of the shortest, median and 90th-percentile prompt. TPOT: one decode step of one request, at the
    shortest prompt and at the median context. ``transfer_p50_s`` moves the KV of the median prompt (0 without
    disaggregation). ``prefill_bound`` (of the median prompt) and ``decode_bound`` (of one request) say whether
    compute or memory bandwidth sets the pace.
    """

    ttft_shortest_s: float
    ttft_p50_s: float
    ttft_p90_s: float
    tpot_shortest_s: float
    tpot_p50_s: float
    transfer_p50_s: float
    prompt_shortest: int
    prompt_p50: int
    prompt_p90: int
    prefill_bound: str
    decode_bound: str


def floors(cluster: ClusterSpec, trace: Trace) -> Floors:
    """The floors of the fastest instance of each phase for the requests of a trace."""
    prompts = trace.prompt_tokens
    shortest, p50, p90 = int(prompts.min()), int(np.median(prompts)), int(np.quantile(prompts, 0.9))
    context = p50 + int(np.median(trace.output_tokens)) // 2
    prefills = [spec for spec in cluster.instances if spec.role is not Role.DECODE]
    decodes = [spec for spec in cluster.instances if spec.role is not Role.PREFILL]
    link = min(spec.link_bytes_per_s for spec in cluster.instances)
    moved = 0.0 if decodes[0].role is Role.MIXED else cluster.link_latency_s + p50 * cluster.kv_bytes_per_token / link
    alone = {n: min(prefill_alone_s(spec, n) for spec in prefills) for n in (1, shortest, p50, p90)}
    one = min(spec.step_model.step_s(1, context, [], []) for spec in decodes)
    # Where two requests take nearly twice as long as one, it is not the reading of the weights.
    two = min(spec.step_model.step_s(2, 2 * context, [], []) for spec in decodes)
    return Floors(
        ttft_shortest_s=alone[shortest],
        ttft_p50_s=alone[p50],
        ttft_p90_s=alone[p90],
        tpot_shortest_s=min(spec.step_model.step_s(1, shortest + 1, [], []) for spec in decodes),
        tpot_p50_s=one,
        transfer_p50_s=moved,
        prompt_shortest=shortest,
        prompt_p50=p50,
        prompt_p90=p90,
        prefill_bound=_bound(alone[p50], alone[1]),
        decode_bound="memory bandwidth" if two < 1.7 * one else "compute",
    )


def _bound(alone_s: float, token_s: float) -> str:
    """What sets the pace of a prefill, given the seconds of one token (which is all reading of weights)."""
    return "compute" if alone_s > 1.5 * token_s else "memory bandwidth"


def prefill_alone_s(spec: InstanceSpec, tokens: int) -> float:
    """Seconds to prefill one prompt on an idle instance, in chunks of its token budget."""
    total, done = 0.0, 0
    while done < tokens:
        chunk = min(spec.max_num_batched_tokens, tokens - done)
        total += spec.step_model.step_s(0, 0, [chunk], [done])
        done += chunk
    return total


def check_targets(setup: Setup) -> None:
    """Raise PenstockError if no class has a target: every rate would meet the SLO."""
    targets = [setup.slo, *setup.slo_classes.values()]
    if all(slo.ttft_s is None and slo.tpot_s is None for slo in targets):
        raise PenstockError("without a target every rate meets the SLO", "give --ttft, --tpot or --slo")


def check_reachable(setup: Setup, trace: Trace | None = None) -> Floors:
    """Raise PenstockError if a class has a target that its requests could not meet even on an idle cluster.

    TTFT: not even the shortest prompt; TPOT: no request of two or more tokens.

    The error says by how much, which resource binds, and what would help: a longer target, tensor parallelism or
    another accelerator of the catalogue.
    """
    cluster = build_cluster(setup)
    trace = build_trace(setup) if trace is None else trace
    for i, (name, slo) in enumerate(slos(setup, trace).items()):
        rows = np.flatnonzero(trace.slo_class == i)
        if not len(rows):
            continue
        f = floors(cluster, trace.select(rows))
        whose = f" of class {name!r}" if len(trace.class_names) > 1 else ""
        c = setup.cluster
        if slo.tpot_s < f.tpot_shortest_s and float((trace.output_tokens[rows] > 1).mean()) > SPARED:
            raise PenstockError(
                f"TPOT SLO {seconds(slo.tpot_s)}{whose} cannot be met: one decode step of {c.model} on "
                f"{_machine(c.decode_hardware or c.hardware, c.tp if c.decode_tp is None else c.decode_tp)} takes at "
                f"least {seconds(f.tpot_shortest_s)} ({f.decode_bound} binds)",
                _remedy(setup, trace, rows.tolist(), "tpot", slo.tpot_s, f.tpot_shortest_s),
            )
        if slo.ttft_s < f.ttft_shortest_s:
            token_s = min(prefill_alone_s(spec, 1) for spec in cluster.instances if spec.role is not Role.DECODE)
            raise PenstockError(
                f"TTFT SLO {seconds(slo.ttft_s)}{whose} cannot be met: prefill of the shortest prompt "
                f"({f.prompt_shortest:,} tokens) of {c.model} on "
                f"{_machine(c.prefill_hardware or c.hardware, c.tp if c.prefill_tp is None else c.prefill_tp)} takes "
                f"at least {seconds(f.ttft_shortest_s)} ({_bound(f.ttft_shortest_s, token_s)} binds)",
                _remedy(setup, trace, rows.tolist(), "ttft", slo.ttft_s, f.ttft_shortest_s),
            )
    return floors(cluster, trace)


def _machine(hardware: str, tp: int) -> str:
    return hardware if tp == 1 else f"{tp} x {hardware}"


def _remedy(setup: Setup, trace: Trace, rows: Sequence[int], which: str, wanted_s: float, floor_s: float) -> str:
    """``raise --tpot to ≥ 9.2 ms or use --tp 2 (5.1 ms)``: whatever helps first, tried on the step models."""
    text = f"raise --{which} to ≥ {rounded_up(floor_s)}"
    c = setup.cluster
    if c.profile is not None:
        return text + " or use other hardware"
    mine = trace.select(np.array(rows, np.int64))
    best = (math.inf, "")
    for hardware in (c.hardware, *OTHER_HARDWARE):
        for tp in (*OTHER_TPS,) if hardware == c.hardware else (1, *OTHER_TPS):
            other = replace(
                c,
                hardware=hardware,
                tp=tp,
                prefill_hardware=None,
                decode_hardware=None,
                prefill_tp=None,
                decode_tp=None,
            )
            try:
                f = floors(build_cluster(replace(setup, cluster=other)), mine)
            except PenstockError:
                continue  # does not fit, or does not divide the heads
            reached = f.tpot_shortest_s if which == "tpot" else f.ttft_shortest_s
            flags = (
                f"--tp {tp}" if hardware == c.hardware else f"--hardware {hardware}" + (f" --tp {tp}" if tp > 1 else "")
            )
            if reached <= wanted_s:
                return f"{text} or use {flags} ({seconds(reached)})"
            best = min(best, (reached, flags))
    tried = f" (no hardware tried meets it; the fastest is {best[1]} with {seconds(best[0])})" if best[1] else ""
    return text + tried


def rounded_up(x: float) -> str:
    """Two digits, rounded up, with a unit: 9.13e-3 gives ``9.2 ms``."""
    scale, unit = (1e6, "µs") if x < 1e-3 else (1e3, "ms") if x < 1 else (1.0, "s")
    digits = 1 - math.floor(math.log10(x * scale))
    value = math.ceil(x * scale * 10**digits * (1 - 1e-12)) / 10**digits
    return f"{value:.{max(digits, 0)}f} {unit}"
