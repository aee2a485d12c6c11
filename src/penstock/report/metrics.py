"""What a run achieved, as one documented object: the contents of ``--json FILE`` (see ``docs/results-json.md``).

Definitions follow the field's words (``penstock.core.types.Slo``): TTFT counts queueing, TPOT counts the KV transfer.
Percentiles interpolate linearly between order statistics, as ``numpy.quantile`` does by default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from penstock.core.errors import PenstockError
from penstock.core.types import Role, Slo
from penstock.report.energy import instance_energy, run_energy
from penstock.report.quantiles import GapStatistics
from penstock.report.schema import ClassMetrics, InstanceMetrics, Misses, RunMetrics, Spread
from penstock.sim.result import Outcome, SimResult, TokenGaps
from penstock.workload.trace import F64

__all__ = [
    "ClassMetrics",
    "InstanceMetrics",
    "Misses",
    "RunMetrics",
    "Slos",
    "Spread",
    "Verdicts",
    "role_name",
    "spread",
    "spread_of_gaps",
    "summarize",
    "targets",
]

ROUNDING_S = 1e-9
"""A token that is late by less is on time: its time is a sum of many."""
PERCENTILES = (0.5, 0.9, 0.95, 0.99)
Bools = NDArray[np.bool_]
Slos = Slo | Mapping[str, Slo]
"""One SLO for all, or one for each class name of the trace."""


class Verdicts:
    """Per-request figures and whether each target was met; all columns have one row a request of the trace.

    Attributes
    ----------
    ttft_s, tpot_s, e2e_s : float64[n]
        NaN where the request has none.
    ttft_target_s, tpot_target_s : float64[n]
        Targets of each request, inf for none.
    ttft_met, tpot_met, met : bool[n]
        As in :class:`RunMetrics`. Where the run noted ``lateness_s``, ``tpot_met`` says that every token after the
        first came by its deadline: the deadline form of the SLO, by the targets of the run.
    late_s : float64[n] or None
        The most that any token came after its deadline, negative where all were early, NaN where not finished.
    """

    def __init__(self, result: SimResult, slo: Slos) -> None:
        trace, r = result.trace, result.requests
        slos = targets(trace.class_names, slo)
        self.finished: Bools = r.outcome == Outcome.FINISHED
        self.rejected: Bools = r.outcome == Outcome.REJECTED
        self.ttft_s: F64 = r.first_token_s - trace.arrival_s
        self.e2e_s: F64 = np.where(self.finished, r.finish_s - trace.arrival_s, np.nan)
        several = self.finished & (r.emitted > 1)
        self.tpot_s: F64 = np.where(several, (r.finish_s - r.first_token_s) / np.maximum(r.emitted - 1, 1), np.nan)
        self.ttft_target_s: F64 = np.array([slos[name].ttft_s for name in trace.class_names])[trace.slo_class]
        self.tpot_target_s: F64 = np.array([slos[name].tpot_s for name in trace.class_names])[trace.slo_class]
        self.ttft_met: Bools = self.ttft_s <= self.ttft_target_s
        self.tpot_met: Bools = (self.tpot_s <= self.tpot_target_s) | (self.finished & (r.emitted <= 1))
        self.late_s: F64 | None = None
        if r.lateness_s is not None:
            self.tpot_met = self.finished & (r.lateness_s <= ROUNDING_S)
            late = np.maximum(self.ttft_s - self.ttft_target_s, r.lateness_s)
            self.late_s = np.where(self.finished, late, np.nan)
        self.met: Bools = self.ttft_met & self.tpot_met & self.finished


def targets(class_names: tuple[str, ...], slo: Slos) -> dict[str, Slo]:
    """The SLO of each class name; raises PenstockError for a class without one."""
    if isinstance(slo, Slo):
        return dict.fromkeys(class_names, slo)
    missing = [name for name in class_names if name not in slo]
    if missing:
        raise PenstockError(f"no SLO for class {missing[0]!r}", f"the SLO names {sorted(slo) or 'no class'}; add it")
    return {name: slo[name] for name in class_names}


def summarize(result: SimResult, slo: Slos) -> RunMetrics:
    """Reduce a run to its figures.

    Parameters
    ----------
    result : SimResult
        Columns of a finished simulation.
    slo : Slo or mapping of class name to Slo
        Targets to judge by; need not be those the policy was given.

    Notes
    -----
    A result without instances was measured from outside: what only the inside can count is None.

    Raises
    ------
    PenstockError
        If a mapping lacks a class of the trace.
    """
    trace, r, v = result.trace, result.requests, Verdicts(result, slo)
    n, span = len(trace), result.simulated_s
    inside = len(result.instances.role) > 0
    started = np.isfinite(r.first_token_s)
    gone = v.finished & ~v.met
    return RunMetrics(
        policy=result.policy,
        trace=trace.source,
        requests=n,
        finished=_count(v.finished),
        rejected=_count(v.rejected),
        unfinished=n - _count(v.finished | v.rejected),
        attainment=_count(v.met) / n,
        ttft_attainment=_count(v.ttft_met) / n,
        tpot_attainment=_count(v.tpot_met) / n,
        offered_rps=trace.rate_rps,
        throughput_rps=_rate(_count(v.finished), span),
        goodput_rps=_rate(_count(v.met), span),
        output_tokens_per_s=_rate(float(r.emitted.sum()), span),
        prompt_tokens_per_s=_rate(float(trace.prompt_tokens[started].sum()), span),
        ttft_s=spread(v.ttft_s),
        tpot_s=spread(v.tpot_s),
        itl_s=spread_of_gaps(result.gaps),
        e2e_s=spread(v.e2e_s),
        queueing_s=spread(r.prefill_start_s - trace.arrival_s),
        decode_wait_s=spread(r.decode_start_s - r.first_token_s),
        migration_pause_s=spread(result.migrations.pause_s),
        preemptions=int(r.preemptions.sum()) if inside else None,
        migrations=len(result.migrations.request) if inside else None,
        migrated_tokens=int(result.migrations.tokens.sum()) if inside else None,
        failed_migrations=dict(result.failed_migrations) if inside else None,
        leases_expired=result.leases_expired if inside else None,
        flips=len(result.flips.instance) if inside else None,
        reject_reasons=dict(result.reject_reasons),
        resident_cv=_imbalance(result),
        simulated_seconds=span,
        wall_seconds=result.wall_s,
        events=result.events if inside else None,
        misses=Misses(
            ttft=_count(gone & ~v.ttft_met & v.tpot_met),
            tpot=_count(gone & v.ttft_met & ~v.tpot_met),
            both=_count(gone & ~v.ttft_met & ~v.tpot_met),
            rejected=_count(v.rejected),
            unfinished=n - _count(v.finished | v.rejected),
        ),
        classes={
            name: _class(v, trace.slo_class == i, targets((name,), slo)[name], span)
            for i, name in enumerate(trace.class_names)
        },
        instances=_instances(result, v),
        slo_form="mean" if v.late_s is None else "deadline",
        lateness_s=None if v.late_s is None else spread(np.where(np.isfinite(v.late_s), v.late_s, np.nan)),
        finetune_tokens_per_s=_finetuning(result),
        **run_energy(result),
    )


def _finetuning(result: SimResult) -> float | None:
    tokens = result.instances.finetune_tokens
    return None if tokens is None else _rate(float(tokens.sum()), result.simulated_s)


def spread(values: F64) -> Spread:
    """Mean, percentiles and maximum of the values that are not NaN."""
    values = values[~np.isnan(values)]
    if not len(values):
        return Spread(0, None, None, None, None, None, None)
    p50, p90, p95, p99 = np.quantile(values, PERCENTILES).tolist()
    return Spread(len(values), float(values.mean()), p50, p90, p95, p99, float(values.max()))


def spread_of_gaps(gaps: TokenGaps) -> Spread:
    """The same, exactly, for compressed token gaps."""
    g = GapStatistics(gaps)
    p50, p90, p95, p99 = (g.quantile(q) for q in PERCENTILES)
    return Spread(g.total, g.mean_s, p50, p90, p95, p99, g.max_s)


def role_name(role: int) -> str:
    """``prefill``, ``decode`` or ``mixed``."""
    return Role(role).name.lower()


def _class(v: Verdicts, mine: Bools, slo: Slo, span: float) -> ClassMetrics:
    n, finished, rejected = _count(mine), _count(mine & v.finished), _count(mine & v.rejected)
    return ClassMetrics(
        requests=n,
        finished=finished,
        rejected=rejected,
        unfinished=n - finished - rejected,
        ttft_target_s=slo.ttft_s if math.isfinite(slo.ttft_s) else None,
        tpot_target_s=slo.tpot_s if math.isfinite(slo.tpot_s) else None,
        attainment=_count(mine & v.met) / n if n else None,
        ttft_attainment=_count(mine & v.ttft_met) / n if n else None,
        tpot_attainment=_count(mine & v.tpot_met) / n if n else None,
        goodput_rps=_rate(_count(mine & v.met), span),
        ttft_s=spread(v.ttft_s[mine]),
        tpot_s=spread(v.tpot_s[mine]),
        e2e_s=spread(v.e2e_s[mine]),
    )


def _instances(result: SimResult, v: Verdicts) -> list[InstanceMetrics]:
    columns, r, span = result.instances, result.requests, result.simulated_s
    n = len(columns.role)
    ttft_misses = _by_instance(r.prefill_instance, np.isfinite(v.ttft_s) & ~v.ttft_met, n)
    tpot_misses = _by_instance(r.decode_instance, v.finished & ~v.tpot_met, n)
    drawn = [instance_energy(result, i) for i in range(n)]
    return [
        InstanceMetrics(
            instance=i,
            role=role_name(int(columns.role[i])),
            busy_share=_rate(float(columns.busy_s[i]), span),
            steps=int(columns.steps[i]),
            prefill_tokens=int(columns.prefill_tokens[i]),
            decode_tokens=int(columns.decode_tokens[i]),
            peak_kv_share=float(columns.peak_blocks[i] / columns.capacity_blocks[i])
            if columns.capacity_blocks[i]
            else None,
            preemptions=int(columns.preemptions[i]),
            bytes_in=float(columns.bytes_in[i]),
            bytes_out=float(columns.bytes_out[i]),
            ttft_misses=int(ttft_misses[i]),
            tpot_misses=int(tpot_misses[i]),
            energy_j=drawn[i][0],
            idle_j=drawn[i][1],
            clock_busy_s=drawn[i][2],
        )
        for i in range(n)
    ]


def _by_instance(instance: NDArray[np.int32], rows: Bools, n: int) -> NDArray[np.intp]:
    return np.bincount(instance[rows & (instance >= 0)], minlength=n)


def _imbalance(result: SimResult) -> float | None:
    t = result.timeline
    if t is None or not len(t.time_s):
        return None
    decodes = t.role != Role.PREFILL
    width = decodes.sum(axis=1)
    held = np.where(decodes, t.resident_tokens, 0).astype(np.float64)
    total = held.sum(axis=1)
    usable = (width >= 2) & (total > 0)
    if not usable.any():
        return None
    held, decodes, width, total = held[usable], decodes[usable], width[usable], total[usable]
    mean = total / width
    variance = (np.where(decodes, held - mean[:, None], 0.0) ** 2).sum(axis=1) / width
    return float(np.mean(np.sqrt(variance) / mean))


def _count(rows: Bools) -> int:
    return int(np.count_nonzero(rows))


def _rate(amount: float, span: float) -> float:
    return amount / span if span > 0 else 0.0
