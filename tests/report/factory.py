"""Synthetic simulation results: random, but consistent in the way a simulator's are."""

from __future__ import annotations

import numpy as np

from penstock.core.types import Role
from penstock.sim.result import (
    Flips,
    InstanceColumns,
    Migrations,
    Outcome,
    RequestColumns,
    SimResult,
    Timeline,
    TokenGaps,
)
from penstock.workload.trace import I64, Trace


def make_result(
    n: int = 400,
    seed: int = 0,
    policy: str = "least-kv",
    prefills: int = 2,
    decodes: int = 4,
    *,
    slow: int | None = None,
    load: float = 1.0,
    reject: float = 0.03,
    unfinished: float = 0.02,
    timeline: bool = True,
    classes: tuple[str, ...] = ("chat", "code"),
) -> SimResult:
    """A run of ``n`` requests; decode instance ``slow`` is three times slower, ``load`` stretches all latencies."""
    rng = np.random.default_rng(seed)
    arrival = np.cumsum(rng.exponential(0.05, n))
    arrival -= arrival[0]
    prompt, output = rng.integers(1, 4000, n), np.maximum(rng.geometric(1 / 200, n), 1)
    trace = Trace(
        arrival, prompt, output, rng.integers(0, len(classes), n).astype(np.int16), classes, source="synthetic"
    )
    outcome = rng.choice([1, 2, 0], n, p=[1 - reject - unfinished, reject, unfinished]).astype(np.int8)
    rejected, finished = outcome == Outcome.REJECTED, outcome == Outcome.FINISHED
    wave = 1 + np.sin(arrival / max(arrival[-1], 1) * 6) ** 2
    started = ~rejected & (finished | (rng.random(n) < 0.5))
    prefill_start = np.where(started, arrival + rng.gamma(1.5, 0.08 * load * wave, n), np.nan)
    first = prefill_start + 0.02 + prompt * 5e-5
    prefill_instance = np.where(started, rng.integers(0, prefills, n), -1).astype(np.int32)
    decode_instance = np.where(finished, prefills + rng.integers(0, decodes, n), -1).astype(np.int32)
    pace = rng.gamma(20, 0.0012 * load, n) * np.where(decode_instance == slow, 3.0, 1.0)
    emitted = np.where(finished, output, np.where(started, 1, 0)).astype(np.int64)
    finish = np.where(finished, first + (output - 1) * pace, np.nan)
    several = finished & (output > 1)
    span = float(np.nanmax(finish)) + 1 if finished.any() else float(arrival[-1]) + 1
    samples = np.linspace(0, span, 500)
    m = max(n // 20, 1)
    moved = np.sort(rng.integers(0, n, m))
    migration_start = np.sort(rng.uniform(0, span * 0.9, m))
    instances = prefills + decodes
    role = np.array([Role.PREFILL] * prefills + [Role.DECODE] * decodes, dtype=np.int8)
    flip_time = np.sort(rng.uniform(0.2, 0.8, 2)) * span
    level = rng.uniform(0.5, 1.5, instances) * np.where(np.arange(instances) < prefills, 8_000, 60_000)
    resident = level * (1 + 0.5 * np.sin(samples[:, None] / span * 9 + np.arange(instances)))
    held = np.maximum(resident + rng.normal(0, 3000, resident.shape), 0).astype(np.int64)
    roles = np.repeat(role[None], len(samples), axis=0)
    roles[(samples > flip_time[0]) & (samples < flip_time[1]), prefills] = Role.PREFILL
    return SimResult(
        trace=trace,
        policy=policy,
        requests=RequestColumns(
            outcome=outcome,
            prefill_start_s=prefill_start,
            first_token_s=first,
            decode_start_s=np.where(finished, first + np.minimum(0.01, pace), np.nan),
            finish_s=finish,
            emitted=emitted,
            prefill_instance=prefill_instance,
            decode_instance=decode_instance,
            preemptions=rng.poisson(0.02, n).astype(np.int32),
            migrations=np.bincount(moved, minlength=n).astype(np.int32),
        ),
        gaps=TokenGaps(
            pace[several],
            np.zeros(several.sum()),
            (output - 1)[several].astype(np.int64),
            np.ones(several.sum(), np.int64),
        ),
        migrations=Migrations(
            start_s=migration_start,
            done_s=migration_start + rng.uniform(0.05, 0.4, m),
            request=moved,
            source=(prefills + rng.integers(0, decodes, m)).astype(np.int32),
            target=(prefills + rng.integers(0, decodes, m)).astype(np.int32),
            tokens=rng.integers(100, 4000, m),
            level=np.full(m, 3, np.int8),
            pause_s=rng.gamma(2, 0.01, m),
            reason=("imbalance",) * m,
        ),
        flips=Flips(flip_time, np.full(2, prefills, np.int32), np.array([Role.PREFILL, Role.DECODE], np.int8)),
        timeline=Timeline(
            time_s=samples,
            resident_tokens=held,
            running=rng.integers(0, 60, held.shape).astype(np.int32),
            waiting=rng.integers(0, 9, held.shape).astype(np.int32),
            used_blocks=-(-held // 16),
            role=roles,
        )
        if timeline
        else None,
        instances=InstanceColumns(
            role=role,
            capacity_blocks=np.full(instances, 12_000),
            block_size=np.full(instances, 16),
            busy_s=rng.uniform(0.2, 0.95, instances) * span,
            steps=rng.integers(1000, 90_000, instances),
            prefill_tokens=_split(prompt, prefill_instance, instances),
            decode_tokens=_split(output, decode_instance, instances),
            peak_blocks=rng.integers(1000, 12_000, instances),
            preemptions=rng.integers(0, 5, instances),
            bytes_in=np.where(role == Role.DECODE, rng.uniform(1e9, 9e10, instances), 0.0),
            bytes_out=np.where(role == Role.PREFILL, rng.uniform(1e9, 9e10, instances), 0.0),
        ),
        simulated_s=span,
        wall_s=0.31,
        events=n * 7,
        reject_reasons={"queue_full": int(rejected.sum())} if rejected.any() else {},
        failed_migrations={"target_full": 2},
    )


def _split(tokens: I64, instance: np.ndarray[tuple[int], np.dtype[np.int32]], n: int) -> I64:
    some = instance >= 0
    return np.bincount(instance[some], weights=tokens[some], minlength=n).astype(np.int64)
