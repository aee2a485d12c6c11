"""The object that ``--json FILE`` holds, field by field (prose: ``docs/results-json.md``).

A figure without a sample is None (``null``), never NaN, so that the JSON is valid everywhere. A run that was measured
from outside (``penstock bench``) has no instances, and None for what only the inside can count.
"""

from __future__ import annotations

import msgspec


class Spread(msgspec.Struct, frozen=True):
    """How a quantity spreads over its ``count`` samples; None where there is none. Units: of the quantity."""

    count: int
    mean: float | None
    p50: float | None
    p90: float | None
    p95: float | None
    p99: float | None
    max: float | None


class Misses(msgspec.Struct, frozen=True):
    """Requests that missed their SLO, each counted once: they sum to ``requests`` minus those that met it."""

    ttft: int
    """Finished; only the TTFT was too long."""
    tpot: int
    """Finished; only the TPOT was too long."""
    both: int
    """Finished; TTFT and TPOT were too long."""
    rejected: int
    """Refused."""
    unfinished: int
    """Not finished when the simulation ended."""


class ClassMetrics(msgspec.Struct, frozen=True):
    """The figures of one SLO class. Shares are of all its requests."""

    requests: int
    finished: int
    rejected: int
    unfinished: int
    ttft_target_s: float | None
    """Target, seconds; None means no target."""
    tpot_target_s: float | None
    attainment: float | None
    ttft_attainment: float | None
    tpot_attainment: float | None
    goodput_rps: float
    ttft_s: Spread
    tpot_s: Spread
    e2e_s: Spread


class InstanceMetrics(msgspec.Struct, frozen=True):
    """The figures of one instance over the run."""

    instance: int
    role: str
    """Role at the end of the run: ``prefill``, ``decode`` or ``mixed``."""
    busy_share: float
    """Share of the simulated span spent in steps."""
    steps: int
    prefill_tokens: int
    """Prompt tokens computed here, recomputation included."""
    decode_tokens: int
    peak_kv_share: float | None
    """Most KV blocks in use at once, over its capacity."""
    preemptions: int
    bytes_in: float
    """KV bytes received, hand-overs and migrations."""
    bytes_out: float
    ttft_misses: int
    """Requests prefilled here whose TTFT missed the target."""
    tpot_misses: int
    """Finished requests that first decoded here whose TPOT missed the target."""
    energy_j: float | None = None
    """Joules drawn over the run by the power model of ``penstock.perf.energy``; None without one."""
    idle_j: float | None = None
    """The part drawn while no step ran."""
    clock_busy_s: dict[str, float] | None = None
    """Seconds in steps by clock in MHz; None where the instance has no clock levels."""


class RunMetrics(msgspec.Struct, frozen=True):
    """Everything reported about one run. Seconds, tokens, bytes, requests; shares are 0..1."""

    policy: str
    trace: str
    """Where the requests came from."""
    requests: int
    finished: int
    rejected: int
    unfinished: int
    attainment: float
    """Share of all requests that finished with TTFT and TPOT within target; rejected and unfinished are misses."""
    ttft_attainment: float
    """Share of all requests whose first token came within the TTFT target."""
    tpot_attainment: float
    """Share of all requests that finished with TPOT within target; a single token has no TPOT and meets it."""
    offered_rps: float
    """Mean arrival rate of the trace, requests/s."""
    throughput_rps: float
    """Finished requests per simulated second."""
    goodput_rps: float
    """Requests that met every target per simulated second. (The highest rate with attainment of at least 90 % is
    another figure, found by searching over rates.)"""
    output_tokens_per_s: float
    """Tokens sent to clients per simulated second."""
    prompt_tokens_per_s: float
    """Prompt tokens of requests that got a first token, per simulated second."""
    ttft_s: Spread
    """First token minus arrival, of all requests that got a first token."""
    tpot_s: Spread
    """(finish - first token) / (tokens - 1), of finished requests with at least two tokens."""
    itl_s: Spread
    """Gaps between consecutive tokens, every gap of every request: exact."""
    e2e_s: Spread
    """Finish minus arrival, of finished requests."""
    queueing_s: Spread
    """Prefill start minus arrival."""
    decode_wait_s: Spread
    """Decode start minus first token: KV transfer and waiting for a place in the batch."""
    migration_pause_s: Spread
    """Gap between two tokens around a migration, as the client sees it."""
    preemptions: int | None
    migrations: int | None
    """Completed migrations."""
    migrated_tokens: int | None
    """KV tokens moved by completed migrations."""
    failed_migrations: dict[str, int] | None
    """Count by reason."""
    leases_expired: int | None
    """Claims on pinned KV that ran out before their target had room: the KV was computed again."""
    flips: int | None
    """Role changes."""
    reject_reasons: dict[str, int]
    """Count by reason."""
    resident_cv: float | None
    """Imbalance: standard deviation over mean of resident KV tokens across the instances that decode (role decode or
    mixed), averaged over the timeline samples with at least two of them and any token; 0 is perfect balance."""
    simulated_seconds: float
    """Span of virtual time; of a measured run, from the first arrival to the last answer."""
    wall_seconds: float
    events: int | None
    """Events the simulator processed."""
    misses: Misses
    classes: dict[str, ClassMetrics]
    instances: list[InstanceMetrics]
    slo_form: str = "mean"
    """``mean``: the TPOT target is for the mean. ``deadline``: every token has its own, arrival + TTFT + i TPOT; the
    TPOT figures of attainment and misses are then about the tokens after the first."""
    lateness_s: Spread | None = None
    """Under deadlines: the most that a token came after its own, by finished request (negative: all early)."""
    energy_j: float | None = None
    """Joules of all instances over the run, idle ones included; None unless each has a power model."""
    idle_j: float | None = None
    """The part drawn while no step ran."""
    joules_per_request: float | None = None
    """``energy_j`` over the finished requests."""
    joules_per_token: float | None = None
    """``energy_j`` over the tokens sent to clients."""
    finetune_tokens_per_s: float | None = None
    """Tokens of finished fine-tuning micro-batches on all instances per simulated second; None where none tunes."""
